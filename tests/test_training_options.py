"""Options for large models: compiled layers, 8-bit moments, other logs, FSDP settings."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import tomllib
from contextlib import closing
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import ROOT, lines, losses, train

from alpaca.errors import UserError
from alpaca.recipe import fsdp_config
from alpaca.recipe.arguments import Arguments, parse

APART = ROOT / ".venv" / "apart"  # where script/setup puts torchao


def flags(tiny_model: Path, out: Path, **changed: object) -> list[str]:
    given = {
        "model_name_or_path": tiny_model,
        "output_dir": out,
        "max_steps": 6,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "eval_fraction": 0.05,
        "learning_rate": 0.01,
        **changed,
    }
    return [f"--{name}={value}" for name, value in given.items()]


@pytest.fixture(scope="module")
def usual(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("usual") / "out"
    done = train(*flags(tiny_model, out, report_to="tensorboard"))
    assert done.returncode == 0, done.stderr
    return out


def test_the_log_says_what_each_step_took_and_saved(usual: Path) -> None:
    for line in lines(usual):
        if "loss" in line:
            assert 0 < line["mfu"] < 1.5
            assert line["memory"] > 100 << 20  # a process with torch in it
            assert 0 < line["prefix_tokens_saved"] < line["padded_tokens"] - line["tokens"]
            assert line["target_tokens"] < line["tokens"]


def test_tensorboard_gets_the_numbers_of_the_log(usual: Path) -> None:
    [folder] = (usual / "tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    shown = [event.value for event in events.Scalars("train/loss")]
    assert shown == pytest.approx(losses(usual), rel=1e-6)
    held_out = [event.value for event in events.Scalars("eval/loss")]
    assert held_out == pytest.approx(
        [line["eval_loss"] for line in lines(usual) if "eval_loss" in line]
    )


@pytest.fixture(scope="module")
def reporters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of the extra `report`, apart: 250 MB that no other test needs."""
    folder = tmp_path_factory.mktemp("reporters")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder)]
    subprocess.run([*install, *extras["optional-dependencies"]["report"]], check=True)
    return folder


@pytest.mark.slow
def test_wandb_and_trackio_get_the_numbers_of_the_log(
    tiny_model: Path, usual: Path, reporters: Path, tmp_path: Path
) -> None:
    for name in ("wandb", "trackio"):
        done = train(
            *flags(tiny_model, tmp_path / name, report_to=name, max_steps=6),
            PYTHONPATH=str(reporters),
            WANDB_MODE="offline",
            TRACKIO_DIR=str(tmp_path / "db"),
        )
        assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "wandb" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"train/loss" in run.read_bytes()
    with closing(sqlite3.connect(tmp_path / "db" / "alpaca.db")) as base:
        stored = [json.loads(row[0]) for row in base.execute("SELECT metrics FROM metrics")]
    shown = [line["train/loss"] for line in stored if "train/loss" in line]
    assert shown == pytest.approx(losses(usual), rel=1e-6)


def test_what_is_not_installed_is_said_at_once(tiny_model: Path, tmp_path: Path) -> None:
    for name, package in (("report_to", "trackio"), ("optim", "adamw_8bit")):
        done = train(*flags(tiny_model, tmp_path, **{name: package}))
        assert done.returncode == 2
        assert "pip install" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses_in_few_shapes(
    tiny_model: Path, usual: Path, tmp_path: Path
) -> None:
    changed = {
        "torch_compile": True,
        "max_steps": 3,
        "max_tokens_per_pack": 1024,
        "gradient_checkpointing": True,
    }
    done = train(*flags(tiny_model, tmp_path / "out", **changed), TORCH_LOGS="recompiles,dynamic")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "out")[0] == pytest.approx(losses(usual)[0], rel=1e-6)
    again = train(*flags(tiny_model, tmp_path / "eager", **{**changed, "torch_compile": False}))
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)
    assert "Recompiling function" in done.stderr  # or this test would not see them
    assert "segments" not in done.stderr  # none for the examples in a pack, a few for its length
    assert "create_symbol" not in done.stderr  # each length is compiled for itself
    assert done.stderr.count("Recompiling function") <= 24


@pytest.mark.slow
def test_eight_bit_moments_train_stop_and_go_on(
    tiny_model: Path, usual: Path, tmp_path: Path
) -> None:
    """Their state is small, close to fp32's result, and survives a checkpoint bit for bit."""
    changed = {"optim": "adamw_8bit", "max_steps": 8}
    whole = train(*flags(tiny_model, tmp_path / "whole", **changed), PYTHONPATH=str(APART))
    assert whole.returncode == 0, whole.stderr
    words = flags(tiny_model, tmp_path / "parts", **changed)
    job = subprocess.Popen(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(APART), "OMP_NUM_THREADS": "1"},
    )
    while not list((tmp_path / "parts").glob("checkpoint-*")):
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(120) == 143
    assert train(*words, PYTHONPATH=str(APART)).returncode == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    fp32 = train(*flags(tiny_model, tmp_path / "fp32", max_steps=8))
    assert fp32.returncode == 0
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)


def test_fsdp_config_is_read(tmp_path: Path) -> None:
    file = tmp_path / "fsdp.json"
    settings = {
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "fsdp_offload_params": True,
        "activation_checkpointing": True,
        "backward_prefetch": "backward_pre",
    }
    file.write_text(json.dumps(settings))
    for given in (str(file), json.dumps(settings)):
        read, notices = fsdp_config.apply(Arguments(fsdp_config=given))
        assert read.fsdp_transformer_layer_cls_to_wrap == "LlamaDecoderLayer"
        assert read.fsdp == "full_shard auto_wrap offload"
        assert read.gradient_checkpointing
        assert len(notices) == 1
        assert "backward_prefetch has no effect" in notices[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('{"activation_checkpoint": true}', "Did you mean activation_checkpointing?"),
        ("no/such.json", "there is no file no/such.json"),
        ("{", "is not JSON"),
    ],
)
def test_a_wrong_fsdp_config_is_explained(given: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        fsdp_config.apply(Arguments(fsdp_config=given))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--warmup_steps", "0.1"], "warmup_steps", 0.1),
        (["--warmup_steps", "7"], "warmup_steps", 7.0),
        (["--optim", "adamw_hf"], "optim", "adamw_hf"),
        (["--evaluation_strategy", "steps", "--eval_fraction", "0.1"], "eval_strategy", "steps"),
        (
            ["--load_best_model_at_end", "True", "--eval_strategy", "epoch", "--eval_fraction=0.1"],
            "save_best",
            True,
        ),
    ],
)
def test_old_and_new_spellings_are_read(words: list[str], field: str, value: object) -> None:
    read, notices = parse(words)
    assert getattr(read, field) == value
    assert not notices
