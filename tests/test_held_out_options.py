"""What a run does with its held-out examples: sample answers, the best weights, an early end."""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import ROOT, finish, lines, start, train, wait_until
from transformers import AutoModelForCausalLM

from alpaca import card, passport
from alpaca.errors import UserError
from alpaca.folder import load_tokenizer
from alpaca.prompt import render
from alpaca.recipe import steps
from alpaca.recipe.arguments import parse
from alpaca.recipe.progress import Progress
from alpaca.records import Record, read_records
from alpaca.tokens import Codec
from alpaca.training import answers, checkpoint, compatibility
from alpaca.web.runs import Run

TASKS, TOKENS = 3, 12
BEST, STOPPED = 8, 20  # the steps; on few examples the held-out loss soon rises again
GENERATIONS = [f"--eval_generations={TASKS}", f"--eval_generation_tokens={TOKENS}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Sixteen tasks to train on, twelve held out, of which the third has an input."""
    folder = tmp_path_factory.mktemp("data")
    tasks = (ROOT / "data/seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()
    for name, part in (("train", tasks[:16]), ("held", tasks[16:28])):
        (folder / f"{name}.jsonl").write_text("\n".join(part))
    held = folder / "held.jsonl"
    assert {bool(record.input) for record in read_records(held)[:TASKS]} == {False, True}
    return folder / "train.jsonl", held


def flags(model: Path, data: tuple[Path, Path], out: Path, *more: object) -> list[str]:
    given = {
        "model_name_or_path": model,
        "data_path": data[0],
        "eval_data_path": data[1],
        "output_dir": out,
        "max_steps": 28,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.005,
        "lr_scheduler_type": "constant",
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 13,
        "export_dtype": "fp32",
    }
    return [*(f"--{name}={value}" for name, value in given.items()), *map(str, more)]


def held_out_losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["eval_loss"] for line in lines(out) if "eval_loss" in line}


def without_times(out: Path) -> list[tuple[Any, ...]]:
    """Each step and evaluation, as far as it is computed from the weights."""
    names = ("step", "loss", "eval_loss", "grad_norm", "masters_changed", "tokens")
    wanted = [line for line in lines(out) if "loss" in line or "eval_loss" in line]
    return [tuple(line.get(name) for name in names) for line in wanted]


def result_of(out: Path) -> dict[str, Any]:
    found = passport.read(out)
    assert found is not None
    result: dict[str, Any] = found["result"]
    return result


@pytest.fixture(scope="module")
def plain(
    tiny_model: Path, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("plain") / "out"
    words = flags(tiny_model, data, out, "--save_strategy=no", "--max_steps=12")
    assert train(*words).returncode == 0
    return out


Stopped = tuple[Path, list[str], str]


@pytest.fixture(scope="module")
def stopped(
    tiny_model: Path, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Stopped:
    """A run with all options, which early stopping ends."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    more = ["--load_best_model_at_end", "True", "--early_stopping_patience=3"]
    more += ["--keep_last_checkpoint", "--report_to=tensorboard"]
    words = flags(tiny_model, data, out, *GENERATIONS, *more)
    done = train(*words)
    assert done.returncode == 0, done.stderr
    return out, words, done.stdout


def test_the_options_change_no_loss_and_no_gradient(plain: Path, stopped: Stopped) -> None:
    alone = without_times(plain)
    assert len(alone) == 12 + 1 + 3
    assert without_times(stopped[0])[: len(alone)] == alone


def greedy(folder: Path, records: list[Record]) -> list[dict[str, str]]:
    """The samples that transformers' own generation gives."""
    codec = Codec(load_tokenizer(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for record in records:
        ids = codec.prompts([render(record.instruction, record.input)])[0]
        whole = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=codec.eos,
            pad_token_id=codec.eos,
        )[0].tolist()
        answer = codec.decode(whole)[len(codec.decode(ids)) :]
        asked = [record.instruction, record.input] if record.input else [record.instruction]
        found.append({"prompt": "\n\n".join(asked), "answer": answer})
    return found


def samples(out: Path) -> dict[int, list[dict[str, str]]]:
    return {line["step"]: line["samples"] for line in lines(out) if "samples" in line}


def test_the_sample_answers_are_those_of_transformers_on_the_same_weights(
    tiny_model: Path, data: tuple[Path, Path], stopped: Stopped
) -> None:
    out, logged = stopped[0], samples(stopped[0])
    records = read_records(data[1])[:TASKS]
    assert list(logged) == list(held_out_losses(out)) == list(range(0, STOPPED + 1, 4))
    assert logged[0] == greedy(tiny_model, records)
    assert logged[BEST] == greedy(out, records)  # the folder holds the weights of that step
    assert len({sample["answer"] for step in logged.values() for sample in step}) > TASKS


def test_the_web_and_tensorboard_get_the_sample_answers(stopped: Stopped) -> None:
    out = stopped[0]
    seen = Run(out)
    seen.refresh()
    assert list(seen.samples)[-TASKS:] == [{"step": STOPPED, **s} for s in samples(out)[STOPPED]]
    assert seen.damaged == 0
    assert (seen.finished, seen.step, seen.total_steps) == (True, STOPPED, 28)
    [folder] = (out / "tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    shown = [name for name in events.Tags()["tensors"] if name.startswith("eval/samples/")]
    assert len(shown) == TASKS
    assert [event.step for event in events.Tensors(shown[0])] == list(samples(out))


def test_the_folder_holds_the_weights_with_the_lowest_held_out_loss(
    data: tuple[Path, Path], stopped: Stopped
) -> None:
    out, logged = stopped[0], held_out_losses(stopped[0])
    assert min((step for step in logged if step), key=lambda step: logged[step]) == BEST
    assert logged[STOPPED] > logged[BEST] + 0.01
    assert reference_loss(out, data[1]) == pytest.approx(logged[BEST], rel=1e-5)
    result = result_of(out)
    assert (result["best_step"], result["exported_step"], result["steps"]) == (BEST, BEST, STOPPED)
    assert result["eval_loss_best"] == logged[BEST]
    assert result["eval_loss_exported"] == pytest.approx(logged[BEST], rel=1e-6)
    assert f"step {BEST}, whose held-out loss of {logged[BEST]:.4f} was the lowest" in stopped[2]
    assert "warning" not in stopped[2]
    assert f"exported after step {BEST}" in (out / card.NAME).read_text()


def reference_loss(folder: Path, held_out: Path) -> float:
    """The mean loss of all answer tokens, computed by transformers example by example."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, targets = 0.0, 0
    for example in Codec(load_tokenizer(folder)).examples(read_records(held_out), 512):
        ids = torch.tensor(example.ids)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        found = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total += found[example.prompt_length - 1 :].sum().item()
        targets += example.targets
    return total / targets


def test_the_best_checkpoint_is_kept_beside_the_last(stopped: Stopped) -> None:
    kept = [checkpoint.step_of(path) for path in checkpoint.found(stopped[0])]
    assert kept == [BEST, STOPPED]


def test_an_early_end_says_why_and_is_complete(stopped: Stopped) -> None:
    out, words, said = stopped
    best = held_out_losses(out)[BEST]
    why = f"no held-out loss of the last 3 evaluation(s) was below the {best:.4f} of step {BEST}"
    assert why in said
    assert lines(out)[-1] == {"step": STOPPED, "stopped": why}
    assert result_of(out)["stopped"] == why
    assert why in (out / card.NAME).read_text()
    again = train(*words)
    assert again.returncode == 0, again.stderr
    assert "already holds the model of exactly this run" in again.stdout


@pytest.mark.slow
def test_an_export_that_failed_is_repeated_with_the_best_weights(
    tiny_model: Path, data: tuple[Path, Path], stopped: Stopped, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(stopped[0], out)
    for name in ("passport.json", "model.safetensors", "config.json"):
        (out / name).unlink()
    done = train(*stopped[1], f"--output_dir={out}")
    assert done.returncode == 0, done.stderr
    assert lines(out) == lines(stopped[0])
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, stopped[0]))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    times = {"seconds", "memory"}
    results = [result_of(folder).items() for folder in (out, stopped[0])]
    first, second = ({k: v for k, v in one if k not in times} for one in results)
    assert first == second


@pytest.mark.slow
def test_more_patience_continues_a_run_that_was_stopped(
    tiny_model: Path, data: tuple[Path, Path], stopped: Stopped, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(stopped[0], out)
    more = ["--early_stopping_patience=4", f"--output_dir={out}"]
    done = train(*stopped[1], *more)
    assert done.returncode == 0, done.stderr
    assert f"after step {STOPPED} with --early_stopping_patience 4 (was 3)" in done.stdout
    result = result_of(out)
    assert (result["steps"], result["exported_step"]) == (STOPPED + 4, BEST)
    # without the best checkpoint, what is left to compare is what comes after
    shutil.rmtree(out / f"checkpoint-{BEST}")
    (out / "passport.json").unlink()
    (out / "config.json").unlink()
    done = train(*stopped[1], *more)
    assert done.returncode == 0, done.stderr
    assert f"there is no checkpoint of step {BEST}, which had the lowest" in done.stdout
    assert result_of(out)["steps"] == result_of(out)["exported_step"] == 28


@pytest.fixture(scope="module")
def two_ranks(
    tiny_model: Path, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("two_ranks") / "out"
    finish([*two_rank_command(tiny_model, data, out), *GENERATIONS])
    return out


def two_rank_command(model: Path, data: tuple[Path, Path], out: Path) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py"]
    more = ["--gradient_accumulation_steps=1", "--save_best", "--early_stopping_patience=2"]
    return [sys.executable, *launcher, *flags(model, data, out, *more)]


def test_two_ranks_answer_stop_and_export_as_one_does(
    data: tuple[Path, Path], stopped: Stopped, two_ranks: Path
) -> None:
    records = read_records(data[1])[:TASKS]
    assert samples(two_ranks)[0] == samples(stopped[0])[0]
    assert samples(two_ranks)[BEST] == greedy(two_ranks, records)
    result = result_of(two_ranks)
    assert (result["exported_step"], result["steps"]) == (BEST, BEST + 2 * 4)
    best = held_out_losses(two_ranks)[BEST]
    assert reference_loss(two_ranks, data[1]) == pytest.approx(best, rel=1e-5)
    assert not checkpoint.found(two_ranks)


def test_a_killed_run_resumes_with_its_best_and_its_count(
    tiny_model: Path, data: tuple[Path, Path], two_ranks: Path, tmp_path: Path
) -> None:
    """Killed after one evaluation without a lower loss; and it writes no sample answers."""
    out = tmp_path / "out"
    words = two_rank_command(tiny_model, data, out)
    job = start(words)
    wait_until(lambda: (out / "checkpoint-13").exists(), job)
    for process in [*psutil.Process(job.pid).children(recursive=True), job]:
        process.kill()  # torchrun's ranks live in sessions of their own
    job.communicate()
    kept = [checkpoint.step_of(path) for path in checkpoint.found(out)]
    assert {BEST, 13} <= set(kept)
    finish(words)
    assert without_times(out) == without_times(two_ranks)
    assert [line for line in lines(out) if "stopped" in line] == [lines(two_ranks)[-1]]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, two_ranks))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert result_of(out)["exported_step"] == BEST


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_best_of_checkpoints_that_are_models_is_exported(
    bf16: bool, tiny_model: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    more = ["--save_best", "--save_only_model", "--learning_rate=0.01", "--max_steps=8"]
    more += [f"--bf16={bf16}", "--export_dtype=bf16", "--eval_steps=2", "--save_steps=7"]
    done = train(*flags(tiny_model, data, out, *more), ALPACA_CPU_BF16="1")
    assert done.returncode == 0, done.stderr
    result, logged = result_of(out), held_out_losses(out)
    best = result["exported_step"]
    assert best == min((step for step in logged if step), key=lambda step: logged[step])
    assert best < result["steps"]
    assert [checkpoint.step_of(path) for path in checkpoint.models(out)] == [best, 7]
    rounded = 1e-6 if bf16 else 1e-3  # a run in fp32 has digits that the export lacks
    assert result["eval_loss_exported"] == pytest.approx(logged[best], rel=rounded)
    ours, kept = (
        load_file(path / "model.safetensors") for path in (out, out / f"checkpoint-{best}")
    )
    assert all(ours[name].equal(kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["--eval_strategy=steps", "--eval_steps=28"], True),
        (["--eval_strategy=steps", "--eval_steps=27"], False),
        (["--eval_strategy=epoch"], True),  # of 32 steps
        (["--eval_strategy=epoch", "--gradient_accumulation_steps=16"], False),
    ],
)
def test_one_evaluation_is_nothing_to_choose_from(words: list[str], refused: bool) -> None:
    for given in ("--save_best", "--early_stopping_patience=2"):
        read, _ = parse([given, "--eval_fraction=0.1", "--max_steps=28", *words])
        schedule = steps.schedule(read, 32 * 64, world_size=2)
        if refused:
            with pytest.raises(UserError, match="the only one of this run is after the last of"):
                compatibility.check_schedule(read, schedule)
        else:
            compatibility.check_schedule(read, schedule)


def test_what_is_best_is_counted_evaluation_by_evaluation() -> None:
    progress, seen = Progress(), []
    for step, loss in enumerate([9.0, 5.0, math.nan, 4.0, 4.0, 6.0]):
        progress = dataclasses.replace(progress, steps=step).evaluated(loss)
        seen.append((progress.best_step, progress.evaluations_since_best))
    assert seen == [(None, 0), (1, 0), (1, 1), (3, 0), (3, 1), (3, 2)]
    assert (progress.eval_loss_before, progress.eval_loss_best) == (9.0, 4.0)
    assert progress.lacks_lower_loss(3) is None
    assert progress.lacks_lower_loss(0) is None
    assert "last 2 evaluation(s) was below the 4.0000 of step 3" in (
        progress.lacks_lower_loss(2) or ""
    )
    assert progress.without_evaluations().best_step is None


def test_a_stored_progress_of_an_earlier_version_is_read() -> None:
    names = ("best_step", "eval_loss_best", "evaluations_since_best", "stopped", "exported_step")
    held = {k: v for k, v in dataclasses.asdict(Progress(steps=3)).items() if k not in names}
    assert Progress(**json.loads(json.dumps({**held, "loss": 1.0}))).best_step is None


@pytest.mark.parametrize(
    ("lengths", "capacity", "ranks", "expected"),
    [
        ([5, 5, 5], 100, 1, [[0, 1, 2]]),
        ([5, 5, 5], 100, 2, [[0, 1], [2]]),
        ([5, 5, 5], 100, 4, [[0], [1], [2], []]),
        ([5, 5, 5, 20], 10, 1, [[0, 1], [2], [3]]),
        ([5, 5, 5, 20], 10, 2, [[0, 1], [2], [3], []]),
    ],
)
def test_each_rank_gets_as_many_packs_of_prompts(
    lengths: list[int], capacity: int, ranks: int, expected: list[list[int]]
) -> None:
    assert answers.packs(lengths, capacity, ranks) == expected
