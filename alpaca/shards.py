"""Write safetensors shards one tensor at a time.

The safetensors library needs all tensors of a file in memory at once (5 GB here). The format is
simple, a JSON header followed by the bytes (huggingface/safetensors, "Format"), so this module
streams the tensors and hashes what it writes. `check` reads the files back with the library itself.
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

PIECE = 16 << 20  # bytes hashed and written at a time
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # names in flags
SHORT_NAMES = {kind: short for short, kind in DTYPES.items()}
NAMES = {kind: TYPE_NAMES[short] for short, kind in DTYPES.items()}  # safetensors' names


class Spec(Protocol):
    """Name and shape of a tensor to be written."""

    @property
    def name(self) -> str:
        """Its name in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


T = TypeVar("T", bound=Spec)


@dataclass(frozen=True)
class Shard(Generic[T]):
    """One file of the output. Its tensors have type `dtype`, except those named in `others`."""

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
        """The safetensors header, with which the file begins."""
        return layout.header({t.name: (t.shape, NAMES[self.kind(t)]) for t in self.tensors})

    @property
    def data_bytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(map(self._bytes, self.tensors))

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + self.data_bytes


def finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite; tests minimum and maximum, which needs no copy."""
    if not tensor.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.detach().aminmax())


def plan(
    tensors: Sequence[T],
    dtype: torch.dtype,
    limit: int = SHARD_BYTES,
    others: Mapping[str, torch.dtype] | None = None,
) -> list[Shard[T]]:
    """Assign tensors, in order, to files of at most `limit` bytes (one tensor may exceed it).

    Tensors become `dtype`; `others` gives the exceptions, type by tensor name.
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
    """Write one shard to the disk and return the SHA-256 of the bytes that were passed to write.

    `value` returns a tensor on the CPU, contiguous, in the given type; it is called for one tensor
    at a time. `advance` is called with the number of bytes of each piece written. The file is
    synced and dropped from the page cache, so that reading it back reads the disk.
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
    """Read every shard's header back and check that each tensor is there with its shape and type.

    Raises:
        UserError: a tensor is not: the disk did not keep what was written.
    """
    for shard in shards:
        with safe_open(folder / shard.name, framework="pt") as file:
            found = {
                name: (tuple(part.get_shape()), part.get_dtype())
                for name in file.keys()  # noqa: SIM118 - not a dict
                for part in [file.get_slice(name)]
            }
        wanted = {
            tensor.name: (tuple(tensor.shape), NAMES[shard.kind(tensor)])
            for tensor in shard.tensors
        }
        if found != wanted:
            raise UserError(
                f"{shard.name} reads back differently from what was written.", "Run it again."
            )
