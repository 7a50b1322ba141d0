"""Rebuild config and tokenizer from the metadata of a GGUF file (llama.cpp's keys).

Format: the GGUF specification, version 3. The norm epsilon is stored as fp32; it is rounded to six
digits to restore the published value.
"""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer

from alpaca.convert.bytelevel import PATTERNS, byte_level
from alpaca.convert.params import llama3_scaling
from alpaca.convert.sentencepieces import sentencepiece_bpe
from alpaca.convert.source import llama_config
from alpaca.description import Vocabulary
from alpaca.errors import UserError

CONTROL, USER_DEFINED = 3, 4  # token types
ROPE_FACTORS = "rope_freqs.weight"  # the tensor in which llama.cpp stores Llama 3.1's RoPE scaling


class Fields:
    """A GGUF file's metadata by key; errors name the key."""

    def __init__(self, path: Path, reader: gguf.GGUFReader) -> None:
        """Read values lazily from an open file."""
        self.path, self._fields = path, reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or `default`; raises UserError if it cannot be read."""
        if key not in self._fields:
            return default
        try:
            return self._fields[key].contents()
        except (ValueError, IndexError) as error:  # a UnicodeDecodeError is a ValueError
            raise UserError(f"{self.path}: {key} is damaged: {error}", "Fetch it again.") from None

    def need(self, key: str) -> Any:
        """The value of a key; raises UserError if it is missing."""
        if key not in self._fields:
            raise UserError(
                f"{self.path} lacks the metadata key {key}.", "Check that it is a model file."
            )
        return self.get(key)


def read_config(fields: Fields, stored: dict[str, Any]) -> dict[str, Any]:
    """config.json from the metadata and the tensors; raises UserError if it cannot be built."""
    architecture = fields.need("general.architecture")
    if architecture != "llama" or fields.get("llama.expert_count", 0):
        experts = " with experts" if architecture == "llama" else ""
        raise UserError(
            f"{fields.path} holds a model of architecture {architecture}{experts}.",
            "Only dense models of architecture llama can be converted from GGUF.",
        )
    heads = fields.need("llama.attention.head_count")
    width = fields.need("llama.embedding_length")
    theta = fields.get("llama.rope.freq_base", 10000.0)
    head_dim = fields.get("llama.attention.key_length", width // heads)
    return llama_config(
        vocab_size=int(stored["token_embd.weight"].shape[1])
        if "token_embd.weight" in stored
        else len(fields.need("tokenizer.ggml.tokens")),
        hidden_size=width,
        intermediate_size=fields.need("llama.feed_forward_length"),
        num_hidden_layers=fields.need("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=fields.need("llama.context_length"),
        rms_norm_eps=float(f"{fields.need('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_theta=theta,
        rope_scaling=_scaling(fields, stored.get(ROPE_FACTORS), theta, head_dim),
        tie_word_embeddings="output.weight" not in stored,
    )


def _scaling(fields: Fields, factors: Any, theta: float, head_dim: int) -> dict[str, Any] | None:
    kind = fields.get("llama.rope.scaling.type", "none")
    if factors is not None:
        divisors = np.array(factors.data, dtype=np.float64)
        scaling = llama3_scaling(float(divisors.max()))
        if not np.allclose(divisors, llama3_factors(scaling, theta, head_dim), rtol=1e-4):
            raise UserError(f"{fields.path} uses a RoPE scaling other than Llama 3.1's.")
        return scaling
    if kind == "none":
        return None
    if kind != "linear":
        raise UserError(f"{fields.path} uses an unknown RoPE scaling: {kind}.")
    return {"rope_type": "linear", "factor": float(fields.need("llama.rope.scaling.factor"))}


def llama3_factors(scaling: dict[str, Any], theta: float, head_dim: int) -> np.ndarray[Any, Any]:
    """Divisor of each rotary frequency, (head_dim / 2,), in Llama 3.1's scaling."""
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: np.ndarray[Any, Any] = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return factors


def read_vocabulary(fields: Fields) -> Vocabulary:
    """The tokenizer in the metadata; raises UserError if its kind is unknown."""
    tokens = fields.need("tokenizer.ggml.tokens")
    kind = fields.need("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{fields.path} has an unknown kind of tokenizer: {kind}.")
    backend = (_byte_level if kind == "gpt2" else _sentencepiece)(fields, tokens)
    roles = {
        role: _token(fields, role, tokens) for role in ("bos", "eos", "unknown", "padding", "eot")
    }
    if roles["eos"] is None:
        raise UserError(f"{fields.path} does not define the token that ends a text.")
    return Vocabulary(
        backend,
        bos=roles["bos"],
        eos=roles["eos"],
        unk=roles["unknown"],
        pad=roles["padding"],
        # Without this key, SentencePiece vocabularies add a BOS, as in llama.cpp.
        adds_bos=bool(fields.get("tokenizer.ggml.add_bos_token", kind == "llama")),
    )


def _byte_level(fields: Fields, tokens: list[str]) -> Tokenizer:
    pattern = fields.get("tokenizer.ggml.pre", "default")
    if pattern not in PATTERNS:
        raise UserError(f"{fields.path} uses an unknown pre-tokenizer: {pattern}.")
    backend = byte_level(
        {token: index for index, token in enumerate(tokens)},
        [tuple(merge.split(" ", 1)) for merge in fields.need("tokenizer.ggml.merges")],
        pattern,
        whole_words=pattern in ("llama-bpe", "llama3"),
    )
    for token, kind in zip(tokens, fields.need("tokenizer.ggml.token_type"), strict=True):
        if kind == CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    return backend


def _sentencepiece(fields: Fields, tokens: list[str]) -> Tokenizer:
    scores = fields.need("tokenizer.ggml.scores")
    kinds = fields.need("tokenizer.ggml.token_type")
    return sentencepiece_bpe(
        list(zip(tokens, scores, kinds, strict=True)),
        leading_space=bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
    )


def _token(fields: Fields, role: str, tokens: list[str]) -> str | None:
    index = fields.get(f"tokenizer.ggml.{role}_token_id")
    return None if index is None or index >= len(tokens) else tokens[index]
