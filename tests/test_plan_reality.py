"""A plan against the run it is for: tokens, steps and disk exact, memory within a tenth."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from model_folders import copied, save, tensors
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

ROOT = Path(__file__).resolve().parent.parent


def train(flags: list[str], ranks: int) -> str:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), "train.py", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def plan(flags: list[str], ranks: int) -> dict[str, object]:
    command = [sys.executable, "-m", "alpaca", "plan", "--json", "--gpus", str(ranks), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def tensor_bytes(checkpoint: Path) -> int:
    """Bytes of all tensors in a checkpoint, from its own index."""
    index = FileSystemReader(checkpoint).read_metadata().state_dict_metadata.values()
    return sum(
        math.prod(entry.size) * entry.properties.dtype.itemsize
        for entry in index
        if isinstance(entry, TensorStorageMetadata)
    )


@pytest.mark.parametrize(
    ("ranks", "tied"), [pytest.param(1, False, marks=pytest.mark.slow), (2, True)]
)
def test_steps_tokens_and_disk_are_exactly_those_of_the_run(
    tiny_model: Path, tmp_path: Path, ranks: int, tied: bool
) -> None:
    out = tmp_path / "out"
    model = copied(tiny_model, tmp_path / "model", tie_word_embeddings=tied)
    if tied:
        held = tensors(model)
        del held["lm_head.weight"]
        save(model, held)
    flags = [
        f"--model_name_or_path={model}",
        f"--output_dir={out}",
        "--num_train_epochs=0.5",
        "--per_device_train_batch_size=4",
        "--gradient_accumulation_steps=2",
        "--save_steps=5",
        "--eval_fraction=0.1",
        "--max_tokens_per_pack=700",
        "--keep_last_checkpoint",
    ]
    made = plan(flags, ranks)
    told = train(flags, ranks)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    work = made["work"]
    assert isinstance(work, dict)
    assert work["steps"] == len(steps) > 5
    assert work["tokens"] == sum(line["tokens"] for line in steps)
    assert work["padded"] == sum(line["padded_tokens"] for line in steps)
    assert work["targets"] == sum(line["target_tokens"] for line in steps)
    assert made["export"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    (checkpoint,) = out.glob("checkpoint-*")
    assert made["checkpoint"] == tensor_bytes(checkpoint)
    after = told.partition("predicted and measured")[2]
    assert f"{work['tokens']:,} and {work['tokens']:,}" in after


def memory(name: str, model: Path) -> tuple[int, int]:
    """Bytes predicted and measured for one of the settings of bench/plan_memory.py."""
    spec = importlib.util.spec_from_file_location("plan_memory", ROOT / "bench/plan_memory.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    found = bench.compared(name, model)
    return found["predicted"], found["measured"]


@pytest.mark.parametrize(
    "name",
    [
        "small packs",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "large packs",
                "checkpointing",
                "two ranks",
                "offload",
                "8-bit optimizer",
                "LoRA",
                "LoRA, checkpointing",
                "LoRA of q and v",
                "DoRA",
                "QLoRA",
                "LoRA, two ranks",
                "bf16",
                "two ranks, bf16",
            )
        ),
    ],
)
def test_peak_memory_is_predicted_within_a_tenth(name: str, smollm: Path) -> None:
    predicted, measured = memory(name, smollm)
    assert predicted == pytest.approx(measured, rel=0.1)


def test_a_run_that_cannot_fit_is_refused_unless_its_plan_is_skipped(
    tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [
        sys.executable,
        "train.py",
        f"--model_name_or_path={tiny_model}",
        f"--output_dir={out}",
        "--max_steps=1000000",
        "--save_steps=1",
        "--save_total_limit=1000000",
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "This run cannot fit: it needs" in done.stderr
    assert "--save_total_limit 1" in done.stderr
    assert "--skip_plan" in done.stderr
    assert "Traceback" not in done.stderr
    with subprocess.Popen([*words, "--skip_plan"], cwd=ROOT, stderr=subprocess.DEVNULL) as started:
        while started.poll() is None and not list(out.glob("checkpoint-*/run.json")):
            time.sleep(0.1)
        started.terminate()
    assert started.returncode == 143
