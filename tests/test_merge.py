"""A merged folder computes what base + adapter compute, and says how nearly; or it is absent."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import adapters as made
import pytest
import torch
from adapters import FAMILIES, KINDS, Kind, make_adapter, make_base, peft_merged, peft_model
from model_folders import copied, save, tensors
from safetensors.torch import load_file, save_file
from small_disks import leave, small_disk
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from alpaca import adapter as adapters
from alpaca import golden, passport, proof
from alpaca.adapter import Adapter
from alpaca.cli import main
from alpaca.merging import Base, Merge
from alpaca.prompt import chat_template

ROOT = Path(__file__).resolve().parent.parent


def merge(folder: Path, output: Path, *flags: object) -> int:
    return code_of(["merge", str(folder), "-o", str(output), *map(str, flags)])


def verify(folder: Path, *flags: object) -> int:
    return code_of(["verify", str(folder), *map(str, flags)])


def code_of(words: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def base(bpe: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 LLaMA, as bases usually are."""
    return make_base(tmp_path_factory.mktemp("base") / "llama", bpe, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of it, as train.py writes one: its passport has hashes, logits and proof."""
    folder = make_adapter(tmp_path_factory.mktemp("adapter") / "lora", base)
    made.record(folder, base, **proof.record(base, Adapter(folder)))
    return folder


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_in_fp32_is_that_of_peft(
    family: str, kind: Kind, bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", bpe, family)
    folder = make_adapter(tmp_path / "adapter", base, **kind.settings)
    assert merge(folder, tmp_path / "out", "--proof", "never") == 0
    theirs, ours = peft_merged(base, folder, torch.float64), tensors(tmp_path / "out")
    assert set(ours) == set(theirs)
    before, changed = tensors(base), 0
    for name, value in theirs.items():
        assert ours[name].dtype == torch.float32
        assert torch.allclose(ours[name].double(), value, rtol=1e-6, atol=1e-9), name
        changed += not torch.equal(ours[name], before[name])
    assert changed == len(Adapter(folder).modules) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_base_is_added_to_in_fp32_and_rounded_once(
    dtype: torch.dtype, bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", bpe, dtype=dtype)
    folder = make_adapter(tmp_path / "adapter", base)
    assert merge(folder, tmp_path / "out", "--rounding", "nearest") == 0
    exact, ours = peft_merged(base, folder, torch.float64), tensors(tmp_path / "out")
    before = tensors(base)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")
    for name, value in ours.items():
        assert value.dtype == dtype
        if name.removesuffix(".weight") in Adapter(folder).modules:
            assert torch.equal(value, exact[name].float().to(dtype)), name
        else:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("to", ["bf16", "fp16", "fp32"])
def test_the_type_that_is_asked_for_is_written(
    base: Path, adapter: Path, tmp_path: Path, to: str
) -> None:
    assert merge(adapter, tmp_path / "out", "--dtype", to) == 0
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {kinds[to]}
    recorded = passport.read(tmp_path / "out")
    assert recorded is not None
    assert set(recorded["proof"]) == {"fp32", to, "rounding"}
    assert verify(tmp_path / "out") == 0


def test_a_base_of_several_types_keeps_them(base: Path, tmp_path: Path) -> None:
    mixed = copied(base, tmp_path / "mixed")
    held = {
        name: value.float() if "down_proj" in name or "norm" in name else value
        for name, value in tensors(base).items()
    }
    save(mixed, held)
    folder = make_adapter(tmp_path / "adapter", mixed)
    assert merge(folder, tmp_path / "out") == 0
    ours = tensors(tmp_path / "out")
    assert {name: value.dtype for name, value in ours.items()} == {
        name: value.dtype for name, value in held.items()
    }


def test_files_of_a_given_size_hold_the_same_numbers(adapter: Path, tmp_path: Path) -> None:
    assert merge(adapter, tmp_path / "one") == 0
    assert merge(adapter, tmp_path / "many", "--max_shard_size", "100KB") == 0
    files = list((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    whole = tensors(tmp_path / "one")
    parts = {name: value for path in files for name, value in load_file(path).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    assert verify(tmp_path / "many") == 0


def test_row_by_row_it_is_what_it_is_at_once(base: Path, tmp_path: Path) -> None:
    """Also where random bits round: they belong to the place in the tensor."""
    folder = make_adapter(tmp_path / "adapter", base, use_dora=True)
    entries = golden.Float64Weights(base).entries
    for seed in (None, 3):
        for dtype in (torch.bfloat16, torch.float32):
            merged = Merge(Base(entries), Adapter(folder), seed)
            for name, entry in entries.items():
                whole = merged.rows(name, slice(None), dtype)
                rows = [
                    merged.rows(name, slice(i, i + 3), dtype) for i in range(0, entry.shape[0], 3)
                ]
                assert torch.equal(torch.cat(rows), whole), name


def test_a_merge_rounds_to_neighbours_at_random_and_keeps_the_mean(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    assert merge(adapter, tmp_path / "out") == 0
    ours, exact = tensors(tmp_path / "out"), peft_merged(base, adapter, torch.float64)
    up = []
    for name, value in ours.items():
        step = torch.finfo(torch.bfloat16).eps * exact[name].abs()
        far = value.double() - exact[name]
        assert (far.abs() <= step + 1e-9).all(), name
        if name.removesuffix(".weight") in Adapter(adapter).modules:
            assert not torch.equal(value, exact[name].bfloat16()), name
            up.append((far / step.clamp(min=1e-9)).flatten())
    moved = torch.cat(up)
    assert moved.abs().mean() > 0.1
    assert abs(moved.mean()) < 5 * moved.std() / len(moved) ** 0.5
    assert verify(tmp_path / "out", "--adapter", adapter) == 0


class ExactNorm(torch.nn.Module):
    """RMSNorm in the type of its input: transformers computes it in fp32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt()


def exact(model: Any) -> Any:
    """The model with norms in float64; the angles, in fp32, are alike in all models compared."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, ExactNorm(child))
    return model


def test_changes_below_a_rounding_step_survive_on_the_average_and_are_lost_to_the_nearest(
    base: Path, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "adapter", base)
    held = load_file(folder / adapters.WEIGHTS)
    small = {name: value * 1e-3 if "lora_B" in name else value for name, value in held.items()}
    save_file(small, folder / adapters.WEIGHTS)
    whole, before = peft_merged(base, folder, torch.float64), tensors(base)
    kept = {}
    for way in ("nearest", "stochastic"):
        assert merge(folder, tmp_path / way, "--rounding", way) == 0
        ours = tensors(tmp_path / way)
        change = torch.cat([(whole[name] - before[name]).flatten() for name in whole])
        found = torch.cat([(ours[name].double() - before[name]).flatten() for name in whole])
        kept[way] = float(found @ change / (change @ change))
    assert kept["nearest"] < 0.5 < 0.8 < kept["stochastic"] < 1.2


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", KINDS[:3], ids=lambda kind: kind.name)
def test_the_proof_holds_the_true_differences(
    family: str, kind: Kind, bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Computed with transformers and peft in float64."""
    base = make_base(tmp_path / "base", bpe, family, torch.bfloat16)
    folder = make_adapter(tmp_path / "adapter", base, **kind.settings)
    for to in ("bf16", "fp32"):
        assert merge(folder, tmp_path / to, "--dtype", to) == 0
    adapted = made.logits(exact(peft_model(base, folder, torch.float64)), base)
    recorded = passport.read(tmp_path / "bf16")
    assert recorded is not None
    for to in ("bf16", "fp32"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / to, dtype=torch.float64)
        true = proof.largest(made.logits(exact(model), base), adapted)
        assert recorded["proof"][to] == pytest.approx(true, rel=0.02), to
    assert recorded["proof"]["bf16"] > 100 * recorded["proof"]["fp32"] > 0
    own = proof.record(base, Adapter(folder))
    assert own["proof"] == recorded["proof"]
    for one, logits in zip(own["golden"], adapted, strict=True):
        for token, value in one["logits"].items():
            assert value == pytest.approx(float(logits[int(token)]), abs=1e-5)


def test_the_proof_is_printed_and_verified_again(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(adapter, tmp_path / "out") == 0
    told = capsys.readouterr().out
    recorded = passport.read(tmp_path / "out")
    assert recorded is not None
    for name in ("fp32", "bf16"):
        assert f"largest logit difference {recorded['proof'][name]:.3g}" in told
    assert recorded["made_by"] == "merge"
    assert recorded["base"]["files"] == adapters.base_files(base)
    assert recorded["adapter"]["files"]["passport.json"] == passport.sha256(
        adapter / "passport.json"
    )
    assert verify(tmp_path / "out") == 0
    assert "3 golden prompts (made by merge)" in capsys.readouterr().out
    assert verify(tmp_path / "out", "--adapter", adapter) == 0
    assert f"{recorded['proof']['bf16']:.3g}" in capsys.readouterr().out
    other = make_adapter(tmp_path / "other", base, seed=5)
    assert verify(tmp_path / "out", "--adapter", other) == 2
    assert "is not the adapter that" in capsys.readouterr().err


def test_an_adapter_without_effect_is_equal(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_adapter(tmp_path / "adapter", base)
    held = load_file(folder / adapters.WEIGHTS)
    save_file(
        {name: 0 * value if "lora_B" in name else value for name, value in held.items()},
        folder / adapters.WEIGHTS,
    )
    assert merge(folder, tmp_path / "out") == 0
    assert capsys.readouterr().out.count(": equal") == 2
    ours = tensors(tmp_path / "out")
    assert all(torch.equal(value, ours[name]) for name, value in tensors(base).items())


def test_a_merged_folder_loads_in_our_engine_and_is_answered_from(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    from alpaca.model import load_model

    assert merge(adapter, tmp_path / "out", "--dtype", "fp32") == 0
    ours = made.logits(load_model(tmp_path / "out", None), base)
    theirs = made.logits(peft_model(base, adapter, torch.float32), base)
    assert proof.largest(ours, theirs) < 1e-4


def test_an_adapter_of_this_program_gets_its_template_and_card(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", base)
    run = {
        "examples": 10, "eval_fraction": 0.1, "data_sha256": "0" * 64, "batch": 2, "peak": 2e-4,
        "shape": "cosine", "warmup": 1, "weight_decay": 0.0, "moments": "fp32", "compute": "bf16",
        "model_max_length": 64, "seed": 1,
    }  # fmt: skip
    result = {"steps": 3, "loss": 2.0, "eval_loss_exported": 2.5}
    made.record(folder, base, "train", run=run, result=result)
    assert merge(folder, tmp_path / "out") == 0
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["chat_template"] == chat_template(adds_bos=False)
    recorded = passport.read(tmp_path / "out")
    assert recorded is not None
    assert recorded["run"] == run
    assert recorded["result"] == {**result, "eval_loss_exported": None}
    card = (tmp_path / "out/README.md").read_text()
    assert "merged from | a LoRA adapter, rank 4" in card
    assert "exported as | bf16, rounding: stochastic" in card
    assert verify(tmp_path / "out") == 0


def test_an_adapter_of_another_program_keeps_the_files_around_its_base(
    base: Path, tmp_path: Path
) -> None:
    own = copied(base, tmp_path / "instruct")
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ 1 }}"}))
    (own / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true}')
    folder = make_adapter(tmp_path / "adapter", own)
    assert merge(folder, tmp_path / "out") == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (own / name).read_bytes()
    shutil.copyfile(own / "tokenizer.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": "{{ 2 }}"})
    )
    assert merge(folder, tmp_path / "again") == 0
    assert "{{ 2 }}" in (tmp_path / "again/tokenizer_config.json").read_text()


def test_the_base_is_found_where_the_adapter_says_and_beside_it(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(tmp_path / "adapter", base)
    beside = made.with_settings(folder, tmp_path / "b", base_model_name_or_path="somebody/Llama")
    assert merge(beside, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "was not found (somebody/Llama)" in told
    assert "--base FOLDER" in told
    assert merge(beside, tmp_path / "out", "--base", base) == 0
    (tmp_path / "Llama").symlink_to(base)
    assert merge(beside, tmp_path / "out2") == 0
    (tmp_path / "Llama").unlink()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/llama").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    assert merge(beside, tmp_path / "out3") == 0


def refused(told: str, folder: Path, output: Path, capsys: Any, *flags: object) -> None:
    """Merging ends with one sentence, and leaves nothing."""
    capsys.readouterr()
    assert merge(folder, output, *flags) == 2
    found = capsys.readouterr().err
    assert told in found, found
    assert "Traceback" not in found
    assert not output.exists()
    assert not list(output.parent.glob(f".{output.name}*"))


def test_another_base_is_refused(
    base: Path,
    adapter: Path,
    bpe: PreTrainedTokenizerBase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    changed = copied(base, tmp_path / "changed")
    held = tensors(changed)
    held["model.layers.0.mlp.up_proj.weight"][3, 4] *= 1.01
    save(changed, held)
    refused("was trained on other weights than those in", adapter, out, capsys, "--base", changed)
    turned = copied(base, tmp_path / "turned", rope_theta=5e5)
    refused("trained with another config.json", adapter, out, capsys, "--base", turned)
    for family, told in (
        ("qwen3", "model.layers.0.self_attn.k_proj.weight has shape [64, 64] there"),
        ("llama, odd", "model.layers.0.mlp.down_proj.weight has shape [42, 67] there"),
    ):
        other = make_base(tmp_path / family, bpe, family)
        refused(told, adapter, out, capsys, "--base", other)
    refused("holds an adapter", adapter, out, capsys, "--base", adapter)


def test_a_base_changed_after_its_passport_was_written_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its passport still holds the right hashes, which would do for the shapes and for loading."""
    own = copied(base, tmp_path / "own")
    passport.write(own, "convert")
    folder = make_adapter(tmp_path / "adapter", own, recorded=True)
    held = tensors(own)
    held["model.norm.weight"][0] *= 1.01
    save(own, held)
    refused("model.safetensors was changed after it was written", folder, tmp_path / "out", capsys)


def test_a_base_that_computes_otherwise_is_refused_though_every_hash_was_forged(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = copied(base, tmp_path / "own")
    held = tensors(own)
    held["model.layers.0.mlp.up_proj.weight"][3, 4] *= 1.01
    save(own, held)
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    recorded = passport.read(folder)
    assert recorded is not None
    recorded["base"]["files"] = adapters.base_files(own)
    recorded["seal"] = passport.seal(recorded)
    (folder / "passport.json").write_text(passport.render(recorded))
    refused("does not compute on this base what its passport holds", folder, tmp_path / "out",
            capsys, "--base", own)  # fmt: skip


def test_a_changed_adapter_is_refused(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    change_one(folder / adapters.WEIGHTS)
    refused(f"{adapters.WEIGHTS} was changed after", folder, tmp_path / "out", capsys)


def change_one(path: Path) -> str:
    """Change one number of the last tensor by a percent; returns the tensor's name."""
    held = load_file(path)
    name = max(held)
    held[name].view(-1)[7] *= 1.01
    save_file(held, path, metadata={"format": "pt"})
    return name


def forge(folder: Path) -> None:
    """Write an adapter's hashes and seal anew, as someone who wants a change not to be found."""
    recorded = passport.read(folder)
    assert recorded is not None
    recorded["files"] = {name: passport.sha256(folder / name) for name in recorded["files"]}
    recorded["seal"] = passport.seal(recorded)
    (folder / "passport.json").write_text(passport.render(recorded))


def test_one_changed_number_of_an_adapter_or_its_base_is_found(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(adapter) == 0
    told = capsys.readouterr().out
    assert "3 golden prompts" in told
    assert told.count("largest logit difference") == 2
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    change_one(folder / adapters.WEIGHTS)
    assert verify(folder) == 2
    assert f"{adapters.WEIGHTS} differs" in capsys.readouterr().err
    forge(folder)
    assert verify(folder, "--no-golden") == 0
    assert verify(folder) == 2
    assert "golden prompt 1: " in capsys.readouterr().err
    own = copied(base, tmp_path / "own")
    change_one(own / "model.safetensors")
    assert verify(adapter, "--base", own) == 2
    assert "was trained on other weights than those in" in capsys.readouterr().err


def test_a_changed_figure_of_the_proof_is_found(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    recorded = passport.read(folder)
    assert recorded is not None
    recorded["proof"]["bf16"] /= 2
    recorded["seal"] = passport.seal(recorded)
    (folder / "passport.json").write_text(passport.render(recorded))
    assert verify(folder) == 2
    assert "merged in bf16: the largest logit difference was" in capsys.readouterr().err


def test_an_adapter_whose_base_is_absent_is_told_what_to_give(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = shutil.copytree(base, tmp_path / "gone")
    folder = make_adapter(tmp_path / "adapter", gone)
    made.record(folder, gone, **proof.record(gone, Adapter(folder)))
    shutil.rmtree(gone)
    assert verify(folder) == 2
    told = capsys.readouterr().err
    assert f"was not found ({gone})" in told
    assert "--base FOLDER" in told
    assert verify(folder, "--no-golden") == 0
    assert verify(folder, "--base", base) == 0


def test_logits_and_proof_can_be_added_to_an_adapter_later(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", base, recorded=True)
    assert verify(folder) == 0
    assert verify(folder, "--add-golden") == 0
    recorded = passport.read(folder)
    assert recorded is not None
    assert len(recorded["golden"]) == 3
    assert set(recorded["proof"]) == {"fp32", "bf16", "rounding"}
    assert verify(folder) == 0


@pytest.mark.parametrize("words", [["--adapter", "x"], ["--base", "x"]], ids=lambda w: w[0])
def test_flags_for_adapters_are_refused_where_they_would_not_be_used(
    words: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = copied(base, tmp_path / "own")
    passport.write(own, "convert")
    assert verify(own, *words) == 2
    assert f"Leave {words[0]} out" in capsys.readouterr().err
    assert verify(own, "--no-golden", *words) == 2
    assert "--no-golden omits it" in capsys.readouterr().err


def test_an_adapter_over_quantized_weights_is_merged_with_a_note(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_adapter(tmp_path / "adapter", base)
    made.record(folder, base, quantized="nf4")
    assert merge(folder, tmp_path / "out") == 0
    assert "was trained over nf4 weights of its base" in capsys.readouterr().out
    recorded = passport.read(tmp_path / "out")
    assert recorded is not None
    assert recorded["quantized"] == "nf4"


def test_what_an_adapter_was_trained_on_takes_the_place_of_the_base(
    base: Path, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    called = []

    def coarse(name: str, weight: torch.Tensor) -> torch.Tensor:
        called.append(name)
        return (weight.float() * 8).round() / 8

    other = copied(base, tmp_path / "coarse")
    held = tensors(base)
    layers = {name for name, value in held.items() if ".layers." in name and value.ndim == 2}
    save(other, {n: coarse(n, v).bfloat16() if n in layers else v for n, v in held.items()})
    called.clear()
    entries = golden.Float64Weights(base).entries
    ours = Merge(Base(entries, coarse), Adapter(folder), None)
    plain = Merge(Base(golden.Float64Weights(other).entries), Adapter(folder), None)
    for name in entries:
        one, two = (torch.cat(list(m.pieces(name, torch.float32))) for m in (ours, plain))
        assert torch.equal(one, two), name
    assert set(called) == layers
    facts = proof.record(base, Adapter(folder), coarse)
    assert golden.differences(facts["golden"], proof.record(other, Adapter(folder))["golden"]) == []


@pytest.mark.parametrize("to", ["gguf", "ollama", "bf16"])
def test_other_exports_of_an_adapter_say_to_merge_it(
    to: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(["export", str(adapter), "--to", to, "-o", str(tmp_path / "out")]) == 2
    assert f"python -m alpaca merge {adapter} -o" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["convert", "plan", "diff"])
def test_verbs_that_need_a_model_say_to_merge_an_adapter(
    verb: str, adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "convert": ["--input_dir", str(adapter), "--output_dir", str(tmp_path)],
        "plan": ["--model_name_or_path", str(adapter)],
        "diff": ["make", str(adapter), str(base), "-o", str(tmp_path / "d")],
    }
    assert code_of([verb, *words[verb]]) == 2
    assert f"python -m alpaca merge {adapter} -o" in capsys.readouterr().err


def test_an_adapter_is_exported_as_a_tar_file(adapter: Path, tmp_path: Path) -> None:
    import tarfile

    assert code_of(["export", str(adapter), "--to", "tar", "-o", str(tmp_path / "a.tar")]) == 0
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extractall(tmp_path / "lora", filter="data")
    assert verify(tmp_path / "lora") == 0


def test_neither_adapter_nor_base_is_replaced(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in (adapter, adapter.parent, base, base.parent):
        assert merge(adapter, output, "--force") == 2
        assert "would replace" in capsys.readouterr().err
    assert verify(adapter) == 0
    assert merge(adapter, tmp_path / "out") == 0
    assert merge(adapter, tmp_path / "out") == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert merge(adapter, tmp_path / "out", "--force", "--dtype", "fp32") == 0
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {torch.float32}


def test_numbers_too_large_for_fp16_and_nan_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_adapter(tmp_path / "adapter", base)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    held = load_file(folder / adapters.WEIGHTS)
    save_file({**held, name: held[name] * 1e6}, folder / adapters.WEIGHTS)
    refused(
        "layers.0.mlp.up_proj.weight holds", folder, tmp_path / "out", capsys, "--dtype", "fp16"
    )
    save_file({**held, name: held[name] * torch.nan}, folder / adapters.WEIGHTS)
    refused("holds NaN or infinite numbers", folder, tmp_path / "out", capsys)


def test_a_tokenizer_with_more_tokens_than_the_base_is_refused(
    base: Path, bpe: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import copy

    folder = make_adapter(tmp_path / "adapter", base)
    larger = copy.deepcopy(bpe)
    larger.add_tokens(["<|more|>"])
    larger.save_pretrained(folder)
    refused("has more tokens than the model of", folder, tmp_path / "out", capsys)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 100) as disk:
        yield disk


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    adapter: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(disk, 1_000_000)
    refused("GB are free", adapter, disk / "out", capsys)
    assert os.listdir(disk) == ["ballast"]


SLOWED = """
import sys, time
from alpaca import merging
from alpaca.cli import main
rows = merging.Merge.rows
def slow(*given):
    time.sleep(0.02)
    return rows(*given)
merging.Merge.rows = slow
main(sys.argv[1:])
"""


@contextmanager
def slowed(adapter: Path, output: Path) -> Iterator["subprocess.Popen[str]"]:
    """A merge in a process of its own, which has begun to write tensors."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWED, "merge", str(adapter), "-o", str(output)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        began = time.monotonic()
        while not list(output.parent.glob(".out.partial/*.safetensors")):
            assert process.poll() is None
            assert time.monotonic() - began < 60
            time.sleep(0.01)
        yield process


def test_a_disk_that_fills_up_meanwhile_is_said_and_nothing_stays(
    adapter: Path, disk: Path
) -> None:
    with slowed(adapter, disk / "out") as process:
        process.send_signal(signal.SIGSTOP)
        leave(disk, 20_000)
        process.send_signal(signal.SIGCONT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Free some space and run the same command again" in told
    assert os.listdir(disk) == ["ballast"]
    (disk / "ballast").unlink()
    assert merge(adapter, disk / "out") == 0
    assert os.listdir(disk) == ["out"]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill"])
def test_an_interrupted_merge_is_absent_and_the_next_one_complete(
    end: signal.Signals, adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "out"
    with slowed(adapter, output) as process:
        process.send_signal(end)
        process.communicate(timeout=60)
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    assert not output.exists()
    if end == signal.SIGINT:
        assert os.listdir(output.parent) == []
    assert merge(adapter, output) == 0
    assert os.listdir(output.parent) == ["out"]
    assert verify(output) == 0


def test_a_merge_is_not_written_into_what_it_is_made_from(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tmp_path / "lora", base, recorded=True)
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(adapter), "-o", str(adapter / "inner"), "--base", str(base)])
    assert ended.value.code == 2
    assert "whose passport lists all that is in it" in capsys.readouterr().err
    assert not (adapter / "inner").exists()
