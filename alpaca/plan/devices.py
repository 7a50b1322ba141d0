"""Devices to train on: cards by name, from the makers' data sheets, and those of this machine.

A plan is made before hardware is paid for, so a card need not be installed. Installed cards report
their memory; their speed is looked up by name.
"""

import re
import shutil
import subprocess
import time
from dataclasses import dataclass, replace

import numpy as np

from alpaca import ram
from alpaca.errors import UserError
from alpaca.recipe import rules

GB = 10**9


@dataclass(frozen=True)
class Device:
    """One accelerator, or a CPU: bytes, FLOP/s and bytes/s.

    `bf16` is the dense peak of matrix products in bf16 with fp32 sums; `fast_bf16` says whether the
    hardware multiplies bf16 at all; `link` is the bandwidth to the other devices of a node, in one
    direction. None: not known; for `bf16` also: not supported.
    """

    name: str
    memory: int
    bf16: float | None
    fp32: float | None
    bandwidth: float | None
    link: float | None
    cuda: bool = True
    fast_bf16: bool = False


def _gpu(name: str, memory: int, bf16: float | None, fp32: float, band: int, link: int) -> Device:
    """From a data sheet's GB, TFLOP/s, TFLOP/s, GB/s and GB/s.

    A sheet's GB is read as 10^9 bytes: the memory that a driver reports is between that and 2^30.
    """
    rate = None if bf16 is None else bf16 * 1e12
    return Device(
        name, memory * GB, rate, fp32 * 1e12, band * 1e9, link * 1e9, fast_bf16=bf16 is not None
    )


# Sheets of newer cards quote bf16 with sparsity; it is halved here. Links: half of the NVLink
# total, or PCI Express x16 (16, 32, 64 GB/s for generation 3, 4, 5) where there is no NVLink.
GPUS = {
    # NVIDIA T4 data sheet, 2019: 65 TFLOP/s in fp16, none in bf16
    "t4": _gpu("T4", 16, None, 8.1, 320, 16),
    # NVIDIA V100 data sheet, 2020 (SXM2)
    "v100-16": _gpu("V100 16 GB", 16, None, 15.7, 900, 150),
    "v100-32": _gpu("V100 32 GB", 32, None, 15.7, 900, 150),
    # NVIDIA Ampere GA102 architecture white paper, tables 2 and 9
    "rtx-3090": _gpu("RTX 3090", 24, 71, 35.6, 936, 32),
    "a6000": _gpu("RTX A6000", 48, 154.8, 38.7, 768, 32),
    # NVIDIA A10 data sheet, 2021; A10G: its data sheet of the same year
    "a10": _gpu("A10", 24, 125, 31.2, 600, 32),
    "a10g": _gpu("A10G", 24, 70, 35, 600, 32),
    # NVIDIA Ada architecture white paper (RTX 4090), L4 and L40S data sheets, 2023
    "rtx-4090": _gpu("RTX 4090", 24, 165.2, 82.6, 1008, 32),
    "l4": _gpu("L4", 24, 121, 30.3, 300, 32),
    "l40s": _gpu("L40S", 48, 362, 91.6, 864, 32),
    # NVIDIA RTX Blackwell architecture white paper, 2025
    "rtx-5090": _gpu("RTX 5090", 32, 209.5, 104.8, 1792, 64),
    # NVIDIA A100 data sheet, 2021 (SXM4)
    "a100-40": _gpu("A100 40 GB", 40, 312, 19.5, 1555, 300),
    "a100-80": _gpu("A100 80 GB", 80, 312, 19.5, 2039, 300),
    # NVIDIA H100 data sheet, 2023 (SXM5 and PCIe), H200 data sheet, 2024
    "h100": _gpu("H100", 80, 989, 67, 3350, 450),
    "h100-pcie": _gpu("H100 PCIe", 80, 756, 51, 2000, 64),
    "h200": _gpu("H200", 141, 989, 67, 4800, 450),
    # NVIDIA DGX B200 and HGX B200 data sheets, 2025: an eighth of the machine's figures
    "b200": _gpu("B200", 180, 2250, 80, 8000, 900),
}

# Names that the driver reports; the first pattern that matches decides.
PATTERNS = {
    r"T4\b": "t4",
    r"V100.*32": "v100-32",
    r"V100": "v100-16",
    r"RTX 3090": "rtx-3090",
    r"RTX A6000": "a6000",
    r"A10G": "a10g",
    r"A10\b": "a10",
    r"RTX 4090": "rtx-4090",
    r"L40S": "l40s",
    r"L4\b": "l4",
    r"RTX 5090": "rtx-5090",
    r"A100.*80": "a100-80",
    r"A100": "a100-40",
    r"H100.*PCIe": "h100-pcie",
    r"H100": "h100",
    r"H200": "h200",
    r"B200": "b200",
}


def named(name: str) -> Device:
    """The card of that name in the table, ignoring case; raises UserError if there is none."""
    key = name.lower().replace("_", "-").replace(" ", "-")
    if key not in GPUS:
        raise UserError(f"Unknown card {name!r}.", f"Known: {', '.join(GPUS)}.")
    return GPUS[key]


def recognized(name: str, memory: int, capability: float = 0.0) -> Device:
    """The card that a driver calls `name`, with its actual memory in bytes.

    A card that is not in the table multiplies bf16 from compute capability 8.0 on.
    """
    for pattern, key in PATTERNS.items():
        if re.search(pattern, name):
            return replace(GPUS[key], memory=memory)
    return Device(name, memory, None, None, None, None, fast_bf16=capability >= 8)


def installed() -> list[Device]:
    """The cards of this machine, in the driver's order; uses nvidia-smi, to avoid importing torch.

    Empty if nvidia-smi is missing, fails or hangs; `alpaca doctor` reports why.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = ["--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [program, *query], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    rows = [[part.strip() for part in line.rsplit(",", 2)] for line in lines]
    return [
        recognized(row[0], int(row[1]) << 20, float(row[2]))
        for row in rows
        if len(row) == 3 and row[1].isdecimal()
    ]


def cpu(memory: int | None = None) -> Device:
    """This machine's processor as a device: its memory, and the rate of its matrix products."""
    memory = ram.total() if memory is None else memory
    fast = rules.cpu_multiplies_bf16()
    return Device("CPU", memory, None, matrix_rate(), None, None, cuda=False, fast_bf16=fast)


def matrix_rate(size: int = 1024) -> float:
    """FLOP/s of fp32 matrix products on all cores, the best of three; takes 0.1 s."""
    a = np.ones((size, size), dtype=np.float32)
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        a @ a
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
