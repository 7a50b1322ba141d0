"""Golden logits are the model's own, and tell of one weight changed by one percent."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import set_eos
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from alpaca import golden

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SCALED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "llama-3.2": (LlamaConfig, LlamaForCausalLM,
                  {"tie_word_embeddings": True, "rope_parameters": SCALED}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(
    name: str, bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    kind, architecture, extra = MODELS[name]
    torch.manual_seed(1)
    config = kind(vocab_size=len(bpe), **SHAPE, **extra)
    set_eos(config, bpe)
    model = architecture(config)
    for parameter in model.parameters():  # biases and norms start at 0 and 1, which hides them
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    bpe.save_pretrained(tmp_path)
    kept = golden.record(tmp_path)
    assert kept is not None
    assert len(kept) == 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for one in kept:
        with torch.no_grad():
            logits = loaded(torch.tensor([one["ids"]])).logits[0, -1]
        mine = torch.tensor([one["logits"][str(i)] for i in logits.topk(8).indices.tolist()])
        assert logits.std() > 0.1
        assert torch.allclose(mine.double(), logits.topk(8).values.double(), atol=1e-4)


def test_logits_are_computed_on_all_cores_and_the_threads_put_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun gives each rank
    try:
        with golden.all_cores():
            assert torch.get_num_threads() == golden.cores()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def answers(folder: Path) -> list[dict[str, Any]]:
    return golden.answers(folder, golden.Float64Weights(folder))


def test_one_weight_of_any_tensor_changed_by_one_percent_is_seen(
    tiny_model: Path, bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    kept = answers(tiny_model)
    assert golden.differences(kept, answers(tiny_model)) == []
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    tensors = load_file(tiny_model / "model.safetensors")
    chance = random.Random(0)
    used = sorted({i for one in kept for i in one["ids"]})
    kinds = {re.sub(r"layers\.\d+", "layers.1", name) for name in tensors}
    assert len(kinds) == 12
    for name in sorted(kinds):
        changed = {other: tensor.clone() for other, tensor in tensors.items()}
        rows = used if "embed" in name else range(len(tensors[name]))
        place = chance.choice(list(rows)), *(chance.randrange(n) for n in tensors[name].shape[1:])
        changed[name][place] *= 1.01
        save_file(changed, tmp_path / "model.safetensors")
        told = golden.differences(kept, answers(tmp_path))
        assert told, f"{name}{place} was not seen"


def test_a_model_of_another_kind_has_no_golden_logits_and_is_told(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"llama"', '"gemma"'))
    assert golden.record(tmp_path) is None
    assert "models of type gemma are not supported" in capsys.readouterr().out
