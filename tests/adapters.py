"""Adapters made by peft over tiny models of several families, and what peft computes with them."""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import set_eos
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from alpaca import adapter as adapters
from alpaca import passport
from alpaca.folder import load_tokenizer
from alpaca.golden import PROMPTS
from alpaca.tokens import Codec

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 104,  # no power of two, and no multiple of 16
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama, tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama, odd": (LlamaConfig, LlamaForCausalLM,
                   {"hidden_size": 42, "head_dim": 14, "num_attention_heads": 3,
                    "num_key_value_heads": 1, "intermediate_size": 67}),
    "llama, biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """Settings of an adapter, for `LoraConfig`."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


KINDS = (
    Kind("lora"),
    Kind("rslora", {"use_rslora": True}),
    Kind("dora", {"use_dora": True}),
    Kind("patterns", {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
                      "alpha_pattern": {"q_proj": 5, "1.mlp.up_proj": 3}}),
    Kind("rsdora", {"use_rslora": True, "use_dora": True}),
    Kind("attention", {"target_modules": ["q_proj", "v_proj"]}),
)  # fmt: skip


def make_base(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A model folder with random weights, norms and biases too."""
    config_class, architecture, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(vocab_size=len(tokenizer), **{**SHAPE, **extra})
    set_eos(config, tokenizer)
    model = architecture(config)
    for parameter in model.parameters():  # biases and norms start at 0 and 1, which hides them
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def allowed_warnings() -> Iterator[None]:
    """peft 0.21 reads a property of models that transformers 5.23 has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def make_adapter(
    folder: Path, base: Path, *, recorded: bool = False, seed: int = 1, **settings: Any
) -> Path:
    """An adapter of `base` with random matrices, as peft saves it.

    `recorded`: with a passport that names the base by its hashes, as train.py writes one.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    with allowed_warnings():
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **given))
    torch.manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    if recorded:
        record(folder, base)
    return folder


def record(folder: Path, base: Path, made_by: str = "test", **facts: Any) -> None:
    """Write the adapter's passport."""
    (folder / passport.NAME).unlink(missing_ok=True)
    files = adapters.base_files(base)
    passport.write(folder, made_by, base={"folder": base.name, "files": files}, **facts)


def with_settings(source: Path, folder: Path, **settings: Any) -> Path:
    """A copy of an adapter with other settings in its adapter_config.json."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def peft_model(base: Path, folder: Path, dtype: torch.dtype) -> Any:
    """Base and adapter, as peft loads them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with allowed_warnings():
        tuned = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    return tuned.to(dtype)


def peft_merged(base: Path, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors that peft's merge_and_unload makes in `dtype`."""
    merged = peft_model(base, folder, dtype).merge_and_unload()
    return {name: copy.deepcopy(value.detach()) for name, value in merged.named_parameters()}


@torch.no_grad()
def logits(model: Any, folder: Path) -> list[torch.Tensor]:
    """A model's logits after each golden prompt, tokenized by the tokenizer in `folder`."""
    codec = Codec(load_tokenizer(folder))
    ids = [codec.prompt(instruction, given) for instruction, given in PROMPTS]
    return [model(torch.tensor([one])).logits[0, -1] for one in ids]
