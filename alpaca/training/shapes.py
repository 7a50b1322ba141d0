"""The shape of a decoder: what its weights are, counted without building it.

A plan must be made where neither the weights nor the memory for them exist, so a model is known
by its config.json, or by the name people call it. The tensors are those of transformers' LLaMA,
Mistral and Qwen models; for a folder with weights the count is checked against the files.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpaca import architectures
from alpaca.errors import UserError


@dataclass(frozen=True)
class Shape:
    """A decoder: widths in numbers, as config.json names them."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    def layer(self) -> dict[str, tuple[int, ...]]:
        """Names, below `model.layers.N.`, and shapes of one layer's tensors, in order."""
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        found: dict[str, tuple[int, ...]] = {}
        for name, size in (("q", queries), ("k", keys), ("v", keys)):
            found[f"self_attn.{name}_proj.weight"] = (size, self.width)
            if self.qkv_bias:
                found[f"self_attn.{name}_proj.bias"] = (size,)
        found["self_attn.o_proj.weight"] = (self.width, queries)
        if self.qk_norm:
            found |= {f"self_attn.{name}_norm.weight": (self.head,) for name in ("q", "k")}
        return found | {
            "mlp.gate_proj.weight": (self.intermediate, self.width),
            "mlp.up_proj.weight": (self.intermediate, self.width),
            "mlp.down_proj.weight": (self.width, self.intermediate),
            "input_layernorm.weight": (self.width,),
            "post_attention_layernorm.weight": (self.width,),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors; a tied output matrix is the embedding, stored once."""
        layers = {
            f"model.layers.{number}.{name}": shape
            for number in range(self.layers)
            for name, shape in self.layer().items()
        }
        table = (self.vocabulary, self.width)
        head = {} if self.tied else {"lm_head.weight": table}
        return {
            "model.embed_tokens.weight": table,
            **layers,
            "model.norm.weight": (self.width,),
            **head,
        }

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        return sum(math.prod(shape) for shape in self.layer().values())

    @property
    def table_parameters(self) -> int:
        """Parameters of the embedding, which has the size of the output matrix."""
        return self.vocabulary * self.width

    @property
    def root_parameters(self) -> int:
        """Parameters outside the layers: embedding, last norm, output matrix unless tied."""
        return self.table_parameters * (1 if self.tied else 2) + self.width

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.layers * self.layer_parameters + self.root_parameters


def _llama(vocabulary: int, width: int, layers: int, heads: int, kv: int, inner: int) -> Shape:
    return Shape(vocabulary, width, layers, heads, kv, width // heads, inner)


# From the params.json that Meta published with each model, and for SmolLM2 its config.json.
KNOWN = {
    "llama-7b": _llama(32000, 4096, 32, 32, 32, 11008),
    "llama-13b": _llama(32000, 5120, 40, 40, 40, 13824),
    "llama-30b": _llama(32000, 6656, 60, 52, 52, 17920),
    "llama-65b": _llama(32000, 8192, 80, 64, 64, 22016),
    "llama-2-7b": _llama(32000, 4096, 32, 32, 32, 11008),
    "llama-2-13b": _llama(32000, 5120, 40, 40, 40, 13824),
    "llama-2-70b": _llama(32000, 8192, 80, 64, 8, 28672),
    "llama-3-8b": _llama(128256, 4096, 32, 32, 8, 14336),
    "llama-3-70b": _llama(128256, 8192, 80, 64, 8, 28672),
    "llama-3.1-8b": _llama(128256, 4096, 32, 32, 8, 14336),
    "llama-3.1-70b": _llama(128256, 8192, 80, 64, 8, 28672),
    "llama-3.1-405b": _llama(128256, 16384, 126, 128, 8, 53248),
    "llama-3.2-1b": Shape(128256, 2048, 16, 32, 8, 64, 8192, tied=True),
    "llama-3.2-3b": Shape(128256, 3072, 28, 24, 8, 128, 8192, tied=True),
    "smollm2-135m": Shape(49152, 576, 30, 9, 3, 64, 1536, tied=True),
}


def find(model: Path) -> Shape:
    """The shape of a model folder, or of a model known by name where there is no such folder.

    Raises:
        UserError: neither, or a config.json this program can't count.
    """
    config = model / "config.json"
    if config.is_file():
        try:
            described = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{config} is damaged: {error}", "Write the folder again.") from None
        architectures.check(described, config)
        shape = from_config(described, config)
        check_count(shape, model)
        return shape
    if model.name.lower() in KNOWN:
        return KNOWN[model.name.lower()]
    raise UserError(
        f"There is no model folder {model}, and no model is known by that name.",
        f"Known: {', '.join(KNOWN)}; or name a folder with a config.json.",
    )


def from_config(config: dict[str, Any], where: Path) -> Shape:
    """Read what config.json says; `where` is named in the error."""
    try:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        kind = config.get("model_type", "llama")
        return Shape(
            vocabulary=config["vocab_size"],
            width=width,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head=config.get("head_dim") or width // heads,
            intermediate=config["intermediate_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
        )
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{where} describes no decoder that can be planned: {what}.",
            "LLaMA, SmolLM2, Mistral and Qwen models can; give --skip_plan to train anyway.",
        ) from None


def check_count(shape: Shape, folder: Path) -> None:
    """Refuse a folder whose weights are not those that its config.json describes."""
    held = stored(folder)
    if held and sum(held.values()) != shape.parameters:
        raise UserError(
            f"{folder}: config.json describes {shape.parameters:,} parameters, the files hold "
            f"{sum(held.values()):,}.",
            "Is a shard missing? Give --skip_plan if the model has parts a plan doesn't know.",
        )


def stored(folder: Path) -> dict[str, int]:
    """Elements of each tensor in the folder's safetensors files, read from their headers.

    The format: 8 bytes with the length of a JSON header, the header, the data
    (huggingface/safetensors, README, "Format").

    Raises:
        UserError: a file without such a header.
    """
    found: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, path.stat().st_size)))
            found |= {
                name: math.prod(entry["shape"])
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (struct.error, ValueError, AttributeError, KeyError, TypeError):
            raise UserError(
                f"{path} is damaged: its header can't be read.", "Copy or convert the folder again."
            ) from None
    return found
