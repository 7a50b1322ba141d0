"""Keys and values of everything being served, in slots of fixed size.

A slot holds one sequence's keys and values for every layer. Slots never move, so nothing is copied
while decoding and a GPU can replay a recorded step; how many there are, and how long, is settled
at start from the memory that is free. One slot more than are used takes what must be written
somewhere but never read.
"""

import math
import mmap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from alpaca.errors import UserError

CPU_SHARE = 0.5  # of free memory: the rest is for activations, and for others on the machine
CUDA_SHARE = 0.9


@dataclass(frozen=True)
class LayerShape:
    """Keys and values of one token in one layer."""

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
    """How many slots, and how many tokens fit into each."""

    slots: int
    length: int

    @property
    def tokens(self) -> int:
        """All tokens that can be held at once."""
        return self.slots * self.length


def plan_capacity(
    shapes: list[LayerShape], context: int, slots: int, at_least: int, budget: int
) -> Capacity:
    """Fit slots of the model's whole context into `budget` bytes; see `free_bytes`.

    When memory is short there are fewer slots, down to `at_least`; then they get shorter.

    Raises:
        UserError: not even 256 tokens a slot fit.
    """
    tokens = budget // sum(shape.token_bytes for shape in shapes)
    fitting = max(at_least, min(slots, tokens // context - 1))
    length = min(context, tokens // (fitting + 1))
    if length < min(256, context):
        raise UserError(
            f"Free memory holds {tokens} tokens of keys and values, too few to serve.",
            "Free memory, take a machine with more, or a smaller model.",
        )
    return Capacity(fitting, length)


def free_bytes(devices: set[torch.device]) -> int:
    """Bytes that the cache may take on all `devices` together."""
    if all(device.type == "cpu" for device in devices):
        return int(CPU_SHARE * unused_bytes(torch.device("cpu")))
    # A cache spread over GPUs is limited by the fullest, as every layer's part is about equal.
    smallest = min(unused_bytes(device) for device in devices)
    return int(CUDA_SHARE * smallest * len(devices))


def unused_bytes(device: torch.device) -> int:
    """Memory that nobody has taken, of the machine or container, or of a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(int(psutil.virtual_memory().available), _container_limit())


def _container_limit() -> int:
    """What the container may still take; psutil sees the whole machine."""
    limit, used = (Path("/sys/fs/cgroup", f"memory.{name}") for name in ("max", "current"))
    try:
        return int(limit.read_text()) - int(used.read_text())
    except (OSError, ValueError):  # no control group, or one without a limit ("max")
        return int(psutil.virtual_memory().total)


class SlotCache:
    """The tensors: one (slots + 1, heads, length, head_dim) for keys and one for values a layer."""

    def __init__(self, shapes: list[LayerShape], capacity: Capacity) -> None:
        """Allocate; on a CPU memory is taken as it is first written."""
        self.capacity = capacity
        self.spare = capacity.slots
        rows = capacity.slots + 1
        self.layers = [
            tuple(_zeros(shape, (rows, shape.heads, capacity.length)) for _ in range(2))
            for shape in shapes
        ]

    @property
    def cpu_bytes(self) -> int:
        """Its part in a CPU's memory when full; at first nothing of it is taken."""
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
            # indices on both sides of the heads: (tokens, heads, head_dim)
            stored[at[0], :, at[1]] = new.transpose(0, 1)

    def read(self, slot: int, length: int) -> list[torch.Tensor]:
        """A copy of the first `length` tokens of a slot, for `restore`."""
        return [part[slot, :, :length].clone() for layer in self.layers for part in layer]

    def restore(self, slot: int, saved: list[torch.Tensor]) -> None:
        """Begin a slot with what `read` returned."""
        parts = [part for layer in self.layers for part in layer]
        for part, tokens in zip(parts, saved, strict=True):
            part[slot, :, : tokens.shape[1]] = tokens

    def copy(self, source: int, target: int, length: int) -> None:
        """Begin slot `target` with the first `length` tokens of `source`."""
        for layer in self.layers:
            for part in layer:
                part[target, :, :length] = part[source, :, :length]

    def erase(self, slot: int, length: int) -> None:
        """Forget the first `length` tokens of a slot: also masked, NaN would reach the sums."""
        for layer in self.layers:
            for part in layer:
                part[slot, :, :length] = 0


def _zeros(shape: LayerShape, size: tuple[int, ...]) -> torch.Tensor:
    """Zeros (*size, head_dim). On a CPU torch would write them, the system does so when needed."""
    size = (*size, shape.head_dim)
    if shape.device.type != "cpu":
        return torch.zeros(size, dtype=shape.dtype, device=shape.device)
    memory = mmap.mmap(-1, math.prod(size) * shape.dtype.itemsize)
    with suppress(OSError, AttributeError):  # a system without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # one token would take 2 MB, and the time to clear it
    return torch.frombuffer(memory, dtype=shape.dtype).view(size)
