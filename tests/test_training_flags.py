"""Flags that cannot work, alone or with the model, are refused before anything starts."""

import json
import re
import shutil
from pathlib import Path

import pytest
from training_runs import lines, train
from transformers import AutoConfig, PreTrainedTokenizerBase

from alpaca.errors import UserError
from alpaca.folder import load_tokenizer
from alpaca.recipe import rules
from alpaca.recipe.arguments import Arguments, check_packages, parse
from alpaca.training import compatibility


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed=-1"], "--seed must not be negative"),
        (["--learning_rate=-1e-5"], "--learning_rate must not be negative"),
        (["--max_grad_norm=-1"], "--max_grad_norm must not be negative"),
        (["--warmup_ratio=1.5"], "--warmup_ratio must be in"),
        (["--num_train_epochs=nan"], "--num_train_epochs must be a finite number"),
        (["--learning_rate=inf"], "--learning_rate must be a finite number"),
        (["--eval_strategy=epoch"], "there is nothing to evaluate on"),
        (["--eval_generations=3"], "--eval_generations 3: there is nothing to evaluate on"),
        (["--eval_generations=-1"], "--eval_generations must not be negative"),
        (["--eval_generation_tokens=0"], "--eval_generation_tokens must be at least 1"),
        (["--save_best"], "--save_best True: there is nothing to evaluate on"),
        (["--save_best", "--eval_fraction=0.1"], "compares evaluations while training"),
        (["--early_stopping_patience=-1"], "--early_stopping_patience must not be negative"),
        (
            ["--early_stopping_patience=2", "--eval_fraction=0.1"],
            "--early_stopping_patience 2 compares evaluations while training, and --eval_strategy "
            "no has none",
        ),
    ],
)
def test_values_that_cannot_work_are_refused(words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        parse(words)


@pytest.mark.parametrize(
    ("words", "value"), [([], None), (["--bf16"], True), (["--bf16", "False"], False)]
)
def test_whether_bf16_was_asked_for_or_refused_is_known(
    words: list[str], value: bool | None
) -> None:
    assert parse(words)[0].bf16 is value


@pytest.mark.parametrize(
    ("wanted", "fast", "gpu", "expected"),
    [
        (None, True, True, True),
        (None, False, True, False),  # a GPU before Ampere
        (None, True, False, False),
        (True, True, False, True),
        (True, False, True, False),
        (False, True, True, False),
    ],
)
def test_gpus_compute_in_bf16_unless_told_otherwise_and_cpus_when_told(
    wanted: bool | None, fast: bool, gpu: bool, expected: bool
) -> None:
    assert rules.computes_bf16(wanted, fast=fast, cuda=gpu) is expected


def test_a_missing_package_stops_training_and_no_plan() -> None:
    arguments, _ = parse(["--report_to", "trackio"])  # as `python -m alpaca plan` reads it
    with pytest.raises(UserError, match=r"trackio.\n  pip install -e '.\[report\]'"):
        check_packages(arguments)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(
    tiny_model: Path, bpe: PreTrainedTokenizerBase
) -> None:
    larger = load_tokenizer(tiny_model)
    arguments = Arguments(model_name_or_path=tiny_model)
    compatibility.check(arguments, larger)
    larger.add_tokens(["a token that the model has no row for"])
    with pytest.raises(UserError, match="has only 1024"):
        compatibility.check(arguments, larger)


def test_another_models_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path)
    same = Arguments(model_name_or_path=tiny_model, tokenizer_name_or_path=tmp_path)
    compatibility.check(same, load_tokenizer(tmp_path))
    definition = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    ids = definition["model"]["vocab"]
    ids["Ġthe"], ids["Ġis"] = ids["Ġis"], ids["Ġthe"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    with pytest.raises(UserError, match="their vocabularies differ"):
        compatibility.check(same, load_tokenizer(tmp_path))


def test_examples_longer_than_the_models_window_are_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "windowed"
    shutil.copytree(tiny_model, folder)
    config = AutoConfig.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    for window, length, refused in ((400, 512, True), (512, 512, False), (None, 512, False)):
        config.sliding_window = window
        config.save_pretrained(folder)
        arguments = Arguments(model_name_or_path=folder, model_max_length=length)
        if refused:
            with pytest.raises(UserError, match="--model_max_length 400 or less"):
                compatibility.check(arguments, tokenizer)
        else:
            compatibility.check(arguments, tokenizer)
    config.sliding_window = 512
    config.save_pretrained(folder)
    for tokens in (112, 113):
        answering = Arguments(
            model_name_or_path=folder, model_max_length=400, eval_generations=1,
            eval_generation_tokens=tokens,
        )  # fmt: skip
        if tokens == 112:
            compatibility.check(answering, tokenizer)
        else:
            with pytest.raises(UserError, match="--eval_generation_tokens 113 after a prompt of"):
                compatibility.check(answering, tokenizer)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["--eval_fraction=0.001"], "of 240 examples leaves nothing to evaluate on"),
        (["--eval_fraction=0.999"], "of 240 examples leaves nothing to train on"),
        (["--eval_data_path=EMPTY"], "No example of EMPTY has an answer token left"),
    ],
)
def test_held_out_data_that_is_none_is_refused_before_the_first_step(
    changed: list[str], expected: str, tiny_model: Path, tmp_path: Path
) -> None:
    long = tmp_path / "long.json"
    long.write_text(json.dumps([{"instruction": "count " * 600, "output": "one"}]))
    out, given = tmp_path / "out", [word.replace("EMPTY", str(long)) for word in changed]
    done = train(f"--model_name_or_path={tiny_model}", f"--output_dir={out}", *given)
    assert done.returncode == 2
    assert expected.replace("EMPTY", str(long)) in done.stderr
    assert not out.exists()


