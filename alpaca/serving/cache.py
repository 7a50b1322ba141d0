"""The key/value cache: slots of fixed size.

A slot holds one sequence's keys and values for every layer. Slots never move, so decoding copies
nothing and a GPU can replay a recorded step. The number of slots and their length are set at start
from the free memory. One spare slot receives writes whose result is never read. On a GPU a slot is
a whole number of pages, which FlashAttention reads by their numbers.
"""

import math
import mmap
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from alpaca import ram
from alpaca.errors import UserError

PAGE = 256  # tokens; FlashAttention 2 takes multiples of 256 (Dao-AILab/flash-attention#828)
# share of free memory; the rest is for activations and, on a CPU, for other processes
SHARE = {"cpu": 0.5, "cuda": 0.9}


@dataclass(frozen=True)
class LayerShape:
    """Shape, dtype and device of one token's key and value in one layer."""

    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's key and value."""
        return 2 * self.heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Capacity:
    """Number of slots, and of tokens that fit into each."""

    slots: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens that all slots hold together."""
        return self.slots * self.length


def plan_capacity(tokens: int, context: int, slots: int, at_least: int, page: int = 1) -> Capacity:
    """Fit slots of length `context`, in whole pages, into `tokens`; see `fitting_tokens`.

    If memory is short, the number of slots is reduced first, down to `at_least`, and then their
    length: it is better to serve a long prompt slowly than to refuse it.

    Raises:
        UserError: fewer than 256 tokens per slot fit.
    """
    whole = -(-context // page) * page
    fitting = max(at_least, min(slots, tokens // whole - 1))
    length = min(context, tokens // (fitting + 1) // page * page)
    if length < min(256, context):
        raise UserError(
            f"Free memory has room for {tokens} tokens of keys and values, too few to serve.",
            "Free memory, or use a machine with more or a smaller model.",
        )
    return Capacity(fitting, length)


def fitting_tokens(
    shapes: Sequence[LayerShape], unused: Callable[[torch.device], int] | None = None
) -> int:
    """Tokens that the cache may hold; on each device its own layers' keys and values must fit."""
    unused = unused or unused_bytes
    token_bytes: Counter[torch.device] = Counter()
    for shape in shapes:
        token_bytes[shape.device] += shape.token_bytes
    return min(
        int(SHARE[device.type] * unused(device)) // size for device, size in token_bytes.items()
    )


def unused_bytes(device: torch.device) -> int:
    """Free memory of a GPU, or of the machine or container, in bytes.

    A cache on the CPU is counted as full, though it takes its memory only when it is written to:
    two engines in one process would otherwise plan with the same memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return max(0, ram.available() - sum(cache.cpu_bytes for cache in _CACHES))


class SlotCache:
    """The tensors; per layer, (slots + 1, length, heads, head_dim) for keys and for values.

    On a CPU a head's tokens lie together, which makes its attention up to a quarter faster.
    """

    def __init__(self, shapes: list[LayerShape], capacity: Capacity, paged: bool = False) -> None:
        """Allocate, `paged` in whole pages; a CPU's memory is taken when it is first written."""
        self.capacity = capacity
        self.spare = capacity.slots
        self.length = -(-capacity.length // PAGE) * PAGE if paged else capacity.length
        self.layers = [
            tuple(_zeros(shape, capacity.slots + 1, self.length) for _ in range(2))
            for shape in shapes
        ]
        _CACHES.add(self)

    @property
    def cpu_bytes(self) -> int:
        """CPU memory that the cache takes when it is full; at first it takes none."""
        parts = [part for layer in self.layers for part in layer]
        return sum(part.nbytes for part in parts if part.device.type == "cpu")

    def write(
        self,
        layer: int,
        slots: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Store tokens' keys and values (heads, tokens, head_dim) at (slots, positions)."""
        for stored, new in zip(self.layers[layer], (keys, values), strict=True):
            at = slots.to(stored.device), positions.to(stored.device)  # a model may span devices
            stored[at] = new.transpose(0, 1)

    def read(self, slot: int, length: int) -> list[torch.Tensor]:
        """A copy of the first `length` tokens of a slot, for `restore`."""
        return [part[slot, :length].clone() for layer in self.layers for part in layer]

    def restore(self, slot: int, saved: list[torch.Tensor]) -> None:
        """Write what `read` returned to the beginning of a slot."""
        parts = [part for layer in self.layers for part in layer]
        for part, tokens in zip(parts, saved, strict=True):
            part[slot, : len(tokens)] = tokens

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of slot `source` to slot `target`."""
        for layer in self.layers:
            for part in layer:
                part[target, :length] = part[source, :length]

    def erase(self, slot: int, length: int) -> None:
        """Zero the first `length` tokens of a slot, because NaN would reach sums even if masked."""
        for layer in self.layers:
            for part in layer:
                part[slot, :length] = 0


_CACHES: weakref.WeakSet[SlotCache] = weakref.WeakSet()  # of this process


def _zeros(shape: LayerShape, slots: int, length: int) -> torch.Tensor:
    """On a CPU from mmap: the system zeroes memory on first use, torch would write it all now."""
    if shape.device.type != "cpu":
        size = slots, length, shape.heads, shape.head_dim
        return torch.zeros(size, dtype=shape.dtype, device=shape.device)
    size = slots, shape.heads, length, shape.head_dim
    memory = mmap.mmap(-1, math.prod(size) * shape.dtype.itemsize)
    with suppress(OSError, AttributeError):  # a system without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page: 2 MB, and time to clear it, for a token
    return torch.frombuffer(memory, dtype=shape.dtype).view(size).transpose(1, 2)
