"""In bf16 the recipe learns what it learns in fp32, and the folder holds what the run reports.

The tests compute in bf16 whatever the processor is fast at (ALPACA_CPU_BF16=1).
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import set_eos
from training_runs import ROOT, lines, losses, master_weights, start, train, wait_until
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from alpaca import passport
from alpaca.training import checkpoint
from alpaca.training.updates import Counts, UpdateSample, UpdateWatch

BF16 = {"ALPACA_CPU_BF16": "1"}
WAYS = {
    "fp32": ["--bf16", "False"],
    "plain": ["--bf16", "True", "--dither_masters", "False"],
    "dithered": ["--bf16", "True"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, bpe: PreTrainedTokenizerBase) -> Path:
    """A model whose weights are bf16 numbers, as large as a trained model's."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "llama-bf16"
    config = LlamaConfig(
        vocab_size=len(bpe),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,
    )
    set_eos(config, bpe)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    bpe.save_pretrained(folder)
    return folder


def flags(base: Path, out: Path, *more: object) -> list[str]:
    words = [
        "--model_name_or_path",
        base,
        "--output_dir",
        out,
        "--eval_fraction",
        0.15,
        "--per_device_train_batch_size",
        4,
        "--gradient_accumulation_steps",
        2,
        "--max_steps",
        50,
        "--learning_rate",
        1e-5,
        "--keep_last_checkpoint",
        *more,
    ]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """The same 50 steps three ways: the folder and the output of each."""
    made = {}
    for way, words in WAYS.items():
        out = tmp_path_factory.mktemp("runs") / way
        done = train(*flags(base, out, *words), **BF16)
        assert done.returncode == 0, done.stderr
        made[way] = (out, done.stdout)
    return made


def result(out: Path) -> dict[str, float]:
    found = passport.read(out)
    assert found is not None
    return dict(found["result"])


def learned(out: Path) -> float:
    """How far the held-out loss of the exported folder lies below the base model's."""
    told = result(out)
    return told["eval_loss_before"] - told["eval_loss_exported"]


def test_dithered_masters_learn_what_fp32_learns_and_plain_ones_do_not(
    runs: dict[str, tuple[Path, str]],
) -> None:
    fp32, plain, dithered = (learned(runs[way][0]) for way in ("fp32", "plain", "dithered"))
    assert fp32 > 0.01
    assert 0.9 < dithered / fp32 < 1.1
    assert plain / fp32 < 0.7


@pytest.mark.slow
def test_with_eight_bit_moments_and_weight_decay_as_much_is_learned(
    base: Path, tmp_path: Path
) -> None:
    more = ["--optim", "adamw_8bit", "--weight_decay", 0.1]
    apart = {"PYTHONPATH": str(ROOT / ".venv/apart")}
    for way, words in WAYS.items():
        done = train(*flags(base, tmp_path / way, *words, *more), **BF16, **apart)
        assert done.returncode == 0, done.stderr
    fp32, plain, dithered = (learned(tmp_path / way) for way in ("fp32", "plain", "dithered"))
    assert 0.9 < dithered / fp32 < 1.1
    assert plain / fp32 < 0.7


@pytest.mark.slow
def test_on_a_real_model_dithered_masters_learn_what_fp32_learns(
    smollm: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "bench/precision.py",
        "--model",
        smollm,
        "--steps",
        "12",
        "--rates",
        "2e-5",
        "--ways",
        "fp32,plain,dithered",
        "--batch",
        "2",
        "--held_out",
        "24",
        "--results",
        tmp_path / "cells.jsonl",
    ]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=True
    )
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["fp32_decrease"] > 0.02
    assert 0.9 < row["dithered"] < 1.1
    assert row["plain"] < 0.7  # after 50 steps they have caught up to 0.85


def test_the_first_step_is_that_of_the_base_model_bit_for_bit(
    runs: dict[str, tuple[Path, str]],
) -> None:
    plain, dithered = (lines(runs[way][0]) for way in ("plain", "dithered"))
    assert dithered[0] == plain[0]  # the held-out loss before the first step
    assert dithered[1]["loss"] == plain[1]["loss"]
    assert dithered[1]["grad_norm"] == plain[1]["grad_norm"]
    assert dithered[3]["loss"] != plain[3]["loss"]