def test_examples_that_cannot_be_evaluated_are_said_and_left_out(
    tiny_model: Path, tmp_path: Path
) -> None:
    mixed, plain = tmp_path / "mixed.json", tmp_path / "plain.json"
    sound = {"instruction": "Say one.", "output": "one"}
    mixed.write_text(json.dumps([{"instruction": "count " * 600, "output": "one"}, sound]))
    plain.write_text(json.dumps([sound]))
    losses = []
    for data in (mixed, plain):
        out = tmp_path / data.stem
        done = train(
            f"--model_name_or_path={tiny_model}",
            f"--output_dir={out}",
            "--max_steps=1",
            f"--eval_data_path={data}",
            "--save_strategy=no",
            "--learning_rate=0",
            "--per_device_train_batch_size=1",
            "--gradient_accumulation_steps=1",
        )
        assert done.returncode == 0, done.stderr
        said = "train: 1 of 2 examples of" in done.stdout and "(not evaluated)" in done.stdout
        assert said is (data is mixed)
        losses.append([line["eval_loss"] for line in lines(out) if "eval_loss" in line])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        # LLaMA-Factory
        (
            "--finetuning_type lora --lora_rank 8 --lora_target all --use_rslora True",
            {"lora_rank": 8, "lora_use_rslora": True, "learning_rate": 2e-4, "targets": ()},
        ),
        ("--finetuning_type lora --quantization_bit 4", {"quantize_base": "nf4", "lora_rank": 16}),
        ("--finetuning_type full", {"lora_rank": 0, "learning_rate": 2e-5}),
        # axolotl
        (
            "--adapter qlora --lora_r 32 --lora_target_modules q_proj,v_proj --load_in_4bit",
            {"lora_rank": 32, "quantize_base": "nf4", "targets": ("q_proj", "v_proj")},
        ),
        ("--adapter=lora --load_in_8bit True", {"lora_rank": 16, "quantize_base": "int8"}),
        ("--adapter lora --peft_use_dora true --lora_target_linear true", {"use_dora": True}),
        # TRL
        ("--use_peft --lora_r 4 --lora_alpha 16", {"lora_rank": 4, "alpha": 16.0}),
        ("--lora_r=4 --use_peft", {"lora_rank": 4, "alpha": 8.0}),
        ("--lora_rank 4 --learning_rate 3e-5", {"learning_rate": 3e-5}),
        ("--lora_rank 4 --learning_rate=3e-5", {"learning_rate": 3e-5}),
    ],
)
def test_other_trainers_words_for_adapters_mean_the_same_here(
    words: str, meant: dict[str, object]
) -> None:
    arguments, _ = parse(words.split())
    assert {name: getattr(arguments, name) for name in meant} == meant


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--lora_alpha 8", "--lora_alpha 8.0: without an adapter it means nothing"),
        ("--quantize_base nf4", "Give --lora_rank too"),
        ("--merge", "--merge True: without an adapter it means nothing"),
        ("--finetuning_type freeze", "--finetuning_type freeze is not known here"),
        ("--quantization_bit 3 --lora_rank 4", "Give 4, 8"),
        ("--lora_rank -1", "--lora_rank must not be negative"),
        ("--lora_rank 4 --lora_dropout 1", "--lora_dropout must be in [0, 1)"),
        ("--lora_rank 4 --use_dora --quantize_base int8", "row lengths of quantized weights"),
    ],
)
def test_adapter_flags_that_mean_nothing_are_refused(words: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        parse(words.split())
