"""GGUF files: dequantized tensor by tensor, with the config and tokenizer their metadata holds.

Only the `llama` architecture is read (LLaMA 1 to 3, SmolLM2, Mistral and others are stored under
that name). GGUF keeps Meta's rotary channel order, so q and k are reordered as for Meta's files.
Format: the GGUF specification, version 3; blocks are decoded by the `gguf` package.
"""

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from alpaca.convert import names
from alpaca.convert.bytelevel import PATTERNS, byte_level
from alpaca.convert.source import Source, Tensor, llama_config, unpermute
from alpaca.convert.vocabulary import Vocabulary
from alpaca.errors import UserError

ROWS_AT_ONCE = 16 << 20  # numbers dequantized in one go: 64 MB of fp32
CONTROL, USER_DEFINED = 3, 4  # token types
# Tensors that are not weights: precomputed rotary tables.
NOT_WEIGHTS = {"rope_freqs.weight"}


def open_gguf(path: Path, name: str) -> Source:
    """Describe a GGUF file as a source; `name` is the folder to write.

    Raises:
        UserError: the file is damaged, or holds a model this program does not know.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as GGUF: {error}", "It is cut short or damaged: fetch it again."
        ) from None
    fields = Fields(path, reader)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(fields, stored)
    tensors = _tensors(path, stored, config)
    vocabulary = _vocabulary(fields)
    kind = _main_type(reader.tensors)
    count = sum(tensor.parameters for tensor in tensors)
    title = fields.get("general.name", path.stem)
    return Source(
        name=name,
        found=f"{title}: GGUF, {count:,} parameters, {kind}, "
        f"tokenizer {vocabulary.pieces:,} pieces",
        files={path: None},
        config=config,
        dtype={"F16": torch.float16, "F32": torch.float32}.get(kind, torch.bfloat16),
        tensors=tensors,
        vocabulary=vocabulary,
        facts={"family": "GGUF llama", "title": title, "quantization": kind, "parameters": count},
    )


class Fields:
    """A GGUF file's metadata by key, with errors that name the key."""

    def __init__(self, path: Path, reader: gguf.GGUFReader) -> None:
        """Read values lazily from an open file."""
        self.path, self._fields = path, reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or `default`."""
        return self._fields[key].contents() if key in self._fields else default

    def need(self, key: str) -> Any:
        """The value of a key; raises UserError where it is missing."""
        if key not in self._fields:
            raise UserError(f"{self.path} lacks the metadata key {key}.", "Is it a model file?")
        return self._fields[key].contents()


def _config(fields: Fields, stored: dict[str, Any]) -> dict[str, Any]:
    architecture = fields.need("general.architecture")
    if architecture != "llama" or fields.get("llama.expert_count", 0):
        experts = " with experts" if architecture == "llama" else ""
        raise UserError(
            f"{fields.path} holds a model of architecture {architecture}{experts}.",
            "From GGUF this program converts dense models of architecture llama.",
        )
    heads = fields.need("llama.attention.head_count")
    width = fields.need("llama.embedding_length")
    return llama_config(
        vocab_size=len(fields.need("tokenizer.ggml.tokens")),
        hidden_size=width,
        intermediate_size=fields.need("llama.feed_forward_length"),
        num_hidden_layers=fields.need("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=fields.get("llama.attention.key_length", width // heads),
        max_position_embeddings=fields.need("llama.context_length"),
        # Stored as fp32: seven digits are what was meant.
        rms_norm_eps=float(f"{fields.need('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_theta=fields.get("llama.rope.freq_base", 10000.0),
        tie_word_embeddings="output.weight" not in stored,
    )


def _tensors(path: Path, stored: dict[str, Any], config: dict[str, Any]) -> tuple[Tensor, ...]:
    layers, tied = config["num_hidden_layers"], config["tie_word_embeddings"]
    wanted = names.to_dialect(layers, tied, "gguf")
    missing = [other for other in wanted.values() if other not in stored]
    unknown = sorted(set(stored) - set(wanted.values()) - NOT_WEIGHTS)
    if missing or unknown:
        fault = f"lacks {missing[0]}" if missing else f"holds {unknown[0]}, which is not known"
        raise UserError(f"{path} {fault}.", "It is damaged, or not a plain llama model.")
    rows = names.rows(layers, tied)
    heads = {
        "self_attn.q_proj": config["num_attention_heads"],
        "self_attn.k_proj": config["num_key_value_heads"],
    }
    return tuple(
        Tensor(
            name,
            tuple(int(size) for size in reversed(stored[other].shape)),
            partial(_read, stored[other], heads.get(rows[name].hf)),
        )
        for name, other in wanted.items()
    )


def _read(stored: Any, rotary_heads: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize one tensor, some rows at a time, into `dtype`."""
    shape = tuple(int(size) for size in reversed(stored.shape))
    out = torch.empty(shape, dtype=dtype)
    rows = max(1, ROWS_AT_ONCE // max(1, shape[-1])) if len(shape) > 1 else shape[0]
    for start in range(0, shape[0], rows):
        values = gguf.dequantize(stored.data[start : start + rows], stored.tensor_type)
        out[start : start + rows] = torch.from_numpy(np.array(values, dtype=np.float32))
    return out if rotary_heads is None else unpermute(out, rotary_heads).reshape(shape)


def _main_type(stored: list[Any]) -> str:
    """The type that holds most of the numbers."""
    totals: dict[str, int] = {}
    for tensor in stored:
        kind = tensor.tensor_type.name
        totals[kind] = totals.get(kind, 0) + int(tensor.n_elements)
    return max(totals, key=lambda kind: totals[kind])


def _vocabulary(fields: Fields) -> Vocabulary:
    kind = fields.need("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UserError(f"{fields.path} has a tokenizer of kind {kind}, which is not known.")
    pattern = fields.get("tokenizer.ggml.pre", "default")
    if pattern not in PATTERNS:
        raise UserError(f"{fields.path} cuts words by the rule {pattern}, which is not known.")
    tokens = fields.need("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in fields.need("tokenizer.ggml.merges")]
    backend = byte_level(
        {token: index for index, token in enumerate(tokens)},
        merges,
        pattern,
        whole_words=pattern in ("llama-bpe", "llama3"),
    )
    types = fields.need("tokenizer.ggml.token_type")
    add_by_type(backend, tokens, types)
    return Vocabulary(
        backend,
        bos=_token(fields, "bos", tokens),
        eos=_token(fields, "eos", tokens) or "",
        unk=_token(fields, "unknown", tokens),
        pad=_token(fields, "padding", tokens),
        adds_bos=bool(fields.get("tokenizer.ggml.add_bos_token", False)),
    )


def add_by_type(backend: Any, tokens: list[str], types: list[int]) -> None:
    """Make control tokens special, and user-defined ones whole."""
    from tokenizers import AddedToken

    for token, kind in zip(tokens, types, strict=True):
        if kind == CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])


def _token(fields: Fields, role: str, tokens: list[str]) -> str | None:
    index = fields.get(f"tokenizer.ggml.{role}_token_id")
    return None if index is None else tokens[index]
