"""Read GGUF files: dequantize each tensor; take config and tokenizer from the metadata.

Only the `llama` architecture is supported (LLaMA 1 to 3, SmolLM2, Mistral and others use that
name). GGUF keeps Meta's rotary channel order, so q and k are reordered as for Meta's files.
Format: the GGUF specification, version 3. The `gguf` package decodes the blocks.
"""

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from alpaca.convert import ggufheader, names
from alpaca.convert.ggufmeta import ROPE_FACTORS, Fields, read_config, read_vocabulary
from alpaca.convert.source import Source, Tensor, unpermute
from alpaca.errors import UserError

NUMBERS_AT_ONCE = 16 << 20  # numbers dequantized at a time: 64 MB of fp32
FLOAT_TYPES = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16}


def open_gguf(paths: list[Path], name: str) -> Source:
    """Describe a GGUF model in one file or several; `name` is that of the folder to write.

    Raises:
        UserError: a file is damaged or missing, or the model is of an unknown kind.
    """
    readers = [_open(path) for path in paths]
    fields = Fields(paths[0], readers[0])
    _check_count(paths, fields)
    stored = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    config = read_config(fields, stored)
    tensors = _tensors(paths[0], stored, config)
    vocabulary = read_vocabulary(fields)
    kind = _main_type(list(stored.values()))
    count = sum(tensor.parameters for tensor in tensors)
    title = str(fields.get("general.name", paths[0].stem))
    return Source(
        name=name,
        found=f"{title}: GGUF, {count:,} parameters, {kind}, "
        f"tokenizer {vocabulary.pieces:,} pieces",
        files=dict.fromkeys(paths),
        config=config,
        dtype=FLOAT_TYPES.get(kind, torch.bfloat16),
        tensors=tensors,
        vocabulary=vocabulary,
        facts={"family": "GGUF llama", "title": title, "quantization": kind, "parameters": count},
    )


def _open(path: Path) -> gguf.GGUFReader:
    try:
        ggufheader.check(path)
        reader = gguf.GGUFReader(path)
    except Exception as error:  # on a damaged file, the reader can raise almost anything
        raise UserError(
            f"{path} cannot be read as GGUF: {error}", "It is cut short or damaged: fetch it again."
        ) from None
    size = path.stat().st_size
    for tensor in reader.tensors:
        if int(tensor.data_offset) + int(tensor.n_bytes) > size:
            raise UserError(f"{path} is cut short at {tensor.name}.", "Fetch it again.")
    return reader


def _check_count(paths: list[Path], fields: Fields) -> None:
    """Raise UserError unless there are as many files as the first one says."""
    count = fields.get("split.count", 1) or 1
    if len(paths) != count:
        raise UserError(
            f"{paths[0].name} is one of {count} GGUF files, but "
            f"{paths[0].parent} holds {len(paths)}.",
            "Put all files of one model, and no others, into one folder.",
        )


def _tensors(path: Path, stored: dict[str, Any], config: dict[str, Any]) -> tuple[Tensor, ...]:
    layers, tied = config["num_hidden_layers"], config["tie_word_embeddings"]
    wanted = names.to_dialect(layers, tied, "gguf")
    missing = [gguf_name for gguf_name in wanted.values() if gguf_name not in stored]
    unknown = sorted(set(stored) - set(wanted.values()) - {ROPE_FACTORS})
    if missing or unknown:
        fault = f"lacks {missing[0]}" if missing else f"holds the unknown tensor {unknown[0]}"
        raise UserError(f"{path} {fault}.", "The file is damaged, or not a plain llama model.")
    rows = names.rows(layers, tied)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    return tuple(
        Tensor(
            name,
            _shape(stored[gguf_name]),
            FLOAT_TYPES.get(stored[gguf_name].tensor_type.name),
            partial(_read, stored[gguf_name], heads.get(row.gguf)),
        )
        for (name, gguf_name), row in zip(wanted.items(), rows.values(), strict=True)
    )


def _shape(stored: Any) -> tuple[int, ...]:
    """Shape in PyTorch's order; GGUF lists the fastest-varying dimension first."""
    return tuple(int(size) for size in reversed(stored.shape))


def _read(stored: Any, rotary_heads: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize one tensor to `dtype`, a few rows at a time."""
    shape = _shape(stored)
    out = torch.empty(shape, dtype=dtype)
    step = max(1, NUMBERS_AT_ONCE // shape[-1]) if len(shape) > 1 else shape[0]
    for start in range(0, shape[0], step):
        values = gguf.dequantize(stored.data[start : start + step], stored.tensor_type)
        out[start : start + step] = torch.from_numpy(np.array(values, dtype=np.float32))
    return out if rotary_heads is None else unpermute(out, rotary_heads).reshape(shape)


def _main_type(stored: list[Any]) -> str:
    """The type of most of the numbers."""
    totals: dict[str, int] = {}
    for tensor in stored:
        kind = tensor.tensor_type.name
        totals[kind] = totals.get(kind, 0) + int(tensor.n_elements)
    return max(totals, key=lambda kind: totals[kind])
