"""Adapter folders in PEFT's format: read as peft reads them, or refused in a sentence."""

import json
import math
from pathlib import Path
from typing import Any

import adapters as made
import pytest
import torch
from adapters import KINDS, Kind, make_adapter, make_base, peft_model, with_settings
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from alpaca import adapter as adapters
from alpaca.adapter import Adapter, Change
from alpaca.errors import UserError


@pytest.fixture(scope="module")
def base(bpe: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "llama", bpe)


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "lora", base)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_scale_matrices_and_modules_are_those_that_peft_uses(
    kind: Kind, base: Path, tmp_path: Path
) -> None:
    read = Adapter(make_adapter(tmp_path / "adapter", base, **kind.settings))
    theirs = {
        name.removeprefix(adapters.ROOT): layer
        for name, layer in peft_model(base, read.folder, torch.float32).named_modules()
        if hasattr(layer, "lora_A") and layer.lora_A
    }
    assert sorted(theirs) == read.modules
    parameters = 0
    for module, change in read.changes():
        layer = theirs[module]
        assert change.scaling == layer.scaling["default"]
        assert torch.equal(change.down, layer.lora_A["default"].weight)
        assert torch.equal(change.up, layer.lora_B["default"].weight)
        assert change.rank == layer.r["default"]
        parameters += change.down.numel() + change.up.numel()
        if change.magnitude is not None:
            parameters += change.magnitude.numel()
    assert read.parameters == parameters
    assert read.change("model.norm") is None


def test_a_change_by_rows_and_in_float64_is_the_same_change() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 6, generator=draw, dtype=torch.float64)
    down, up = (torch.randn(*shape, generator=draw) for shape in ((3, 6), (10, 3)))
    for magnitude in (None, torch.rand(10, generator=draw) + 0.5):
        change = Change(down, up, 0.7, magnitude)
        whole = change.double().merged(weight)
        right = weight + 0.7 * up.double() @ down.double()
        if magnitude is not None:
            right = right / right.norm(dim=1, keepdim=True) * magnitude.double()[:, None]
            assert torch.allclose(whole.norm(dim=1), magnitude.double())
        assert torch.allclose(whole, right, rtol=1e-14, atol=1e-14)
        parts = [change.rows(slice(i, i + 4)).merged(weight[i : i + 4]) for i in (0, 4, 8)]
        assert torch.allclose(torch.cat(parts), whole, rtol=1e-14, atol=1e-14)


