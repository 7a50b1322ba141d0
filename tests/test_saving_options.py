"""Models instead of states, the last checkpoint kept or not, and a rank that hangs."""

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from training_runs import finish, losses, start, train, wait_until
from transformers import AutoModelForCausalLM

from alpaca import passport
from alpaca.training import checkpoint

STEPS = 8


def command(model: Path, out: Path, *more: object, ranks: int = 0) -> list[str]:
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    return [*launcher, "train.py", *flags(model, out, *more)]


def flags(model: Path, out: Path, *more: object) -> list[str]:
    given = {
        "model_name_or_path": model,
        "output_dir": out,
        "max_steps": STEPS,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "save_steps": 3,
    }
    return [*(f"--{name}={value}" for name, value in given.items()), *map(str, more)]


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, finish(command(tiny_model, out))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_the_last_checkpoint_goes_once_the_model_is_complete(finished: tuple[Path, str]) -> None:
    out, told = finished
    assert f"the model is complete, so checkpoint-{STEPS} was removed" in told
    assert not list(out.glob("*checkpoint-*"))
    assert passport.read(out) is not None


def test_more_epochs_without_a_checkpoint_are_explained(
    tiny_model: Path, finished: tuple[Path, str]
) -> None:
    out, _ = finished
    before = weights(out)
    done = train(*flags(tiny_model, out, "--max_steps=12"))
    assert done.returncode == 2
    assert "no checkpoint to continue from" in done.stderr
    assert f"steps: {STEPS} before, 12 now" in done.stderr
    assert "--keep_last_checkpoint True keeps the checkpoint next time" in done.stderr
    assert all(before[name].equal(value) for name, value in weights(out).items())


def test_with_a_higher_limit_the_checkpoints_before_the_last_stay(
    tiny_model: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    finish(command(tiny_model, out, "--save_total_limit=3"))
    assert [path.name for path in checkpoint.found(out)] == ["checkpoint-3", "checkpoint-6"]
    finish(command(tiny_model, out, "--max_steps=10", "--save_total_limit=3"))
    assert losses(out)[:STEPS] != losses(finished[0])  # the schedule is as long as the run
    assert losses(out)[:6] == losses(finished[0])[:6]


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_checkpoints_that_are_models_load_and_the_run_ends_as_it_would(
    tiny_model: Path, tmp_path: Path, ranks: int
) -> None:
    words = ["--save_only_model", "--save_total_limit=2", "--save_steps=2", "--fsdp=shard_grad_op"]
    out, whole = tmp_path / "out", tmp_path / "whole"
    finish(command(tiny_model, out, *words, ranks=ranks))
    assert not checkpoint.found(out)
    assert [path.name for path in checkpoint.models(out)] == ["checkpoint-4", "checkpoint-6"]
    assert not list(out.glob(".checkpoint-*"))
    finish(command(tiny_model, whole, "--fsdp=shard_grad_op", ranks=ranks))
    assert losses(out) == losses(whole)
    assert same(out, whole)
    early = out / "checkpoint-4"
    assert AutoModelForCausalLM.from_pretrained(early).num_parameters() > 0
    assert not same(early, out)
    told = passport.read(early)
    assert told is not None
    assert told["checkpoint"] == 4
    checked = finish([sys.executable, "-m", "alpaca", "verify", str(early)])
    assert "NOT checked" not in checked
    trained = train(*flags(early, tmp_path / "further"))
    assert trained.returncode == 0, trained.stderr


@pytest.mark.slow
def test_a_model_after_four_steps_is_that_of_a_run_stopped_there(
    tiny_model: Path, tmp_path: Path
) -> None:
    """So the export of the whole run has not disturbed it, nor has the schedule's length."""
    shared = ["--lr_scheduler_type=constant", "--warmup_steps=0"]
    finish(command(tiny_model, tmp_path / "short", "--max_steps=4", *shared))
    words = ["--save_only_model", "--save_steps=4", *shared]
    finish(command(tiny_model, tmp_path / "long", *words))
    assert same(tmp_path / "short", tmp_path / "long" / "checkpoint-4")


def test_models_do_not_push_out_the_state_to_resume_from(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--lr_scheduler_type=constant", "--save_steps=2"]
    job = start(command(tiny_model, out, "--max_steps=500", *words))
    wait_until(lambda: bool(checkpoint.found(out)), job)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=120)
    (state,) = checkpoint.found(out)
    more = f"--max_steps={checkpoint.step_of(state) + 5}"
    finish(command(tiny_model, out, more, *words, "--save_only_model", "--keep_last_checkpoint"))
    assert checkpoint.found(out) == [state]
    assert len(checkpoint.models(out)) == 1


def test_a_run_of_models_that_is_stopped_says_that_it_starts_over(
    tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = command(tiny_model, out, "--save_only_model", "--max_steps=500")
    job = start(words)
    wait_until(lambda: bool(checkpoint.models(out)), job)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 143, output
    (kept,) = checkpoint.models(out)
    assert f"its model is {kept.name}, from which no run resumes" in output
    other = train(*flags(tiny_model, out, "--save_only_model", "--max_steps=500", "--seed=1"))
    assert other.returncode == 2
    assert f"{kept} belongs to another run" in other.stderr
    assert "seed: 42 before, 1 now" in other.stderr
    again = start(words)
    wait_until(lambda: checkpoint.models(out) != [kept], again)
    assert [path.name for path in checkpoint.models(out)] == ["checkpoint-3"]  # the newer one
    os.killpg(again.pid, signal.SIGKILL)
    again.communicate()
    done = train(*flags(tiny_model, out, "--overwrite_output_dir"))
    assert done.returncode == 0, done.stderr
    assert not checkpoint.models(out)


def test_a_rank_that_hangs_ends_the_run_with_a_sentence(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = start(command(tiny_model, out, "--max_steps=500", "--ddp_timeout=5", ranks=2))
    wait_until(lambda: bool(checkpoint.found(out)), job)
    ranks = {one.environ()["RANK"]: one for one in psutil.Process(job.pid).children()}
    ranks["1"].suspend()
    try:
        psutil.wait_procs([ranks["0"]], timeout=60)
    finally:
        ranks["1"].resume()
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 1, output
    assert "Another rank has not answered within --ddp_timeout" in output
    assert checkpoint.found(out)


PATIENT = """
import time, torch
from alpaca.recipe.arguments import ShardingFlags
from alpaca.training import sharding
from alpaca.training.rendezvous import on_every_rank, on_first_rank

sharding.start(torch.device("cpu"), ShardingFlags(ddp_timeout=2))
on_first_rank(lambda: time.sleep(5))
ranks = on_every_rank(lambda: torch.distributed.get_rank())
print(f"waited for {ranks}", flush=True)  # one piece: two ranks write to one pipe
torch.distributed.destroy_process_group()
"""


def test_a_rank_that_works_alone_may_take_longer(tmp_path: Path) -> None:
    """As rank 0 does when it hashes an export on a slow disk."""
    (tmp_path / "patient.py").write_text(PATIENT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    told = finish([*launcher, "--nproc_per_node=2", str(tmp_path / "patient.py")])
    assert told.count("waited for [0, 1]") == 2
