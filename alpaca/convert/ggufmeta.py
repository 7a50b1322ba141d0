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
from alpaca.convert.params import LARGEST, llama3_scaling
from alpaca.convert.sentencepieces import sentencepiece_bpe
from alpaca.convert.source import llama_config
from alpaca.description import Vocabulary
from alpaca.errors import UserError

LONGEST = 1 << 28  # tokens of context; published models have up to ten million
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

    def integer(self, key: str, default: int | None = None, most: int = LARGEST) -> int:
        """A number from 1 to `most`; raises UserError for anything else."""
        value = self.need(key) if default is None else self.get(key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.wrong(key, value)
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; raises UserError for anything else."""
        value = self.need(key) if default is None else self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.wrong(key, value)
        return float(value)

    def array(self, key: str, kind: type, count: int | None = None) -> list[Any]:
        """A list of values of one type, `count` of them if given; else raises UserError."""
        value = self.need(key)
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self.wrong(key, value)
        if count is not None and len(value) != count:
            raise UserError(
                f"{self.path}: {key} has {len(value):,} entries, not {count:,}.", "Fetch it again."
            )
        return value

    def wrong(self, key: str, value: object) -> UserError:
        """The error for a value that cannot be."""
        return UserError(f"{self.path}: {key} cannot be {repr(value)[:60]}.", "Fetch it again.")


def read_config(fields: Fields, stored: dict[str, Any]) -> dict[str, Any]:
    """config.json from the metadata and the tensors; raises UserError if it cannot be built."""
    architecture = fields.need("general.architecture")
    if architecture != "llama" or fields.get("llama.expert_count", 0):
        experts = " with experts" if architecture == "llama" else ""
        raise UserError(
            f"{fields.path} holds a model of architecture {architecture}{experts}.",
            "Only dense models of architecture llama can be converted from GGUF.",
        )
    heads = fields.integer("llama.attention.head_count")
    kv_heads = fields.integer("llama.attention.head_count_kv", heads)
    width = fields.integer("llama.embedding_length")
    theta = fields.real("llama.rope.freq_base", 10000.0)
    head_dim = fields.integer("llama.attention.key_length", max(1, width // heads))
    if heads % kv_heads or head_dim % 2:
        raise UserError(
            f"{fields.path}: {width} channels, {heads} heads and {kv_heads} key-value heads of "
            f"{head_dim} channels do not divide evenly.",
            "The file is damaged: fetch it again.",
        )
    return llama_config(
        vocab_size=_rows(fields, stored),
        hidden_size=width,
        intermediate_size=fields.integer("llama.feed_forward_length"),
        # Every layer has tensors, so a damaged number cannot make a table of a million layers.
        num_hidden_layers=fields.integer("llama.block_count", most=max(1, len(stored))),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.integer("llama.context_length", most=LONGEST),
        rms_norm_eps=float(f"{fields.real('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_theta=theta,
        rope_scaling=_scaling(fields, stored.get(ROPE_FACTORS), theta, head_dim),
        tie_word_embeddings="output.weight" not in stored,
    )


def _rows(fields: Fields, stored: dict[str, Any]) -> int:
    """Rows of the embedding: the size of the vocabulary."""
    if "token_embd.weight" not in stored:
        return len(fields.array("tokenizer.ggml.tokens", str))
    shape = stored["token_embd.weight"].shape
    if len(shape) != 2 or not 1 <= shape[1] <= LARGEST:
        raise fields.wrong("the shape of token_embd.weight", [int(size) for size in shape])
    return int(shape[1])


def _scaling(fields: Fields, factors: Any, theta: float, head_dim: int) -> dict[str, Any] | None:
    kind = fields.get("llama.rope.scaling.type", "none")
    if factors is not None:
        divisors = np.array(factors.data, dtype=np.float64)
        if divisors.shape != (head_dim // 2,):
            raise fields.wrong(ROPE_FACTORS, divisors.shape)
        scaling = llama3_scaling(float(divisors.max()))
        if not np.allclose(divisors, llama3_factors(scaling, theta, head_dim), rtol=1e-4):
            raise UserError(f"{fields.path} uses a RoPE scaling other than Llama 3.1's.")
        return scaling
    if kind == "none":
        return None
    if kind != "linear":
        raise UserError(f"{fields.path} uses an unknown RoPE scaling: {kind}.")
    return {"rope_type": "linear", "factor": fields.real("llama.rope.scaling.factor")}


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
    tokens = fields.array("tokenizer.ggml.tokens", str)
    kind = fields.need("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise fields.wrong("tokenizer.ggml.model", kind)
    try:
        backend = (_byte_level if kind == "gpt2" else _sentencepiece)(fields, tokens)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises plain Exceptions for what it cannot build
        raise UserError(
            f"{fields.path}: the tokenizer in its metadata is damaged: {error}", "Fetch it again."
        ) from None
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
    if not isinstance(pattern, str) or pattern not in PATTERNS:
        raise fields.wrong("tokenizer.ggml.pre", pattern)
    kinds = fields.array("tokenizer.ggml.token_type", int, len(tokens))
    merges = [merge.split(" ", 1) for merge in fields.array("tokenizer.ggml.merges", str)]
    backend = byte_level(
        {token: index for index, token in enumerate(tokens)},
        [(left, right) for left, right in merges],
        pattern,
        whole_words=pattern in ("llama-bpe", "llama3"),
    )
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    return backend


def _sentencepiece(fields: Fields, tokens: list[str]) -> Tokenizer:
    scores = fields.array("tokenizer.ggml.scores", float, len(tokens))
    kinds = fields.array("tokenizer.ggml.token_type", int, len(tokens))
    return sentencepiece_bpe(
        list(zip(tokens, scores, kinds, strict=True)),
        leading_space=bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
    )


def _token(fields: Fields, role: str, tokens: list[str]) -> str | None:
    index = fields.get(f"tokenizer.ggml.{role}_token_id")
    if index is None:
        return None
    if type(index) is not int:
        raise fields.wrong(f"tokenizer.ggml.{role}_token_id", index)
    return tokens[index] if 0 <= index < len(tokens) else None
