"""The output folder belongs to one run at a time, and is never the base model's."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import ROOT, start, train, wait_until

from alpaca import passport
from alpaca.training import checkpoint


def flags(model: Path, out: Path, *more: object) -> list[object]:
    given = {"model_name_or_path": model, "output_dir": out, "save_steps": 1, "max_steps": 2}
    given["keep_last_checkpoint"] = True
    return [*(f"--{name}={value}" for name, value in given.items()), *more]


def verified(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "alpaca", "verify", folder], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_second_run_is_refused_and_one_after_a_kill_is_not(
    tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    long = flags(tiny_model, out, "--max_steps=500")
    first = start([sys.executable, "train.py", *map(str, long)])
    wait_until(lambda: bool(checkpoint.found(out)), first)
    second = train(*long)
    assert second.returncode == 2
    assert f"Another run is writing {out}" in second.stderr
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    done = train(*flags(tiny_model, out, f"--max_steps={steps_done(out) + 1}"))
    assert done.returncode == 0, done.stderr
    assert (out / "config.json").is_file()
    assert not (out / ".train.lock").exists()


def steps_done(out: Path) -> int:
    return int(checkpoint.found(out)[-1].name.removeprefix("checkpoint-"))


def test_a_base_model_among_the_checkpoints_is_not_deleted(
    tiny_model: Path, tmp_path: Path
) -> None:
    """transformers' Trainer puts models there; a copy of a checkpoint is the user's own too."""
    out = tmp_path / "out"
    base = out / "checkpoint-500"
    shutil.copytree(tiny_model, base)
    done = train(*flags(base, out, "--overwrite_output_dir"))
    assert done.returncode == 2
    assert "holds the base model where training would replace it" in done.stderr
    assert (base / "config.json").is_file()
    assert train(*flags(tiny_model, out)).returncode == 0
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-2.bak")
    again = train(*flags(tiny_model, out, "--overwrite_output_dir", "--seed=1"))
    assert again.returncode == 0, again.stderr
    assert (base / "config.json").is_file()
    assert (out / "checkpoint-2.bak" / checkpoint.META).is_file()


@pytest.mark.parametrize("through_a_link", [False, True])
def test_the_base_model_is_never_replaced(
    through_a_link: bool, tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    out = base
    if through_a_link:
        out = tmp_path / "link"
        out.symlink_to(base)
    done = train(*flags(base, out, "--overwrite_output_dir"))
    assert done.returncode == 2
    assert "holds the base model where training would replace it" in done.stderr
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_a_failed_run_leaves_the_model_that_it_was_to_replace(
    tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert train(*flags(tiny_model, out)).returncode == 0
    model = (out / "model.safetensors").read_bytes()
    log = (out / "log.jsonl").read_text()
    failed = train(
        *flags(tiny_model, out, "--overwrite_output_dir", "--learning_rate=1e30", "--max_steps=9")
    )
    assert failed.returncode == 2, failed.stdout
    assert "Lower --learning_rate" in failed.stderr
    assert (out / "model.safetensors").read_bytes() == model
    assert "is intact" in verified(out)
    assert (out / "log.previous.jsonl").read_text() == log
    assert all(json.loads(line) for line in log.splitlines())
    recorded = passport.read(out)
    assert recorded is not None
    assert "beside" not in recorded