@pytest.mark.parametrize("way", WAYS)
def test_the_folder_has_the_loss_that_the_run_reports(
    runs: dict[str, tuple[Path, str]], way: str
) -> None:
    out, output = runs[way]
    told = result(out)
    assert abs(told["eval_loss_exported"] - told["eval_loss_after"]) < 0.005
    assert f"{told['eval_loss_exported']:.4f} in the exported folder" in output
    assert "the held-out loss of the exported folder is" not in output
    found = passport.read(out)
    assert found is not None
    rounding = "stochastic" if way == "fp32" else "nearest"
    assert found["export"] == {"dtype": "bf16", "rounding": rounding}
    if way != "fp32":  # the exported weights are those of the last forward pass
        assert told["eval_loss_exported"] == told["eval_loss_after"]


def test_the_log_shows_how_many_weights_change_beside_how_many_should(
    runs: dict[str, tuple[Path, str]],
) -> None:
    def columns(way: str) -> tuple[float, float, float]:
        steps = [line for line in lines(runs[way][0]) if "loss" in line][1:11]
        names = ("masters_changed", "weights_changed", "weights_due")
        masters, changed, due = (sum(line[name] for line in steps) for name in names)
        return masters / len(steps), changed / len(steps), due / len(steps)

    masters, changed, due = columns("dithered")
    assert masters > 0.9
    assert changed == pytest.approx(due, rel=0.05)
    masters, changed, due = columns("plain")
    assert masters > 0.9
    assert changed < 0.85 * due
    masters, changed, _ = columns("fp32")
    assert masters == changed


def test_a_run_whose_updates_drown_in_rounding_is_told_so(
    runs: dict[str, tuple[Path, str]],
) -> None:
    said = "of the small updates of the last 10 steps from the forward pass; --dither_masters True"
    assert said in runs["plain"][1]
    assert runs["plain"][1].count(said) == 1
    assert said not in runs["dithered"][1]
    assert said not in runs["fp32"][1]


def test_updates_too_small_even_for_fp32_are_told() -> None:
    watch = UpdateWatch(torch.bfloat16)
    still = Counts(1000.0, 5.0, 0.0, 0.0, 0.0, 0.0)
    told = [watch.warning(still) for _ in range(12)]
    assert told[:9] == [None] * 9
    assert told[9] is not None
    assert "0.50% of the fp32 weights changed" in told[9]
    assert told[10:] == [None, None]


def test_the_sample_counts_what_changed() -> None:
    module = torch.nn.Linear(400, 500, bias=False)
    torch.nn.init.constant_(module.weight, 1.0)
    sample = UpdateSample(module, torch.bfloat16)
    with torch.no_grad():
        module.weight[:250] += 0.0078125  # one bf16 step at 1
        module.weight[250:] += 0.001
    counts = Counts(*sample.count().tolist())
    assert counts.sampled > 60_000
    assert counts.masters == counts.sampled
    assert counts.computed / counts.sampled == pytest.approx(0.5, abs=0.01)
    assert counts.due / counts.sampled == pytest.approx(0.5 + 0.5 * 0.128, abs=0.01)
    assert counts.small_computed == 0
    assert counts.small_due / counts.sampled == pytest.approx(0.5 * 0.128, abs=0.01)
    assert Counts(*sample.count().tolist()).masters == 0


