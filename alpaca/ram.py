"""Memory of this machine, or of the container: psutil reports the machine's only."""

from pathlib import Path

import psutil

# Files with a container's memory limit: cgroup version 2, version 1.
LIMITS = ("memory.max", "memory/memory.limit_in_bytes")


def available(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """RAM in bytes that processes here can still take; file caches count as free."""
    found: int = psutil.virtual_memory().available
    try:
        statistics = dict(
            line.split() for line in (groups / "memory.stat").read_text().splitlines()
        )
        held = int((groups / "memory.current").read_text()) - int(statistics["inactive_file"])
    except (OSError, ValueError, KeyError):  # no such cgroup
        return found
    return max(0, min(found, total(groups) - held))


def total(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """RAM in bytes that all processes here may use together."""
    found: int = psutil.virtual_memory().total
    for name in LIMITS:
        try:
            found = min(found, int((groups / name).read_text()))
        except (OSError, ValueError):  # no such cgroup, or no limit ("max")
            continue
    return found
