"""How much memory this machine has, or the container it is: psutil sees the machine alone."""

from pathlib import Path

import psutil

# A container's limit, by control groups of version 2 and of version 1.
LIMITS = ("memory.max", "memory/memory.limit_in_bytes")


def total(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of RAM that processes here may take together."""
    found: int = psutil.virtual_memory().total
    for name in LIMITS:
        try:
            found = min(found, int((groups / name).read_text()))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
    return found