@pytest.fixture(scope="module")
def start_masters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The dithered masters before any update."""
    return untouched(base, tmp_path_factory.mktemp("one"))


def untouched(base: Path, folder: Path, *more: object, ranks: int = 0) -> dict[str, torch.Tensor]:
    words = ["--bf16", "True", "--learning_rate", 0, "--max_steps", 1, "--eval_fraction", 0, *more]
    done = train(*flags(base, folder / "out", *words), ranks=ranks, **BF16)
    assert done.returncode == 0, done.stderr
    return master_weights(folder / "out", folder)


def test_masters_before_the_first_update_round_to_the_base_weights(
    base: Path, start_masters: dict[str, torch.Tensor]
) -> None:
    held = load_file(base / "model.safetensors")
    for name, master in start_masters.items():
        stored = held[name.removeprefix("model.")]
        assert master.bfloat16().equal(stored)
        assert not master.equal(stored.float())


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, ["--gradient_accumulation_steps", 1]),
        (0, ["--fsdp", "full_shard offload"]),
        pytest.param(
            4,
            ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["2 ranks", "offload", "4 ranks"],
)
def test_masters_are_the_same_on_any_number_of_ranks(
    base: Path,
    start_masters: dict[str, torch.Tensor],
    tmp_path: Path,
    ranks: int,
    more: list[object],
) -> None:
    other = untouched(base, tmp_path, *more, ranks=ranks)
    assert other.keys() == start_masters.keys()
    assert all(other[name].equal(start_masters[name]) for name in other)


def test_a_dithered_run_stopped_and_resumed_ends_bit_for_bit_as_one_that_was_not(
    base: Path, runs: dict[str, tuple[Path, str]], tmp_path: Path
) -> None:
    undisturbed, _ = runs["dithered"]
    out = tmp_path / "out"
    words = flags(base, out, *WAYS["dithered"])
    job = start(["env", "ALPACA_CPU_BF16=1", sys.executable, "train.py", *words])
    wait_until(lambda: (out / "log.jsonl").exists() and len(lines(out)) > 20, job)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 143, output
    assert 0 < int(checkpoint.found(out)[-1].name.removeprefix("checkpoint-")) < 50
    plain = train(*words, "--dither_masters", "False", **BF16)
    assert plain.returncode == 2
    assert "dither_masters: True before, None now" in plain.stderr
    assert train(*words, **BF16).returncode == 0
    assert losses(out) == losses(undisturbed)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, undisturbed))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_an_export_in_another_type_loads_in_it_with_the_runs_loss(
    base: Path, runs: dict[str, tuple[Path, str]], tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    out = tmp_path / "out"
    shutil.copytree(runs["dithered"][0], out)
    words = flags(base, out, *WAYS["dithered"], "--export_dtype", name)
    refused = train(*words, **BF16)
    assert refused.returncode == 2  # the folder holds the same run's model in another type
    done = train(*words, "--overwrite_output_dir", **BF16)
    assert done.returncode == 0, done.stderr
    assert losses(out) == losses(runs["dithered"][0])  # resumed at its last step
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == dtype
    masters = master_weights(out, tmp_path)
    for key, value in model.state_dict().items():
        assert value.equal(masters[f"model.{key}"].to(dtype))
    told = result(out)
    assert told["eval_loss_exported"] == pytest.approx(told["eval_loss_after"], abs=0.005)
    again = train(*words, **BF16)
    assert "already holds the model of exactly this run" in again.stdout


@pytest.mark.parametrize("how", ["no_shard", "shard_grad_op"])
def test_an_fp32_export_holds_the_masters_however_they_are_sharded(
    base: Path, tmp_path: Path, how: str
) -> None:
    words = [
        *WAYS["dithered"],
        "--export_dtype",
        "fp32",
        "--fsdp",
        how,
        "--max_steps",
        3,
        "--eval_fraction",
        0.02,
    ]
    done = train(*flags(base, tmp_path / "out", *words), **BF16)
    assert done.returncode == 0, done.stderr
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, master in master_weights(tmp_path / "out", tmp_path).items():
        assert exported[name.removeprefix("model.")].equal(master)
        assert not master.bfloat16().float().equal(master)


def test_weights_beyond_fp16_are_refused_before_training(base: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] = 70000.0
    model.save_pretrained(big)
    for path in base.glob("tokenizer*"):
        (big / path.name).write_bytes(path.read_bytes())
    done = train(*flags(big, tmp_path / "out", "--export_dtype", "fp16"))
    assert done.returncode == 2
    assert "embed_tokens.weight holds 70144; the largest number of fp16 is 65504" in done.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert json.loads((big / "config.json").read_text())["dtype"] == "bfloat16"