# Each setting that changes the result and is not computed here.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "IA3 is not LoRA"),
    "no method": ({"peft_type": None}, "None is not LoRA"),
    "biases": ({"bias": "all"}, "bias 'all' changes the base's biases"),
    "lora biases": ({"lora_bias": True}, "lora_bias True is not supported"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out True is not supported"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head'] is not"),
    "repeated layers": ({"layer_replication": [[0, 2]]}, "layer_replication [[0, 2]] is not"),
    "new tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices [1] is not"),
    "parameters": ({"target_parameters": ["a"]}, "target_parameters ['a'] is not supported"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens [1] is not supported"),
    "QALoRA": ({"use_qalora": True}, "use_qalora True is not supported"),
    "of a later peft": ({"use_something": 3}, "use_something 3 is not supported"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights before"),
    "OLoRA": ({"init_lora_weights": "olora"}, "changes the base's weights before"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "changes the base's weights before"),
    "CorDA": ({"init_lora_weights": "corda"}, "changes the base's weights before"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "changes the base's weights before"),
    "rank 0": ({"r": 0}, "r is 0"),
    "no rank": ({"r": None}, "r is None"),
    "a word for a rank": ({"r": "eight"}, "r is 'eight'"),
    "negative alpha": ({"lora_alpha": -1}, "lora_alpha is -1"),
    "NaN alpha": ({"lora_alpha": math.nan}, "lora_alpha is nan"),
    "infinite alpha": ({"lora_alpha": math.inf}, "lora_alpha is inf"),
    "true alpha": ({"lora_alpha": True}, "lora_alpha is True"),
    "a list of patterns": ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is ['q_proj']"),
    "a word for an alpha": ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern is {'q_proj': 'x'}"),
    "no pattern": ({"alpha_pattern": {"q_proj[": 2}}, "alpha_pattern is {'q_proj[': 2}"),
    "a word for DoRA": ({"use_dora": "no"}, "use_dora is 'no'"),
    "a word for rsLoRA": ({"use_rslora": "false"}, "use_rslora is 'false'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_is_not_computed_here_is_refused(
    name: str, folder: Path, tmp_path: Path
) -> None:
    settings, told = REFUSED[name]
    changed = with_settings(folder, tmp_path / "changed", **settings)
    with pytest.raises(UserError) as refused:
        Adapter(changed)
    assert told in refused.value.happened
    assert refused.value.remedy


def test_settings_that_do_not_change_the_result_are_accepted(folder: Path, tmp_path: Path) -> None:
    harmless = {
        "lora_dropout": 0.1, "target_modules": "all-linear", "init_lora_weights": "gaussian",
        "task_type": "CAUSAL_LM", "inference_mode": True, "loftq_config": {}, "use_something": None,
    }  # fmt: skip
    assert Adapter(with_settings(folder, tmp_path / "same", **harmless)).modules


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"r": 8}, "rank 8; its matrices have 4"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj rank 2; its matrices have 4"),
        ({"target_modules": ["q_proj", "proj"]}, "leaves .*down_proj out"),
        ({"target_modules": r".*\.(q|k|v|o)_proj"}, "leaves .*down_proj out"),
        ({"exclude_modules": ["k_proj"]}, "leaves .*k_proj out"),
        ({"layers_to_transform": [0]}, r"leaves model\.layers\.1\..* out"),
        ({"layers_to_transform": 1}, r"leaves model\.layers\.0\..* out"),
    ],
)
def test_settings_that_contradict_the_tensors_are_refused(
    settings: dict[str, Any], told: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        Adapter(with_settings(folder, tmp_path / "other", **settings))


def test_settings_that_name_the_tensors_in_other_words_are_accepted(
    folder: Path, tmp_path: Path
) -> None:
    for number, settings in enumerate(
        [
            {"target_modules": r".*_proj", "layers_to_transform": [1, 0]},
            {"target_modules": ["self_attn.q_proj", "proj", "k_proj", "v_proj", "o_proj",
                                "gate_proj", "up_proj", "down_proj"]},
            {"exclude_modules": ["lm_head", "j_proj"], "rank_pattern": {"q_proj": 4}},
        ]
    ):  # fmt: skip
        assert Adapter(with_settings(folder, tmp_path / str(number), **settings)).modules


def edited(folder: Path, target: Path, change: Any) -> Path:
    """A copy of an adapter whose tensors `change` has edited in place."""
    with_settings(folder, target)
    held = load_file(target / adapters.WEIGHTS)
    change(held)
    save_file(held, target / adapters.WEIGHTS)
    return target


ONE = f"{adapters.ROOT}model.layers.0.mlp.up_proj"


def test_tensors_that_the_settings_do_not_explain_are_refused(folder: Path, tmp_path: Path) -> None:
    def named(name: str, *shape: int) -> Any:
        return lambda held: held.update({name: torch.ones(*shape)})

    for number, (change, told) in enumerate(
        [
            (lambda held: held.pop(f"{ONE}.lora_B.weight"), "up_proj.lora_B.weight is missing"),
            (
                lambda held: held.pop(f"{ONE}.lora_A.weight"),
                "up_proj.lora_B.weight does not belong",
            ),
            (named(f"{ONE}.lora_magnitude_vector", 104), "lora_magnitude_vector does not belong"),
            (named(f"{ONE}.lora_B.bias", 104), "up_proj.lora_B.bias does not belong"),
            (named(f"{adapters.ROOT}lm_head.weight", 3, 4), "lm_head.weight does not belong"),
            (named("model.layers.0.mlp.up_proj.lora_A.weight", 4, 64), "does not belong"),
            (
                named(f"{adapters.ROOT}model.embed_tokens.lora_embedding_A", 4, 64),
                "does not belong",
            ),
            (named(f"{ONE}.lora_A.weight", 5, 64), "up_proj do not fit each other"),
            (named(f"{ONE}.lora_A.weight", 4, 8, 8), "up_proj do not fit each other"),
            (lambda held: held.clear(), "holds no tensors"),
        ]
    ):
        with pytest.raises(UserError, match=told):
            Adapter(edited(folder, tmp_path / str(number), change))


def test_magnitudes_are_needed_for_dora_and_fit_the_rows(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "dora", base, use_dora=True)
    name = f"{ONE}.lora_magnitude_vector"
    with pytest.raises(UserError, match="lora_magnitude_vector is missing"):
        Adapter(edited(folder, tmp_path / "without", lambda held: held.pop(name)))
    with pytest.raises(UserError, match="do not fit each other"):
        Adapter(edited(folder, tmp_path / "other", lambda held: held.update({name: torch.ones(3)})))


def test_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    def damaged(name: str, content: bytes | None, told: str) -> None:
        copy = with_settings(folder, tmp_path / str(len(list(tmp_path.iterdir()))))
        (copy / name).unlink()
        if content is not None:
            (copy / name).write_bytes(content)
        with pytest.raises(UserError, match=told):
            Adapter(copy)

    weights = (folder / adapters.WEIGHTS).read_bytes()
    damaged(adapters.CONFIG, None, "holds no adapter")
    damaged(adapters.CONFIG, b"{", "is damaged")
    damaged(adapters.CONFIG, b"[]", "is not a JSON object")
    damaged(adapters.WEIGHTS, None, r"adapter_model\.safetensors is missing")
    damaged(adapters.WEIGHTS, weights[:-1], "is damaged")
    damaged(adapters.WEIGHTS, weights[:100], "is damaged")
    damaged(adapters.WEIGHTS, b"", "is damaged")
    damaged(adapters.WEIGHTS, b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer")
    damaged(adapters.WEIGHTS, wrong_type(folder), "is I64")


def wrong_type(folder: Path) -> bytes:
    """The weights as whole numbers."""
    from safetensors.torch import save

    held = load_file(folder / adapters.WEIGHTS)
    content: bytes = save({name: value.long() for name, value in held.items()})
    return content


def test_nan_in_a_matrix_is_refused_when_it_is_read(folder: Path, tmp_path: Path) -> None:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[f"{ONE}.lora_A.weight"][1, 2] = torch.nan

    read = Adapter(edited(folder, tmp_path / "nan", change))
    with pytest.raises(UserError, match=r"up_proj\.lora_A\.weight holds NaN"):
        read.change("model.layers.0.mlp.up_proj")


def test_a_tied_output_matrix_cannot_be_changed(
    bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tied = make_base(tmp_path / "tied", bpe, "llama, tied")
    own = make_base(tmp_path / "own", bpe)
    folder = make_adapter(tmp_path / "adapter", own, target_modules=["lm_head", "q_proj"])
    Adapter(folder).check_base(own)
    with pytest.raises(UserError, match="changes the output matrix"):
        Adapter(folder).check_base(tied)


def test_a_base_is_identified_by_its_files(base: Path, folder: Path, tmp_path: Path) -> None:
    recorded = with_settings(folder, tmp_path / "recorded")
    made.record(recorded, base)
    Adapter(recorded).check_base(base)
    files = adapters.base_files(base)
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(UserError, match="was trained"):
            Adapter(recorded).check_base(base, hashes={**files, name: "0" * 64})
    other = {**files, "tokenizer.json": "0" * 64}  # not of the model
    Adapter(recorded).check_base(base, hashes=other)
    text = json.loads((recorded / "passport.json").read_text())
    assert text["base"]["files"] == files
