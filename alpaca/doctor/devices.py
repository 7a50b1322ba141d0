"""Checks of torch, the driver and every accelerator, by starting one small process for each.

The processes report what torch sees and run an all-reduce. If one of them hangs or crashes, the
doctor still reports its other checks.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpaca.doctor.finding import Finding

CPU_RANKS = 2
TIMEOUT = 60.0  # seconds, for processes that import torch on a busy machine
ROOT = Path(__file__).resolve().parents[2]
BF16 = 8  # the first compute capability whose tensor cores multiply bf16


@dataclass(frozen=True)
class Rank:
    """The result of one process: its last report (empty when there is none) and its stderr."""

    facts: dict[str, Any]
    errors: str


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: its version, the GPUs a program may use, and its fault ("" if none)."""

    version: str | None = None
    gpus: int = 0
    fault: str = ""


def driver(devices: Path = Path("/dev")) -> Driver:
    """Ask nvidia-smi; without it there is no driver, unless NVIDIA's device files exist.

    CUDA_VISIBLE_DEVICES hides cards; all entries after the first that does not exist are ignored.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        found = sorted(path.name for path in devices.glob("nvidia[0-9]*"))
        return Driver(
            fault=f"{', '.join(found)} exists, but nvidia-smi is missing" if found else ""
        )
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Driver(fault=f"nvidia-smi does not answer: {error}")
    if done.returncode:
        return Driver(fault=f"nvidia-smi fails: {last_line(done.stdout + done.stderr)}")
    lines = done.stdout.split()
    gpus = len(lines)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [word.strip() for word in visible.split(",")]
        usable = [not word.isdecimal() or int(word) < gpus for word in named if word]
        gpus = 0 if "-1" in named[:1] else [*usable, False].index(False)
    return Driver(lines[0] if lines else None, gpus)


def ask(world_size: int, program: Sequence[str] = ("-m", "alpaca.doctor.ranks")) -> list[Rank]:
    """Start the ranks, wait for all of them, and read their reports."""
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = str(Path(folder, "rendezvous"))
        started = [
            subprocess.Popen(
                [sys.executable, *program, rendezvous],
                cwd=ROOT,
                text=True,
                env={
                    "OMP_NUM_THREADS": "1",
                    **os.environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + TIMEOUT
        return [_report(process, deadline) for process in started]


def _report(process: "subprocess.Popen[str]", deadline: float) -> Rank:
    try:
        output, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        errors += f"\nno answer within {TIMEOUT:.0f} s"
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return Rank(json.loads(lines[-1]) if lines else {}, errors.strip())


def findings(ranks: Sequence[Rank], found_driver: Driver) -> list[Finding]:
    """All findings about torch and the devices, from what the ranks reported."""
    facts = ranks[0].facts
    if not facts:
        detail = "can't be used: " + last_line(ranks[0].errors)
        return [Finding("torch", False, detail, "./script/setup installs it.")]
    found = [Finding("torch", True, f"{facts['torch']}, {len(ranks)} rank(s)")]
    found.append(cuda(facts, found_driver))
    for number, rank in enumerate(ranks):
        if "name" in rank.facts:
            found.append(gpu(number, rank.facts))
    if found_driver.gpus > 1:
        found.append(peers([rank.facts for rank in ranks]))
    return [*found, all_reduce(ranks)]


def cuda(facts: dict[str, Any], found: Driver) -> Finding:
    """Whether torch's CUDA and the driver are compatible."""
    built, gpus = facts["cuda"], found.gpus
    if found.fault and "name" not in facts:
        return Finding(
            "CUDA",
            False,
            found.fault,
            "Restart, or reinstall the driver; in Docker: docker run --gpus all",
        )
    if "name" in facts and not gpus:
        return Finding("CUDA", True, f"{built}; the number of GPUs is unknown")
    if not gpus:
        detail = "no NVIDIA GPU here; training and serving run on the CPU"
        return Finding("CUDA", True, detail)
    if built is None:
        return Finding(
            "CUDA",
            False,
            f"{gpus} GPU(s), but torch is a build for CPUs",
            "Run ./script/setup where pip finds the CUDA build.",
        )
    ready = "name" in facts
    return Finding(
        "CUDA",
        ready,
        f"{built}, driver {found.version}, {gpus} GPU(s)",
        f"torch can't use the GPUs: a driver for CUDA {built} is needed.",
    )


def gpu(number: int, facts: dict[str, Any]) -> Finding:
    """One card: its memory, and bf16 in hardware."""
    major, minor = facts["capability"]
    fast = major >= BF16
    free, memory = facts["free"] / 1e9, facts["memory"] / 1e9
    detail = (
        f"{facts['name']}, {free:.1f} of {memory:.1f} GB free, capability {major}.{minor}, "
        + ("bf16 in hardware" if fast else "bf16 only emulated")
    )
    if fast and free < 0.9 * memory:
        return Finding(f"GPU {number}", False, detail, "Another process uses it: see nvidia-smi.")
    return Finding(f"GPU {number}", fast, detail, "It will train and serve in fp32, much slower.")


def peers(facts: Sequence[dict[str, Any]]) -> Finding:
    """Whether every GPU can access every other without going through host memory."""
    unreported = [f"rank {number}" for number, one in enumerate(facts) if "peers" not in one]
    unconnected = unreported + [
        f"{number}-{other}"
        for number, one in enumerate(facts)
        for other in one.get("others", [])
        if other not in one["peers"]
    ]
    detail = f"not between {', '.join(unconnected)}" if unconnected else ""
    detail = detail or "every GPU reaches every other"
    return Finding(
        "peer access",
        not unconnected,
        detail,
        "Correct but slower: enable it (IOMMU off, NVLink), or expect PCIe speed.",
    )


def all_reduce(ranks: Sequence[Rank]) -> Finding:
    """Whether an all-reduce over the ranks gave the right sum."""
    world = len(ranks)
    right = world * (world + 1) / 2
    wrong = [number for number, rank in enumerate(ranks) if rank.facts.get("sum") != right]
    if not wrong:
        slowest = max(rank.facts["seconds"] for rank in ranks)
        return Finding("all-reduce", True, f"{world} ranks added 4 MB in {slowest * 1000:.0f} ms")
    reason = last_line(ranks[wrong[0]].errors) or "a wrong sum"
    return Finding(
        "all-reduce",
        False,
        f"rank(s) {wrong} failed: {reason}",
        "NCCL_DEBUG=INFO says more; firewalls and a small /dev/shm are common causes.",
    )


def last_line(errors: str) -> str:
    """The line of a traceback that says what happened."""
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else ""
