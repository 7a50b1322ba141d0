"""`train.py` as people run it, and what a run leaves: for the tests of training."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from alpaca.training import checkpoint

ROOT = Path(__file__).resolve().parent.parent


def train(*flags: object, ranks: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end, on `ranks` ranks of torchrun or as one plain process."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    return subprocess.run(
        [*launcher, "train.py", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def start(words: list[str]) -> "subprocess.Popen[str]":
    """Begin a command in a session of its own; its errors are part of its output."""
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(words: list[str]) -> str:
    """Run a command that ends well; returns its output."""
    job = start(words)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    return output


def wait_until(reached: Callable[[], bool], job: "subprocess.Popen[str]") -> None:
    """Wait while the job runs; a job that ends first is a failure."""
    while not reached():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)


def lines(out: Path) -> list[dict[str, Any]]:
    """What log.jsonl holds."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    """The training losses, step by step."""
    steps = [line for line in lines(out) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    return [line["loss"] for line in steps]


def master_weights(out: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights of the newest checkpoint, whole."""
    file = scratch / f"{out.name}.pt"
    dcp_to_torch_save(checkpoint.found(out)[-1], file)
    held: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["model"]
    return held


def distance(out: Path, other: Path, scratch: Path) -> float:
    """How far the weights of two runs' newest checkpoints are apart, relative to their norm."""
    ours, theirs = (master_weights(folder, scratch) for folder in (out, other))
    assert ours.keys() == theirs.keys()
    moved = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs]).norm()
    return float(moved / torch.cat([weight.flatten() for weight in theirs.values()]).norm())
