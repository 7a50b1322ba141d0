"""Write safetensors shards one tensor at a time, and read tensors some rows at a time.

The safetensors library needs all tensors of a file in memory at once (5 GB here). The format is
simple, a JSON header followed by the bytes (huggingface/safetensors, "Format"), so this module
streams the tensors and hashes what it writes. `check` reads the files back with the library itself.
Rows are read into memory of their own: pages of a mapped file would count as this process's.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from safetensors import safe_open

from alpaca import layout, stored
from alpaca.errors import UserError
from alpaca.layout import SHARD_BYTES, TYPE_NAMES

PIECE = 16 << 20  # bytes hashed and written at a time
ROW_ELEMENTS = 1 << 22  # elements read at a time: 32 MB in float64
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # names in flags
SHORT_NAMES = {kind: short for short, kind in DTYPES.items()}
NAMES = {kind: TYPE_NAMES[short] for short, kind in DTYPES.items()}  # safetensors' names
TYPES = {name: kind for kind, name in NAMES.items()}


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
    return write_rows(shard, folder, lambda tensor, dtype: [value(tensor, dtype)], advance)


def write_rows(
    shard: Shard[T],
    folder: Path,
    rows: Callable[[T, torch.dtype], Iterable[torch.Tensor]],
    advance: Callable[[int], object],
) -> str:
    """As `write`, for tensors that never are in memory as a whole.

    `rows` gives the tensor's rows in order, in pieces of any number of rows.
    """
    digest = hashlib.sha256(shard.header)
    with open(folder / shard.name, "wb") as file, ThreadPoolExecutor(max_workers=1) as hasher:
        file.write(shard.header)
        for tensor in shard.tensors:
            count = 0
            for content in rows(tensor, shard.kind(tensor)):
                assert content.shape[1:] == tensor.shape[1:], f"{tensor.name}: {content.shape}"
                assert content.dtype == shard.kind(tensor), f"{tensor.name}: {content.dtype}"
                count += len(content)
                for piece in _pieces(content):
                    hashed = hasher.submit(digest.update, piece)
                    file.write(piece)
                    advance(len(piece))
                    hashed.result()
            assert count == tensor.shape[0], f"{tensor.name}: {count} rows"
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def row_slices(shape: Sequence[int], most: int = ROW_ELEMENTS) -> list[slice]:
    """A tensor's rows in order, as slices of at most `most` elements (one row may exceed it)."""
    step = max(1, most // max(1, math.prod(shape[1:])))
    return [slice(at, min(at + step, shape[0])) for at in range(0, shape[0], step)]


def rows_of(entry: stored.Entry, rows: slice) -> torch.Tensor:
    """Some rows of a tensor in a file, in its type.

    Raises:
        UserError: the file became shorter since its header was read.
    """
    start, stop, _ = rows.indices(entry.shape[0])
    shape = (stop - start, *entry.shape[1:])
    row_bytes = entry.size // max(1, entry.shape[0])
    content = bytearray(row_bytes * shape[0])
    with open(entry.path, "rb", buffering=0) as file:
        file.seek(entry.start + row_bytes * start)
        left = memoryview(content)
        while left:
            count = file.readinto(left)
            if not count:
                raise UserError(f"{entry.path} is cut short.", "Fetch or train it again.")
            left = left[count:]
    if not content:
        return torch.empty(shape, dtype=TYPES[entry.dtype])
    return torch.frombuffer(content, dtype=TYPES[entry.dtype]).view(shape)


def read(entry: stored.Entry, most: int = ROW_ELEMENTS) -> Iterator[torch.Tensor]:
    """A tensor's rows in order, in its type, at most `most` elements at a time."""
    for rows in row_slices(entry.shape, most):
        yield rows_of(entry, rows)


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
