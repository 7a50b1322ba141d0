"""Memory of this machine, or of the container: psutil reports the machine's only."""

from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
# Files with a container's memory limit: cgroup version 2, version 1.
LIMITS = ("memory.max", "memory/memory.limit_in_bytes")


def available(groups: Path = GROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """RAM in bytes that processes here can still take; file caches count as free.

    `groups` is the folder of the control groups, `own` names this process's: a job of Slurm or
    systemd has its limit below the folder, not in it.
    """
    found: int = psutil.virtual_memory().available  # of the whole machine, even in a container
    for folder in [groups, *_nested(groups, own)]:
        left = container_memory_left(folder)
        if left is not None:
            found = min(found, max(0, left))
    return found


def _nested(groups: Path, own: Path) -> list[Path]:
    """The folders of this process's control group, version 2, and of the groups it is in."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    paths = [Path(line[3:].lstrip("/")) for line in lines if line.startswith("0::")]
    return [groups / part for path in paths for part in [path, *path.parents][:-1]]


def container_memory_left(groups: Path) -> int | None:
    """Bytes that the container may still allocate, or None without a limit.

    `groups` is the folder of the control groups; version 2 is tried first, then version 1. The
    kernel counts cached file pages as used but frees them on demand, so inactive ones do not
    count here (kernel documentation of control groups, memory.stat).
    """
    for limit, used, stat, files in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        try:
            counts = dict(line.split() for line in (groups / stat).read_text().splitlines())
            taken = int((groups / used).read_text()) - int(counts[files])
            return int((groups / limit).read_text()) - taken
        except (OSError, ValueError, KeyError):  # no such group, or no limit ("max")
            continue
    return None


def total(groups: Path = GROUPS) -> int:
    """RAM in bytes that all processes here may use together."""
    found: int = psutil.virtual_memory().total
    for name in LIMITS:
        try:
            found = min(found, int((groups / name).read_text()))
        except (OSError, ValueError):  # no such cgroup, or no limit ("max")
            continue
    return found
