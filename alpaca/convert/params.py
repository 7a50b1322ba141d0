"""Read Meta's `params.json`, check it against the published models, and make a config of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpaca.convert import families
from alpaca.convert.families import Published, Tokenizer
from alpaca.convert.source import llama_config
from alpaca.errors import UserError

NEEDED = {"dim": int, "n_layers": int, "n_heads": int, "norm_eps": float}
OPTIONAL = {
    "n_kv_heads": int,
    "vocab_size": int,
    "multiple_of": int,
    "ffn_dim_multiplier": float,
    "rope_theta": float,
    "use_scaled_rope": bool,
    "rope_scaling_factor": float,
    "max_batch_size": int,
    "max_seq_len": int,
}
REFUSED = {
    "quantization_args": "a quantized checkpoint",
    "lora_args": "a LoRA checkpoint",
    "vision_chunk_size": "a model with vision",
    "vision_model": "a model with vision",
    "moe": "a mixture of experts",
    "moe_args": "a mixture of experts",
}
# Far above every published number; keeps a damaged file from causing huge allocations.
LARGEST = 1 << 20


@dataclass(frozen=True)
class Params:
    """A checked `params.json` with defaults filled in."""

    path: Path
    dim: int
    layers: int
    heads: int
    kv_heads: int
    norm_eps: float
    vocab: int  # -1: as many as the tokenizer has
    multiple_of: int
    ffn_multiplier: float | None
    theta: float | None
    scaled: bool
    scaling_factor: float | None

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.heads

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward layer: 2/3 of 4 dim, scaled, rounded up (Meta's model.py)."""
        width = int(2 * 4 * self.dim / 3)
        if self.ffn_multiplier is not None:
            width = int(self.ffn_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of


def read_params(path: Path) -> Params:
    """Read and check one file.

    Raises:
        UserError: it is missing, is not JSON, lacks a number, or describes an unsupported model.
    """
    raw = _read(path)
    for key, what in REFUSED.items():
        if raw.get(key) not in (None, False, -1):
            raise UserError(
                f"{path} describes {what} ({key}).", "Only plain text models can be converted."
            )
    for key, kind in (NEEDED | OPTIONAL).items():
        _check_number(path, raw, key, kind)
    unknown = sorted(set(raw) - set(NEEDED) - set(OPTIONAL) - set(REFUSED))
    if unknown:
        raise UserError(f"{path} holds the unknown key {unknown[0]}.")
    params = Params(
        path=path,
        dim=raw["dim"],
        layers=raw["n_layers"],
        heads=raw["n_heads"],
        kv_heads=raw.get("n_kv_heads") or raw["n_heads"],
        norm_eps=float(raw["norm_eps"]),
        vocab=raw.get("vocab_size", -1),
        multiple_of=raw.get("multiple_of", 256),
        ffn_multiplier=raw.get("ffn_dim_multiplier"),
        theta=raw.get("rope_theta"),
        scaled=raw.get("use_scaled_rope") or False,
        scaling_factor=raw.get("rope_scaling_factor"),
    )
    if params.dim % params.heads or params.heads % params.kv_heads or params.head_dim % 2:
        raise UserError(
            f"{path}: {params.dim} channels, {params.heads} heads and {params.kv_heads} key-value "
            "heads do not divide evenly.",
            "The file is damaged, or belongs to another model.",
        )
    return params


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path} is missing.", "It came with consolidated.00.pth; put it into the same folder."
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path} is not JSON: {error}", "Fetch the file again.") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a JSON object.", "Fetch the file again.")
    return raw


def _check_number(path: Path, raw: dict[str, Any], key: str, kind: type) -> None:
    value = raw.get(key)
    if value is None:
        if key in NEEDED:
            raise UserError(f"{path} lacks {key}.", "Fetch the file again.")
        return
    fits = isinstance(value, (int, float) if kind is float else kind)
    if kind is not bool:
        fits = fits and not isinstance(value, bool) and (0 < value < LARGEST)
        fits = fits or (key == "vocab_size" and value == -1)
    if not fits:
        raise UserError(f"{path}: {key} cannot be {value!r}.", "Fetch the file again.")


def recognize(params: Params, tokenizer: Tokenizer, name: str) -> tuple[str, Published | None]:
    """The family, and the published model that this is, if any.

    Raises:
        UserError: width and depth match a published model, but other numbers do not.
    """
    family = families.guess_family(
        tokenizer=tokenizer,
        dim=params.dim,
        kv_heads=params.kv_heads,
        norm_eps=params.norm_eps,
        scaled=params.scaled,
        name=name,
    )
    candidates = families.similar(params.dim, params.layers, tokenizer)
    if not candidates:
        return family, None
    mine = (params.heads, params.kv_heads, params.intermediate)
    same = [one for one in candidates if (one.heads, one.kv_heads, one.intermediate) == mine]
    known_eps = params.norm_eps in (1e-5, 1e-6)
    known_theta = params.theta in (None, families.THETA[tokenizer], 1e6)
    if not same or not known_eps or not known_theta:
        one = (same or candidates)[0]
        raise UserError(
            f"{params.path} says n_heads {params.heads}, n_kv_heads {params.kv_heads}, "
            f"feed-forward width {params.intermediate}, norm_eps {params.norm_eps}, rope_theta "
            f"{params.theta}; {one.family} {one.size}, of the same width and depth, has "
            f"{one.heads}, {one.kv_heads}, {one.intermediate}, {one.norm_eps}, "
            f"{families.THETA[tokenizer]}.",
            "The file is damaged, or belongs to another model: fetch it again.",
        )
    return family, next((one for one in same if one.family == family), same[0])


def config(
    params: Params, family: str, tokenizer: Tokenizer, vocab: int, tied: bool
) -> dict[str, Any]:
    """config.json of a Meta checkpoint."""
    theta = float(params.theta or families.THETA[tokenizer])
    code_llama = tokenizer == "sentencepiece" and theta == 1e6
    return llama_config(
        vocab_size=vocab,
        hidden_size=params.dim,
        intermediate_size=params.intermediate,
        num_hidden_layers=params.layers,
        num_attention_heads=params.heads,
        num_key_value_heads=params.kv_heads,
        head_dim=params.head_dim,
        max_position_embeddings=16384 if code_llama else families.context(family),
        rms_norm_eps=params.norm_eps,
        rope_theta=theta,
        rope_scaling=llama3_scaling(_factor(params, family)) if params.scaled else None,
        tie_word_embeddings=tied,
    )


def _factor(params: Params, family: str) -> float:
    return params.scaling_factor or (32.0 if family == "Llama 3.2" else 8.0)


def llama3_scaling(factor: float) -> dict[str, Any]:
    """RoPE scaling of Llama 3.1 and later (Grattafiori et al. 2024; Meta's `apply_scaling`)."""
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
