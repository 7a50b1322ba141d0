"""`train.py` from its flags to the folder it leaves, run as people run it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from training_runs import ROOT, lines, master_weights, train
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alpaca import card, passport, rounding, verify
from alpaca.folder import load_tokenizer
from alpaca.prompt import render, template_hash
from alpaca.recipe import packing
from alpaca.records import read_records
from alpaca.tokens import Codec
from alpaca.training import attention
from alpaca.training.loss import TargetLoss

SEEDS = ROOT / "data/seed_tasks.jsonl"
Run = tuple[Path, list[str], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("run") / "alpaca_out"
    flags = [
        "--model_name_or_path",
        str(tiny_model),
        "--data_path",
        str(SEEDS),
        "--output_dir",
        str(out),
        "--eval_fraction",
        "0.15",
        "--learning_rate",
        "0.01",
        "--per_device_train_batch_size",
        "4",
        "--gradient_accumulation_steps",
        "2",
        "--num_train_epochs",
        "1",
        "--keep_last_checkpoint",
    ]
    return out, flags, train(*flags)


def test_training_learns_and_says_so(
    run: Run,
) -> None:
    out, _, done = run
    assert done.returncode == 0, done.stderr
    steps = [line for line in lines(out) if "loss" in line]
    evaluations = [line["eval_loss"] for line in lines(out) if "eval_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 26))  # 204 examples, 8 a step
    assert evaluations[-1] < evaluations[0] - 0.5
    assert steps[0]["lr"] == 0
    assert f"{evaluations[0]:.4f} before, {evaluations[-1]:.4f} after" in done.stdout


def test_the_loss_curve_is_drawn(run: Run) -> None:
    out, _, _ = run
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "loss.svg").read_text()


def test_the_card_says_what_the_passport_does(run: Run, tmp_path: Path) -> None:
    out, _, done = run
    told, held = (out / "README.md").read_text(), passport.read(out)
    assert held is not None
    result = held["result"]
    for value in (
        held["run"]["data_sha256"],
        f"{held['run']['examples']:,} examples",
        "| held out, base model | " + f"{result['eval_loss_before']:.4f} |",
        "| held out, this folder | " + f"{result['eval_loss_exported']:.4f} |",
        f'base_model: "{held["base"]["folder"]}"',
        "license: other",
        "whose folder does not name it",
        render("Name three colors."),
    ):
        assert value in told
    assert f"hf upload {out.name} {out} --exclude" in done.stdout
    assert yaml.safe_load(told.split("---\n")[1])["pipeline_tag"] == "text-generation"


def test_the_bases_licence_goes_along_and_an_owners_card_stays(run: Run, tmp_path: Path) -> None:
    out, base = tmp_path / "out", tmp_path / "base"
    shutil.copytree(run[0], out, ignore=shutil.ignore_patterns("checkpoint-*"))
    base.mkdir()
    (base / "LICENSE.txt").write_text("the terms")
    (base / "README.md").write_text("---\nlicense: llama2\n---\n# base\n")
    told = card.write(out, base).read_text()
    assert "license: llama2" in told
    assert "That of the base model" in told
    assert "Its files lie here: LICENSE.txt" in told
    assert (out / "LICENSE.txt").read_text() == "the terms"
    (out / "README.md").write_text("my own words")
    assert card.write(out, base).read_text() == "my own words"
    verify.run(verify.parser().parse_args([str(out)]))  # neither is a change of the model


def test_a_model_of_an_earlier_version_gets_a_card_too(run: Run, tmp_path: Path) -> None:
    """Its passport does not say how it was exported."""
    out = tmp_path / "out"
    shutil.copytree(run[0], out, ignore=shutil.ignore_patterns("checkpoint-*"))
    held = passport.read(out)
    assert held is not None
    del held["export"]
    held["seal"] = passport.seal(held)
    (out / "passport.json").write_text(passport.render(held))
    assert "| exported as | bf16, rounding: nearest |" in card.write(out).read_text()


def test_both_kinds_of_example_are_shown_with_what_is_masked_and_trained(run: Run) -> None:
    shown = run[2].stdout
    assert "an example without input, as it is trained on" in shown
    assert "an example with input, as it is trained on" in shown
    words = shown.split()
    assert "Ġinstruction" in words  # by the tokenizer's own names, which show spaces
    assert words.count("masked") == shown.count("\ntrained (") == words.count("[<|end|>]") == 2
    assert "(cut off here)" not in shown


def trainers_model(out: Path, scratch: Path) -> TargetLoss:
    """The model as it was trained, packed attention and all, its weights rounded as exported."""
    config = AutoConfig.from_pretrained(out)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention.NAME
    )
    module = TargetLoss(model.eval())
    held = master_weights(out, scratch)
    assert any(not weight.bfloat16().float().equal(weight) for weight in held.values())
    module.load_state_dict(
        {
            name: rounding.stochastic(
                w, torch.bfloat16, 42, f"export {name[len('model.') :]}"
            ).float()
            for name, w in held.items()
        }
    )
    return module


def logits_of_trainer(module: TargetLoss, ids: list[int]) -> torch.Tensor:
    pack = packing.plain(ids)
    hidden = module.model.base_model(
        input_ids=torch.tensor(pack.ids)[None],
        position_ids=torch.tensor(pack.positions)[None],
        pack=attention.index(pack.segments, torch.device("cpu")),
    ).last_hidden_state[0]
    logits: torch.Tensor = module.model.get_output_embeddings()(hidden)
    return logits


def test_exported_folder_gives_transformers_the_trainers_logits_and_the_logged_loss(
    run: Run, tmp_path: Path
) -> None:
    out, _, _ = run
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    found = passport.read(out)
    assert found is not None
    assert found["result"]["steps"] == 25
    assert found["run"]["template_sha256"] == template_hash()
    assert found["run"]["moments"] == "fp32"
    codec = Codec(load_tokenizer(out))
    total, targets = 0.0, 0
    trained = trainers_model(out, tmp_path)
    for example in codec.examples(held_out_records(), 512):
        ids = torch.tensor(example.ids)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
            expected = logits_of_trainer(trained, example.ids)[:-1]
        assert (logits - expected).norm() / expected.norm() < 1e-5
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total += losses[example.prompt_length - 1 :].sum().item()
        targets += example.targets
    logged = [line["eval_loss"] for line in lines(out) if "eval_loss" in line][-1]
    assert total / targets == pytest.approx(logged, rel=5e-3)  # the export is rounded to bf16


def held_out_records() -> list[object]:
    import numpy as np

    order = np.random.default_rng([42]).permutation(list(range(240)))
    records = read_records(SEEDS)
    return [records[i] for i in sorted(order[:36])]


def test_exported_chat_template_renders_the_trained_prompt(
    run: Run,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run[0])
    messages = [{"role": "user", "content": "Say hi."}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == render("Say hi.")


def test_the_same_run_again_is_recognised_and_another_is_not(
    run: Run,
) -> None:
    out, flags, _ = run
    before = (out / "model.safetensors").stat().st_mtime_ns
    again = train(*flags)
    assert again.returncode == 0
    assert "already holds the model of exactly this run" in again.stdout
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_killed_before_its_drawing_gets_it_from_the_next(run: Run, tmp_path: Path) -> None:
    out, flags, _ = run
    killed = tmp_path / "out"
    shutil.copytree(out, killed)
    (killed / "loss.png").unlink()
    (killed / "loss.svg").unlink()
    found = json.loads((killed / "passport.json").read_text())
    del found["beside"]
    (killed / "passport.json").write_text(json.dumps(found))
    again = train(*flags, "--output_dir", killed)
    assert "already holds the model of exactly this run" in again.stdout
    assert "<svg" in (killed / "loss.svg").read_text()
    assert set(passport.read(killed)["beside"]) == {"log.jsonl", "loss.png", "loss.svg"}


def test_without_packing_the_losses_are_the_same_and_the_tokens_are_not(
    run: Run, tmp_path: Path
) -> None:
    out, flags, _ = run
    done = train(*flags, "--output_dir", tmp_path / "o", "--packing", "False", "--max_steps", 3)
    assert done.returncode == 0, done.stderr
    packed = [line for line in lines(out) if "loss" in line]
    padded = [line for line in lines(tmp_path / "o") if "loss" in line]
    assert padded[0]["loss"] == pytest.approx(packed[0]["loss"], rel=1e-6)
    assert padded[0]["tokens"] > 1.3 * packed[0]["tokens"]
    assert padded[0]["tokens"] == padded[0]["padded_tokens"]


def test_another_runs_model_is_not_replaced_unasked(run: Run) -> None:
    out, flags, _ = run
    before = (out / "model.safetensors").stat().st_mtime_ns
    done = train(*flags, "--seed", 7)
    assert done.returncode == 2
    assert "already holds another model" in done.stderr
    assert "--overwrite_output_dir" in done.stderr
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_two_ranks_log_the_losses_of_one(run: Run, tmp_path: Path) -> None:
    out, flags, _ = run
    other = tmp_path / "out"
    changed = [*flags, "--output_dir", str(other), "--gradient_accumulation_steps", "1"]
    done = train(*changed, ranks=2)
    assert done.returncode == 0, done.stderr
    one = [line["loss"] for line in lines(out) if "loss" in line]
    two = [line["loss"] for line in lines(other) if "loss" in line]
    assert two == pytest.approx(one, rel=1e-3)
    assert two[:3] == pytest.approx(one[:3], rel=1e-5)
    assert lines(other)[1]["grad_norm"] == pytest.approx(lines(out)[1]["grad_norm"], rel=1e-6)


def test_more_ranks_than_examples_still_train(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "two.json"
    records = [{"instruction": "Say yes.", "output": "Yes."}]
    data.write_text(json.dumps(records))
    _, flags, _ = run
    changed = ["--data_path", data, "--eval_fraction", 0, "--max_steps", 2, "--warmup_ratio", 0]
    done = train(*flags, *changed, "--output_dir", tmp_path / "out", ranks=2)
    assert done.returncode == 0, done.stderr
    first, second = (line["loss"] for line in lines(tmp_path / "out"))
    assert second < first


def test_an_export_that_was_cut_short_is_finished_by_the_next_run(run: Run, tmp_path: Path) -> None:
    out, flags, _ = run
    broken = tmp_path / "out"
    inner = broken / ".model.partial"
    shutil.copytree(out, inner)
    (inner / ".ready").touch()
    (inner / "config.json").rename(broken / "config.json")  # killed after the first move
    done = train(*flags, "--output_dir", broken)
    assert done.returncode == 0
    assert "already holds" in done.stdout
    assert not inner.exists()
    AutoModelForCausalLM.from_pretrained(broken)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model_name_or_path", "no/such"], "There is no model folder no/such"),
        (["--data_path", "no/such.json"], "no data file no/such.json"),
        (["--learning_rat", "1"], "Did you mean --learning_rate?"),
        (["--deepspeed", "x.json"], "Use --fsdp full_shard"),
        (["--num_train_epochs", "many"], "invalid float value: 'many'"),
        (["--packing", "maybe"], "neither True nor False"),
        (["--max_tokens_per_pack", "100"], "--model_max_length 512"),
        (["--eval_fraction", "1.5"], "--eval_fraction"),
        (["--max_steps", "0"], "Nothing to train"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(
    tiny_model: Path, flags: list[str], expected: str
) -> None:
    done = train("--model_name_or_path", tiny_model, *flags)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", "holds no records"),
        ('[{"instruction": "Hi"}]', "no instruction or no output"),
    ],
)
def test_bad_data_is_explained_without_a_traceback(
    tiny_model: Path, tmp_path: Path, content: str, expected: str
) -> None:
    data = tmp_path / "data.json"
    data.write_text(content)
    done = train("--model_name_or_path", tiny_model, "--data_path", data)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
