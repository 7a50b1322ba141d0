"""Rounding fp32 weights to 16 bits without losing small updates.

An AdamW step at a learning rate of 2e-5 moves a weight by about 2e-5; at 0.03, half a bf16 step is
6e-5. Rounded to the nearest number, most updates vanish. Two remedies, both without bias:

- `dither`: fp32 master weights start at a random place inside the cell that rounds to the base
  weight. The base is unchanged; each update then flips its due share of the weights.
- `stochastic`: a finished fp32 weight is rounded up or down, with the odds of its position.

Random bits come from Philox, a counter-based generator (Salmon et al., "Parallel Random Numbers: As
Easy as 1, 2, 3", SC 2011), so they depend on seed, tensor name and element only, never on ranks.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# Low bits of an fp32 pattern that are zero in every (normal) number of the type.
LOW_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
CHUNK = 1 << 20  # elements worked on at once: some 30 MB of temporary tensors
BLOCK = 16  # uint16 values in one block of Philox


def random_bits(seed: int, name: str, start: int, count: int) -> Tensor:
    """`count` uniform integers in [0, 2^16), int32, for elements from `start` of one tensor."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    key = int.from_bytes(digest[:16], "little")
    first, skipped = divmod(start, BLOCK)
    words = -(-(skipped + count) // 4)
    raw = np.random.Philox(key=key, counter=first).random_raw(words).astype("<u8", copy=False)
    return torch.from_numpy(raw.view("<u2")[skipped : skipped + count].astype(np.int32))


def dither(
    values: Tensor, stored: torch.dtype, compute: torch.dtype, seed: int, name: str, start: int = 0
) -> None:
    """Move master weights, in place, to a random place of the cell they were rounded from.

    Afterwards each still rounds to the same number of the `stored` type and of the `compute` type.
    Zeros stay, NaN and infinities too, and fp32 weights that are not numbers of the compute type:
    their low bits already spread them over the cell.

    Args:
        values: fp32, contiguous, on the CPU; elements from `start` on of the flattened tensor.
        stored: the type of the base weights in their file.
        compute: the type that the forward pass rounds the masters to; fp32 leaves them alone.
        seed: of the run.
        name: the tensor's.
        start: index of the first element in the whole tensor.
    """
    low = min(LOW_BITS.get(stored) or LOW_BITS[compute], LOW_BITS[compute])
    if low == 0:
        return
    mask = (1 << low) - 1
    for at, part in _chunks(values):
        bits = part.view(torch.int32)
        noise = random_bits(seed, name, start + at, part.numel()) >> (16 - low)
        noise.sub_(1 << (low - 1)).clamp_(min=1 - (1 << (low - 1)))  # a half step would be a tie
        noise.mul_(((bits & mask) == 0) & (part != 0) & part.isfinite())
        # A number half-way between two of the compute type's (fp16 has such) must go on rounding
        # to the same one of them: there the noise points the other way.
        moved = (bits + noise).view(torch.float32).to(compute) != part.to(compute)
        bits.add_(torch.where(moved, -noise, noise))


def stochastic(values: Tensor, dtype: torch.dtype, seed: int, name: str) -> Tensor:
    """Round fp32 weights to `dtype`, up or down by chance, so that the mean is kept.

    A number of `dtype` stays what it is. Magnitudes below fp16's smallest normal number, 6.1e-5,
    are rounded to the nearest 6e-8 in the end.

    Args:
        values: fp32, on the CPU, of any shape: the whole tensor.
        dtype: bf16, fp16, or fp32, which changes nothing.
        seed: of the run.
        name: the tensor's.
    """
    low = LOW_BITS[dtype]
    if low == 0:
        return values
    flat = values.contiguous().view(-1)
    result = torch.empty_like(flat, dtype=dtype)
    for at, part in _chunks(flat):
        bits = part.view(torch.int32)
        carried = bits + (random_bits(seed, name, at, part.numel()) >> (16 - low))
        rounded = (carried & -(1 << low)).view(torch.float32)
        # At the end of the range a carry would reach infinity, and that of a NaN zero.
        kept = part.isfinite() & rounded.isfinite()
        result[at : at + part.numel()] = torch.where(kept, rounded, part)
    return result.view(values.shape)


class Error:
    """How far rounded tensors are from what they were, all of them together."""

    def __init__(self) -> None:
        """Nothing is measured yet."""
        self.squares = 0.0
        self.missed = 0.0

    def add(self, exact: Tensor, rounded: Tensor) -> None:
        """Count one tensor, fp32 on the CPU, and its rounding."""
        for at, part in _chunks(exact.contiguous()):
            other = rounded.reshape(-1)[at : at + part.numel()].float()
            self.squares += float(part.square().sum(dtype=torch.float64))
            self.missed += float((part - other).square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm of the whole; 0 where nothing was rounded."""
        return (self.missed / self.squares) ** 0.5 if self.squares else 0.0


def _chunks(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    assert flat.dtype == torch.float32
    flat = flat.view(-1)
    for at in range(0, flat.numel(), CHUNK):
        yield at, flat[at : at + CHUNK]
