"""A run that is interrupted, however, ends as if it had not been."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from training_runs import ROOT, distance, finish, lines, losses, start, wait_until
from transformers import AutoModelForCausalLM

from alpaca import passport, verify
from alpaca.training import checkpoint

STEPS = 12


def command(tiny_model: Path, out: Path, *changed: object, ranks: int = 0) -> list[str]:
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    flags = {
        "model_name_or_path": tiny_model,
        "output_dir": out,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "eval_fraction": 0.05,
        "save_steps": 3,
        "save_total_limit": 2,
        "keep_last_checkpoint": True,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    return [*launcher, "train.py", *words, *map(str, changed)]


def logged(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_text().count('"loss"') if log.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    finish(command(tiny_model, out))
    assert len(losses(out)) == STEPS
    return out


def assert_same_model(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_checkpoints_are_kept_to_the_limit(undisturbed: Path) -> None:
    assert [path.name for path in checkpoint.found(undisturbed)] == [
        "checkpoint-9",
        "checkpoint-12",
    ]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_the_same_command_goes_on_bit_for_bit(
    tiny_model: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "out"
    words = command(tiny_model, out, "--save_strategy=no")
    job = start(words)
    wait_until(lambda: logged(out) >= 2, job)
    job.send_signal(number)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == code, output
    assert "run the same command again to resume" in output
    assert "Traceback" not in output
    saved = checkpoint.found(out)
    assert len(saved) == 1
    assert 2 <= int(saved[0].name.removeprefix("checkpoint-")) < STEPS
    finish(words)
    assert losses(out) == losses(undisturbed)
    assert_same_model(out, undisturbed)


def kill_once_and_finish(tiny_model: Path, out: Path, chance: random.Random) -> None:
    words = command(tiny_model, out)
    job = start(words)
    target = chance.randrange(0, STEPS)
    wait_until(lambda: logged(out) >= target, job)
    time.sleep(chance.random() * 0.2)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    finish(words)


def test_a_killed_run_goes_on_bit_for_bit(
    tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    kill_once_and_finish(tiny_model, tmp_path / "out", random.Random(3))
    assert losses(tmp_path / "out") == losses(undisturbed)
    assert_same_model(tmp_path / "out", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moment_goes_on_bit_for_bit(
    tiny_model: Path, undisturbed: Path, tmp_path: Path, seed: int
) -> None:
    kill_once_and_finish(tiny_model, tmp_path / "out", random.Random(seed))
    assert losses(tmp_path / "out") == losses(undisturbed)
    assert_same_model(tmp_path / "out", undisturbed)


def pause_within_a_save(job: "subprocess.Popen[str]", out: Path) -> None:
    """Bring the job to a stand while a checkpoint is being written."""

    def writing() -> bool:
        return bool(list(out.glob(".checkpoint-*.partial")))

    process = psutil.Process(job.pid)
    while True:
        assert job.poll() is None, job.communicate()[0]
        if writing():
            job.send_signal(signal.SIGSTOP)
            while process.status() != psutil.STATUS_STOPPED:
                time.sleep(0.001)
            if writing():
                return
            job.send_signal(signal.SIGCONT)
        time.sleep(0.001)


def test_a_run_killed_within_a_save_goes_on_bit_for_bit(
    tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = command(tiny_model, out)
    job = start(words)
    pause_within_a_save(job, out)
    job.kill()
    job.communicate()
    assert list(out.glob(".checkpoint-*.partial"))
    finish(words)
    assert not list(out.glob(".checkpoint-*"))
    assert losses(out) == losses(undisturbed)
    assert_same_model(out, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moment_of_a_save_goes_on_bit_for_bit(
    tiny_model: Path, undisturbed: Path, tmp_path: Path, seed: int
) -> None:
    """Training goes on meanwhile, so the kill comes at any moment of a step too."""
    out, choose = tmp_path / "out", random.Random(seed)
    words = command(tiny_model, out)
    job = start(words)
    saved = choose.randrange(3)
    wait_until(lambda: len(checkpoint.found(out)) >= min(saved, 2), job)
    wait_until(lambda: any(out.glob(".checkpoint-*.partial")), job)
    time.sleep(choose.random() * 0.1)
    job.kill()
    job.communicate()
    finish(words)
    assert not list(out.glob(".checkpoint-*"))
    assert losses(out) == losses(undisturbed)
    assert_same_model(out, undisturbed)


def test_a_signal_to_stop_within_a_save_stops_the_run(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = start(command(tiny_model, out, "--save_steps=1"))
    pause_within_a_save(job, out)
    job.send_signal(signal.SIGTERM)
    job.send_signal(signal.SIGCONT)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 143, output
    assert len(losses(out)) < STEPS


def test_usr1_saves_and_the_run_goes_on(
    tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job = start(command(tiny_model, out, "--save_strategy=no"))
    wait_until(lambda: logged(out) >= 1, job)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    assert len(checkpoint.found(out)) == 1
    assert_same_model(out, undisturbed)


def test_the_last_step_is_saved_whatever_the_period(
    tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """So a run that fails in its export goes on from there, without a step more."""
    out = tmp_path / "out"
    words = command(tiny_model, out, "--save_steps=100")
    output = finish(words)
    assert f"no checkpoint is written before the last of {STEPS} steps" in output
    assert [path.name for path in checkpoint.found(out)] == [f"checkpoint-{STEPS}"]
    for path in [out / "passport.json", *out.glob("model*.safetensors"), out / "config.json"]:
        path.unlink()  # as if the export had failed
    assert losses(out) == losses(undisturbed)
    finish(words)
    assert losses(out) == losses(undisturbed)
    assert_same_model(out, undisturbed)


def stopped_early(words: list[str], out: Path) -> int:
    """Run until there is a checkpoint, stop with SIGTERM; returns the step it was saved at."""
    job = start(words)
    wait_until(lambda: bool(checkpoint.found(out)), job)
    for process in [*psutil.Process(job.pid).children(recursive=True), job]:
        process.send_signal(signal.SIGTERM)
    job.communicate(timeout=120)
    return int(checkpoint.found(out)[-1].name.removeprefix("checkpoint-"))


def refused(words: list[str]) -> str:
    job = start(words)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 2, output
    assert "Traceback" not in output
    return output


def test_another_run_is_refused_and_the_difference_is_named(
    tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped_early(command(tiny_model, out), out)
    output = refused(command(tiny_model, out, "--weight_decay=0.1"))
    assert "weight_decay: 0.0 before, 0.1 now" in output
    assert "--overwrite_output_dir" in output
    finish(command(tiny_model, out, "--weight_decay=0.1", "--overwrite_output_dir"))


def test_a_lower_learning_rate_resumes_and_the_passport_says_since_when(
    tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    step = stopped_early(command(tiny_model, out), out)
    before = losses(out)[:step]
    output = finish(command(tiny_model, out, "--learning_rate=0.002"))
    told = f"resumed after step {step} with --learning_rate 0.002 (was 0.01)"
    assert output.count(told) == 1
    rates = [line["lr"] for line in lines(out) if "lr" in line]
    first, second = max(rates[:step]), max(rates[step:])
    assert (first, second < 0.002) == (0.01, True)
    assert losses(out)[:step] == before
    held = passport.read(out)
    assert held is not None
    assert held["changes"] == [{"step": step, "name": "peak", "old": 0.01, "new": 0.002}]
    assert held["run"]["peak"] == 0.002
    again = finish(command(tiny_model, out, "--learning_rate=0.002"))
    assert "already holds the model of exactly this run" in again


def test_a_run_whose_loss_is_no_number_resumes_as_it_is_told_to(
    tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped_early(command(tiny_model, out), out)
    kept = checkpoint.found(out)[-1].name
    output = refused(command(tiny_model, out, "--learning_rate=1e30", "--save_steps=100"))
    assert "Lower --learning_rate and run the same command again" in output
    assert checkpoint.found(out)[-1].name == kept
    output = finish(command(tiny_model, out, "--learning_rate=1e-3"))
    assert "--learning_rate 0.001 (was 0.01)" in output
    assert all(math.isfinite(loss) for loss in losses(out))


def test_a_finished_run_takes_more_epochs(
    tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    words = command(tiny_model, out, "--max_steps=15")
    job = start(words)
    wait_until(lambda: logged(out) > STEPS, job)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 143, output
    assert f"resumed after step {STEPS} with steps 15 (was {STEPS})" in output
    assert verify.run(verify.parser().parse_args([str(out)])) is None  # the shorter run's model
    output = finish(words)
    assert "(was" not in output  # said once, when it changed
    assert losses(out)[:STEPS] == losses(undisturbed)
    assert len(losses(out)) == 15
    held = passport.read(out)
    assert held is not None
    assert [change["name"] for change in held["changes"]] == ["steps"]
    assert held["result"]["steps"] == 15


def test_what_is_finished_is_not_relabelled(
    tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Without a step left, another learning rate would change the passport and no weight."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    output = refused(command(tiny_model, out, "--learning_rate=0.002"))
    assert "already holds another model" in output
    assert "--learning_rate: 0.01 before, 0.002 now" in output
    (out / "passport.json").unlink()
    (out / "config.json").unlink()
    output = refused(command(tiny_model, out, "--max_steps=10"))
    assert "is at or beyond the last of 10 steps" in output


def test_other_held_out_data_starts_its_own_comparison(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = command(tiny_model, out, "--eval_fraction=0")
    data = tmp_path / "held_out.json"
    records = json.loads(json.dumps([{"instruction": "Say yes.", "output": "Yes."}] * 3))
    data.write_text(json.dumps(records))
    stopped_early([*words, f"--eval_data_path={data}"], out)
    records[0]["output"] = "Indeed."
    data.write_text(json.dumps(records))
    output = finish([*words, f"--eval_data_path={data}"])
    assert "--eval_data_path (other examples, or none)" in output
    held = passport.read(out)
    assert held is not None
    assert held["result"]["eval_loss_before"] is None
    assert held["result"]["eval_loss_after"] is not None


@pytest.mark.parametrize(("first", "second"), [(2, 0), (0, 2)])
def test_the_same_command_on_another_number_of_ranks_keeps_the_batch(
    tiny_model: Path, undisturbed: Path, tmp_path: Path, first: int, second: int
) -> None:
    out = tmp_path / "out"
    flags = [f"--gradient_accumulation_steps={1 if first else 2}"]
    stopped_early(command(tiny_model, out, *flags, ranks=first), out)
    output = finish(command(tiny_model, out, *flags, ranks=second))
    now, often = (2, 1) if second else (1, 2)
    assert f"{now} rank(s), {max(1, first)} before: --gradient_accumulation_steps {often}" in output
    assert "keeps 8 examples per step" in output
    assert losses(out) == pytest.approx(losses(undisturbed), rel=1e-5)
    assert distance(out, undisturbed, tmp_path) < 1e-5
    again = finish(command(tiny_model, out, *flags, ranks=second))
    assert "already holds the model of exactly this run" in again


def test_a_batch_that_the_ranks_cannot_keep_names_the_flags_that_do(
    tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    (out / "passport.json").unlink()
    (out / "config.json").unlink()
    flags = ["--per_device_train_batch_size=8", "--gradient_accumulation_steps=1"]
    job = start(command(tiny_model, out, *flags, ranks=2))
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 1  # torchrun's own
    assert "Give --per_device_train_batch_size 4 --gradient_accumulation_steps 1" in output


def command_of_2023(model: Path, data: Path, out: Path, *more: object) -> list[str]:
    """As published, for two processes; flags given later win."""
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port=29292",
        "train.py",
        "--model_name_or_path",
        model,
        "--tokenizer_name_or_path",
        model,
        "--data_path",
        data,
        "--bf16",
        "True",
        "--output_dir",
        out,
        "--num_train_epochs",
        "3",
        "--per_device_train_batch_size",
        "4",
        "--per_device_eval_batch_size",
        "4",
        "--gradient_accumulation_steps",
        "8",
        "--evaluation_strategy",
        "no",
        "--save_strategy",
        "steps",
        "--save_steps",
        "2000",
        "--save_total_limit",
        "1",
        "--learning_rate",
        "2e-5",
        "--weight_decay",
        "0.",
        "--warmup_ratio",
        "0.03",
        "--lr_scheduler_type",
        "cosine",
        "--logging_steps",
        "1",
        "--fsdp",
        "full_shard auto_wrap",
        "--fsdp_transformer_layer_cls_to_wrap",
        "LLaMADecoderLayer",
        "--tf32",
        "True",
    ]
    return [str(word) for word in [*words, *more]]


def kill_after_a_checkpoint(words: list[str], out: Path) -> None:
    job = start(words)
    wait_until(lambda: bool(checkpoint.found(out)), job)
    for process in [*psutil.Process(job.pid).children(recursive=True), job]:
        process.kill()  # torchrun's ranks live in sessions of their own
    job.communicate()


def test_the_command_of_2023_resumes_on_another_number_of_ranks(
    tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    changed = [
        "--bf16",
        "False",
        "--gradient_accumulation_steps",
        "1",
        "--learning_rate",
        "0.01",
        "--save_steps",
        "3",
        "--max_steps",
        STEPS,
        "--eval_fraction",
        "0.05",
    ]
    data = ROOT / "data/seed_tasks.jsonl"
    kill_after_a_checkpoint(command_of_2023(tiny_model, data, out, *changed), out)
    output = finish(command(tiny_model, out, "--save_total_limit=1"))  # one rank, twice the batches
    assert f"model              {out}" in output
    assert distance(out, undisturbed, tmp_path) < 1e-5
    assert losses(out) == pytest.approx(losses(undisturbed), rel=1e-5)
    assert losses(out)[:3] == pytest.approx(losses(undisturbed)[:3], rel=1e-6)


def test_the_command_of_2023_trains_the_demo_model_is_killed_resumes_and_exports(
    smollm: Path, tmp_path: Path
) -> None:
    """The published command as it is, on 16 examples: three epochs are three steps."""
    data, out = tmp_path / "alpaca_data.json", tmp_path / "alpaca_out"
    records = [
        {"instruction": f"How much is {a} plus 2?", "input": "", "output": f"It is {a + 2}."}
        for a in range(15)
    ]
    records.append({"instruction": "Wait.", "input": "", "output": ""})  # as in the published data
    data.write_text(json.dumps(records))
    words = command_of_2023(smollm, data, out, "--save_steps", "1")
    kill_after_a_checkpoint(words, out)
    done = len(losses(out))
    assert 1 <= done < 3
    output = finish(words)
    assert "1 example(s) have an empty output and teach to answer with nothing" in output
    assert f"model              {out}" in output
    first, _, last = losses(out)
    assert last < first
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


@pytest.mark.parametrize(
    "fsdp", ["shard_grad_op", "hybrid_shard auto_wrap", "no_shard", "full_shard offload"]
)
def test_every_way_to_shard_gives_the_same_losses(
    tiny_model: Path, undisturbed: Path, tmp_path: Path, fsdp: str
) -> None:
    out = tmp_path / "out"
    flags = [f"--fsdp={fsdp}", "--gradient_accumulation_steps=1", "--save_strategy=no"]
    finish(command(tiny_model, out, *flags, ranks=2))
    assert losses(out) == pytest.approx(losses(undisturbed), rel=1e-4)
    assert losses(out)[:3] == pytest.approx(losses(undisturbed)[:3], rel=1e-6)
