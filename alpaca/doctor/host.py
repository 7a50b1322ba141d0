"""Checks of everything except the accelerators: versions, disk, memory, ports, limits, programs.

Each takes what it checks as an argument and returns one finding. None imports torch.
"""

import os
import platform
import re
import resource
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from alpaca import heap, ram
from alpaca.atomic import free_disk
from alpaca.doctor.finding import Finding

PYTHON = (3, 11)
OPEN_FILES = 1024  # per rank: shards, sockets to every other rank, the data set
SHARED_MEMORY = 1 << 30  # NCCL's buffers between ranks of one node; Docker gives 64 MB
PROBE = 64 << 20  # bytes written to measure a disk's speed
SLOW = 20e6  # bytes/s below which a checkpoint of a 7B model takes more than an hour
CONTAINER = Path("/.dockerenv")


def python() -> Finding:
    """Whether Python is new enough for the pinned packages."""
    found = tuple(map(int, platform.python_version_tuple()[:2]))
    return Finding(
        "Python",
        found >= PYTHON,
        platform.python_version(),
        f"Needs {PYTHON[0]}.{PYTHON[1]}: PYTHON=/path/to/python3.11 ./script/setup",
    )


def pins(requirements: Path) -> Finding:
    """Whether the installed versions are those of requirements.txt."""
    wanted = re.findall(r"^([\w.-]+)==([\w.]+)$", requirements.read_text(), flags=re.MULTILINE)
    wrong = []
    for package, pinned in wanted:
        try:
            found = version(package).partition("+")[0]
        except PackageNotFoundError:
            found = "absent"
        if found != pinned:
            wrong.append(f"{package} {found}, pinned {pinned}")
    detail = f"all {len(wanted)} packages match their pins" if not wrong else "; ".join(wrong)
    return Finding("versions", not wrong, detail, "./script/setup installs the pinned ones")


def allocator() -> Finding:
    """Which heap training uses on a CPU; never red."""
    if heap.expected():
        return Finding("heap", True, "tcmalloc is installed; training on a CPU uses it")
    if heap.installed():
        why = f"{heap.SWITCH}=0 or LD_PRELOAD keeps it out"
        return Finding("heap", True, f"tcmalloc is installed, but {why} of training on a CPU")
    advice = "training on a CPU takes up to twice the memory: apt-get install libtcmalloc-minimal4"
    return Finding("heap", True, f"no tcmalloc; without it, {advice}")


def disk(folder: Path, needed: float) -> Finding:
    """Free space and write speed of the disk that models and checkpoints will be written to."""
    name, free = "disk", free_disk(folder.resolve())
    if free < max(needed, 2 * PROBE):
        return Finding(
            name,
            False,
            f"{folder}: {free / 1e9:.2f} GB free, {needed / 1e9:.1f} needed",
            "Free some space, or use another disk (python -m alpaca plan says how much).",
        )
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    try:
        speed = write_speed(existing)
    except OSError as error:
        return Finding(name, False, f"{folder} can't be written: {error}", "Choose another folder.")
    detail = f"{folder}: {free / 1e9:,.0f} GB free, writes {speed / 1e6:,.0f} MB/s"
    return Finding(name, speed > SLOW, detail, "Checkpoints will be slow; use a local disk.")


def write_speed(folder: Path) -> float:
    """Bytes per second that reach the disk, measured with a temporary file."""
    path = folder / f".alpaca-doctor-{os.getpid()}"
    block = os.urandom(1 << 20)
    started = time.perf_counter()
    try:
        with open(path, "wb") as file:
            for _ in range(PROBE >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    return PROBE / (time.perf_counter() - started)


def shared_memory(folder: Path, ranks: int, cuda: bool) -> Finding:
    """Free space in /dev/shm, through which NCCL's ranks on one node communicate."""
    name = str(folder)
    if not folder.is_dir():
        return Finding(name, False, "does not exist", "docker run --shm-size=8g")
    free = shutil.disk_usage(folder).free
    needed = SHARED_MEMORY if cuda and ranks > 1 else 16 << 20
    return Finding(
        name,
        free >= needed,
        f"{free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} needed",
        "docker run --shm-size=8g, or --ipc=host",
    )


def memory(needed: float) -> Finding:
    """RAM that is available now, within the container's limit if there is one."""
    total = ram.total()
    available = min(psutil.virtual_memory().available, total)
    detail = f"{available / 1e9:.1f} of {total / 1e9:.1f} GB available"
    return Finding("RAM", available >= needed, detail, f"Needs {needed / 1e9:.0f} GB.")


def port(number: int, flag: str) -> Finding:
    """Whether a port is free to listen on; `flag` is the option that sets another."""
    name, remedy = f"port {number}", f"Use another: {flag} {max(1024, number % 65535) + 1}"
    if not 0 < number < 65536:
        return Finding(name, False, "is not a port: ports are 1 to 65535", remedy)
    if os.geteuid() and number < _unprivileged():
        return Finding(name, False, "is reserved for root", remedy)
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == number:
            owner = f" by process {connection.pid}" if connection.pid else ""
            return Finding(name, False, f"is taken{owner}", remedy)
    return Finding(name, True, "is free")


def _unprivileged() -> int:
    """The lowest port that does not need root."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    except (OSError, ValueError):
        return 1024


def open_files() -> Finding:
    """How many files a process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Finding(
        "open files",
        soft >= OPEN_FILES,
        f"up to {soft:,} per process",
        f"ulimit -n {max(OPEN_FILES, min(hard, 65536))}, or docker run --ulimit nofile=65536",
    )


def curl() -> Finding:
    """Whether curl is installed, with which the demo sends its requests."""
    found = shutil.which("curl")
    return Finding(
        "curl",
        found is not None,
        found or "is not on PATH",
        "./script/demo needs it: apt-get install curl",
    )


def docker(container: Path = CONTAINER) -> Finding:
    """Whether Docker, which builds and runs the image, is installed and its engine answers."""
    if container.exists():
        return Finding("docker", True, "not needed: this is a container already")
    program = shutil.which("docker")
    if program is None:
        return Finding(
            "docker",
            False,
            "is not on PATH",
            "Only images need it; training and ./script/serve don't.",
        )
    done = _ask(program, "info", "--format", "{{.ServerVersion}}")
    answer = f"engine {done}" if done else "its engine does not answer"
    return Finding(
        "docker", done is not None, answer, "Start it, and add yourself to the group docker."
    )


def cog(container: Path = CONTAINER) -> Finding:
    """Whether cog is installed, and what this version calls its commands."""
    if container.exists():
        return Finding("cog", True, "not needed: this is a container already")
    program = shutil.which("cog")
    if program is None:
        return Finding(
            "cog",
            False,
            "is not on PATH",
            "Only images need it: see github.com/replicate/cog/releases.",
        )
    release, usage = _ask(program, "--version"), _ask(program, "--help") or ""
    known = set(re.findall(r"^  (\w+) ", usage, flags=re.MULTILINE))
    if not release or not known:
        return Finding("cog", False, "does not answer --version and --help", "Reinstall it.")
    # Since 0.23 a command in the image is `cog exec`, and a prediction `cog run`.
    new = "exec" in known
    names = ("cog exec CMD", "cog run -i ...") if new else ("cog run CMD", "cog predict -i ...")
    detail = f"{release}: a command in the image is `{names[0]}`, a prediction `{names[1]}`"
    return Finding("cog", "build" in known, detail, "This Cog cannot build images.")


def _ask(*words: str) -> str | None:
    """A program's output, or None when it fails or takes longer than five seconds."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None
