"""Memory of this machine, or of the container: psutil reports the machine's only."""

from pathlib import Path

import psutil

# Files with a container's memory limit: cgroup version 2, version 1.
LIMITS = ("memory.max", "memory/memory.limit_in_bytes")


def total(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """RAM in bytes that all processes here may use together."""
    found: int = psutil.virtual_memory().total
    for name in LIMITS:
        try:
            found = min(found, int((groups / name).read_text()))
        except (OSError, ValueError):  # no such cgroup, or no limit ("max")
            continue
    return found
