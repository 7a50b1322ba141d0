"""Safetensors shards, written one tensor at a time.

The safetensors library wants all tensors of a file in memory at once (5 GB here); its format is a
JSON header and the bytes (huggingface/safetensors, "Format"), so this streams them and hashes what
it writes. Reading back, in `check`, goes through the library itself.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from safetensors import safe_open

from alpaca import layout
from alpaca.errors import UserError
from alpaca.layout import SHARD_BYTES, TYPE_NAMES

PIECE = 16 << 20  # bytes hashed and written in one go
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # as flags say them
SHORT_NAMES = {kind: short for short, kind in DTYPES.items()}
NAMES = {kind: TYPE_NAMES[short] for short, kind in DTYPES.items()}  # as safetensors says them


class Spec(Protocol):
    """What a tensor to be written is called, and its shape."""

    @property
    def name(self) -> str:
        """Its name in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


T = TypeVar("T", bound=Spec)


@dataclass(frozen=True)
class Shard(Generic[T]):
    """One file of the output and the tensors in it: of `dtype`, or as `others` says by name."""

    name: str
    tensors: tuple[T, ...]
    dtype: torch.dtype
    others: Mapping[str, torch.dtype] = field(default_factory=dict)

    def kind(self, tensor: Spec) -> torch.dtype:
        """The type of one of its tensors."""
        return self.others.get(tensor.name, self.dtype)

    def _bytes(self, tensor: Spec) -> int:
        return layout.tensor_bytes(tensor.shape, NAMES[self.kind(tensor)])

    @property
    def header(self) -> bytes:
        """The file's first bytes."""
        return layout.header({t.name: (t.shape, NAMES[self.kind(t)]) for t in self.tensors})

    @property
    def data_bytes(self) -> int:
        """Size of the tensors."""
        return sum(map(self._bytes, self.tensors))

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + self.data_bytes


def finite(tensor: torch.Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite; its extremes tell, without a copy of it."""
    if not tensor.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.detach().aminmax())


def plan(
    tensors: Sequence[T],
    dtype: torch.dtype,
    limit: int = SHARD_BYTES,
    others: Mapping[str, torch.dtype] | None = None,
) -> list[Shard[T]]:
    """Deal tensors, in order, to files of at most `limit` bytes (one tensor may exceed it).

    They become `dtype`, those that `others` names the type it gives.
    """
    others = others or {}

    def size(tensor: T) -> int:
        return layout.tensor_bytes(tensor.shape, NAMES[others.get(tensor.name, dtype)])

    groups = layout.deal(tensors, size, limit)
    names = layout.file_names(len(groups))
    return [
        Shard(name, tuple(group), dtype, others) for name, group in zip(names, groups, strict=True)
    ]


def index(shards: Sequence[Shard[Any]]) -> str:
    """The text of model.safetensors.index.json."""
    names = {shard.name: [tensor.name for tensor in shard.tensors] for shard in shards}
    return layout.index(names, sum(shard.data_bytes for shard in shards))


def write(
    shard: Shard[T],
    folder: Path,
    value: Callable[[T, torch.dtype], torch.Tensor],
    advance: Callable[[int], object],
) -> str:
    """Write one shard to the disk and return the SHA-256 of what was meant to be written.

    `value` gives each tensor when its turn comes, on the CPU, contiguous, in the type asked for;
    `advance` is told the bytes as they go. The file is synced, and dropped from the page cache so
    that whoever reads it back reads the disk.
    """
    digest = hashlib.sha256(shard.header)
    with open(folder / shard.name, "wb") as file, ThreadPoolExecutor(max_workers=1) as hasher:
        file.write(shard.header)
        for tensor in shard.tensors:
            content = value(tensor, shard.kind(tensor))
            assert tuple(content.shape) == tensor.shape, f"{tensor.name}: {tuple(content.shape)}"
            assert content.dtype == shard.kind(tensor), f"{tensor.name}: {content.dtype}"
            for piece in _pieces(content):
                hashed = hasher.submit(digest.update, piece)
                file.write(piece)
                advance(len(piece))
                hashed.result()
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def _pieces(value: torch.Tensor) -> list[memoryview]:
    raw = value.reshape(-1).view(torch.uint8).numpy().data
    return [raw[start : start + PIECE] for start in range(0, len(raw), PIECE)]


def check(shards: Sequence[Shard[Any]], folder: Path) -> None:
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
        wanted = {
            tensor.name: (tuple(tensor.shape), NAMES[shard.kind(tensor)])
            for tensor in shard.tensors
        }
        if held != wanted:
            raise UserError(f"{shard.name} does not read back as it was written.", "Run it again.")
