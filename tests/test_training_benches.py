"""The benchmarks of training run, small, and say what their documents quote."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def bench(name: str, *flags: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, f"bench/{name}.py", *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_gpu_train_needs_no_cog() -> None:
    """The images that have GPUs need not have it."""
    blocked = "import sys; sys.modules['cog'] = None; import gpu_train"
    done = subprocess.run(
        [sys.executable, "-c", blocked],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_gpu_train_measures_adapters_on_a_cpu_too() -> None:
    flags = ("--device", "cpu", "--tiny", "--eager", "--seconds", 0.1)
    found = bench("gpu_train", *flags, "--lora", 4, "--quantize_base", "nf4")
    assert (found["lora_rank"], found["quantize_base"]) == (4, "nf4")
    plain, checkpointed = (case["last_loss"] for case in found["cases"].values())
    assert plain == checkpointed


@pytest.mark.slow
def test_gpu_train_measures_steps_of_the_trainer_on_a_cpu_too() -> None:
    found = bench("gpu_train", "--device", "cpu", "--tiny", "--eager", "--seconds", 0.1)
    assert list(found["cases"]) == ["eager", "eager+checkpointing"]
    for case in found["cases"].values():
        assert case["tokens_per_second"] > 0
        assert 0 < case["mfu"] < 1
    plain, checkpointed = (case["last_loss"] for case in found["cases"].values())
    assert plain == pytest.approx(
        checkpointed, rel=0.1
    )  # both may have made other numbers of steps
    assert found["best_mfu"] == max(case["mfu"] for case in found["cases"].values())


@pytest.mark.slow
def test_tokenize_corpus_counts_what_it_tokenizes(tiny_model: Path) -> None:
    found = bench("tokenize_corpus", "--model", tiny_model, "--examples", 300)
    assert found["examples"] == 300
    assert found["tokens"] > 300 * 40
    assert found["peak_rss_mb"] > found["peak_rss_mb_before"] / 2
