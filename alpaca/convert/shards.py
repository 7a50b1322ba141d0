"""Safetensors shards, written one tensor at a time.

The safetensors library wants all tensors of a file in memory at once (5 GB here); its format is a
JSON header and the bytes (huggingface/safetensors, "Format"), so this streams them and hashes what
it writes. Reading back, in `check`, goes through the library itself.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from alpaca.convert.source import DTYPES, SHORT_NAMES, Tensor
from alpaca.errors import UserError

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
PIECE = 16 << 20  # bytes hashed and written in one go


@dataclass(frozen=True)
class Shard:
    """One file of the output and the tensors in it, all of one dtype."""

    name: str
    tensors: tuple[Tensor, ...]
    dtype: torch.dtype

    @property
    def header(self) -> bytes:
        """The file's first bytes: length, names, shapes, offsets; padded to 8 bytes."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        kind, start = DTYPES[SHORT_NAMES[self.dtype]][1], 0
        for tensor in self.tensors:
            end = start + tensor.parameters * self.dtype.itemsize
            entries[tensor.name] = {
                "dtype": kind,
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def data_bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.parameters for tensor in self.tensors) * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + self.data_bytes


def plan(tensors: Sequence[Tensor], dtype: torch.dtype, limit: int = SHARD_BYTES) -> list[Shard]:
    """Deal tensors, in order, to files of at most `limit` bytes (one tensor may exceed it)."""
    groups: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor.parameters * dtype.itemsize
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    total = len(groups)
    return [
        Shard(
            f"model-{number:05}-of-{total:05}.safetensors" if total > 1 else "model.safetensors",
            tuple(group),
            dtype,
        )
        for number, group in enumerate(groups, start=1)
    ]


def index(shards: Sequence[Shard]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    return {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
        "weight_map": {tensor.name: shard.name for shard in shards for tensor in shard.tensors},
    }


def write(shard: Shard, folder: Path, advance: Callable[[int], object]) -> str:
    """Write one shard to the disk and return the SHA-256 of what was meant to be written.

    `advance` is told the bytes as they go. The file is synced, and dropped from the page cache so
    that whoever reads it back reads the disk.
    """
    digest = hashlib.sha256(shard.header)
    with open(folder / shard.name, "wb") as file:
        file.write(shard.header)
        for tensor in shard.tensors:
            for piece in _pieces(_value(tensor, shard.dtype)):
                digest.update(piece)
                file.write(piece)
                advance(len(piece))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def _value(tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
    value = tensor.read(dtype)
    assert tuple(value.shape) == tensor.shape, f"{tensor.name}: {tuple(value.shape)}"
    assert value.dtype == dtype, f"{tensor.name}: {value.dtype}"
    if dtype == torch.float16 and value.isinf().any():
        raise UserError(
            f"{tensor.name} has numbers too large for fp16.", "Convert with --dtype bf16 or fp32."
        )
    return value


def _pieces(value: torch.Tensor) -> list[memoryview]:
    raw = value.reshape(-1).view(torch.uint8).numpy().data
    return [raw[start : start + PIECE] for start in range(0, len(raw), PIECE)]


def check(shards: Sequence[Shard], folder: Path) -> None:
    """Read every shard's table back: each tensor there, in its shape and type.

    Raises:
        UserError: one is not; the disk did not keep what was written.
    """
    for shard in shards:
        with safe_open(folder / shard.name, framework="pt") as file:
            held = {
                name: (tuple(part.get_shape()), part.get_dtype())
                for name in file.keys()  # noqa: SIM118 - not a dict
                for part in [file.get_slice(name)]
            }
        kind = DTYPES[SHORT_NAMES[shard.dtype]][1]
        wanted = {tensor.name: (tensor.shape, kind) for tensor in shard.tensors}
        if held != wanted:
            raise UserError(f"{shard.name} does not read back as it was written.", "Run it again.")
