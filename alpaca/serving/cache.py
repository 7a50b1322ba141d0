"""Keys and values of everything being served, in slots of fixed size.

A slot holds one sequence's keys and values for every layer. Slots never move, so nothing is copied
while decoding and a GPU can replay a recorded step; how many there are, and how long, is settled
at start from the memory that is free. One slot more than are used takes what must be written
somewhere but never read.
"""

import math
import mmap
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from alpaca.errors import UserError

# of free memory: the rest is for activations, and on a CPU for others on the machine
SHARE = {"cpu": 0.5, "cuda": 0.9}
GROUPS = Path("/sys/fs/cgroup")


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


def plan_capacity(tokens: int, context: int, slots: int, at_least: int) -> Capacity:
    """Fit slots of the model's whole context into `tokens`; see `fitting_tokens`.

    When memory is short there are fewer slots, down to `at_least`; then they get shorter. A long
    prompt that is served slowly is better than one that is refused.

    Raises:
        UserError: not even 256 tokens a slot fit.
    """
    fitting = max(at_least, min(slots, tokens // context - 1))
    length = min(context, tokens // (fitting + 1))
    if length < min(256, context):
        raise UserError(
            f"Free memory holds {tokens} tokens of keys and values, too few to serve.",
            "Free memory, take a machine with more, or a smaller model.",
        )
    return Capacity(fitting, length)


def fitting_tokens(
    shapes: Sequence[LayerShape], unused: Callable[[torch.device], int] | None = None
) -> int:
    """Tokens that the cache may hold: on each device the keys of its own layers have to fit."""
    unused = unused or unused_bytes
    token_bytes: Counter[torch.device] = Counter()
    for shape in shapes:
        token_bytes[shape.device] += shape.token_bytes
    return min(
        int(SHARE[device.type] * unused(device)) // size for device, size in token_bytes.items()
    )


def unused_bytes(device: torch.device) -> int:
    """Memory that nobody has taken, of the machine or container, or of a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)  # of the machine, also in a container
    room = container_room(GROUPS)
    return available if room is None else min(available, room)


def container_room(groups: Path) -> int | None:
    """Bytes that the container may still take, or None; `groups` is where control groups are.

    Files that were read count as used until someone wants the room: such pages are not counted
    here (kernel documentation, control groups, version 2: memory.stat; then version 1).
    """
    for limit, used, stat, files in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        try:
            counts = dict(line.split() for line in (groups / stat).read_text().splitlines())
            taken = int((groups / used).read_text()) - int(counts[files])
            return int((groups / limit).read_text()) - taken
        except (OSError, ValueError, KeyError):  # no such group, or one without a limit ("max")
            continue
    return None


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
