"""The shape of a decoder: its tensors and parameters, counted without building it.

A plan must work without the weights and without the memory for them. So a model is described by
its config.json, or by a well-known name. The tensors are those of transformers' LLaMA, Mistral and
Qwen models; for a folder with weights they are compared with its files.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpaca import layout, stored
from alpaca.errors import UserError


@dataclass(frozen=True)
class Shape:
    """The sizes and options of a decoder, from its config.json."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
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
        if self.o_bias:
            found["self_attn.o_proj.bias"] = (self.width,)
        if self.qk_norm:
            found |= {f"self_attn.{name}_norm.weight": (self.head,) for name in ("q", "k")}
        wide, narrow = self.intermediate, self.width
        for name, rows, columns in (
            ("gate", wide, narrow),
            ("up", wide, narrow),
            ("down", narrow, wide),
        ):
            found[f"mlp.{name}_proj.weight"] = (rows, columns)
            if self.mlp_bias:
                found[f"mlp.{name}_proj.bias"] = (rows,)
        return found | {
            "input_layernorm.weight": (self.width,),
            "post_attention_layernorm.weight": (self.width,),
        }

    def linear(self) -> dict[str, tuple[int, int]]:
        """Names below `model.layers.N.`, without `.weight`, and shapes (out, in) of matrices."""
        return {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in self.layer().items()
            if len(shape) == 2
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


# Values of model_type whose tensors a Shape describes, and those whose config.json sets biases.
PLANNED = ("llama", "ministral", "ministral3", "mistral", "qwen2", "qwen3", "smollm3")
BIASED = ("llama", "qwen3", "smollm3")


def find(model: Path) -> Shape:
    """The shape of a model folder, or of a model known by name where there is no such folder.

    Raises:
        UserError: neither exists, or the config.json describes a model that is not counted here.
    """
    stored.check_adapter(model)
    config = model / "config.json"
    if config.is_file():
        described = stored.read_json(config)
        stored.check_config(described, config)
        shape = from_config(described, config)
        check_tensors(shape, model)
        return shape
    if model.name.lower() in KNOWN:
        return KNOWN[model.name.lower()]
    raise UserError(
        f"There is no model folder {model}, and no known model has that name.",
        f"Known: {', '.join(KNOWN)}; or name a folder with a config.json.",
    )


def from_config(config: dict[str, Any], where: Path) -> Shape:
    """Read a config.json; `where` is its path, for the error message."""
    try:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        kind = config.get("model_type", "llama")
        if kind not in PLANNED:
            raise TypeError(f"models of type {kind} are not supported")
        biased = kind in BIASED and bool(config.get("attention_bias", False))
        return Shape(
            vocabulary=config["vocab_size"],
            width=width,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head=config.get("head_dim") or width // heads,
            intermediate=config["intermediate_size"],
            tied=stored.is_tied(config),
            qkv_bias=kind == "qwen2" or biased,
            o_bias=biased,
            mlp_bias=kind in ("llama", "smollm3") and bool(config.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
        )
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{where} does not describe a decoder that can be planned: {what}.",
            "LLaMA, SmolLM2, Mistral and Qwen models can; use --skip_plan to train anyway.",
        ) from None


def check_tensors(shape: Shape, folder: Path) -> None:
    """Refuse a folder whose weights are not those that its config.json describes."""
    if any(True for kind in ("*.safetensors", f"*{layout.INDEX}") for _ in folder.glob(kind)):
        stored.check_fit(folder, stored.tensors(folder), shape.tensors())
