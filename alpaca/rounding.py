"""Rounding fp32 weights to 16 bits without losing small updates.

An AdamW step at a learning rate of 2e-5 moves a weight by about 2e-5; half a bf16 step at 0.03 is
6e-5. So rounding to nearest loses most updates. Two remedies, both unbiased:

- `dither`: fp32 master weights start at a random place in the interval that rounds to the base
  weight. The rounded weights are unchanged at first; each update then changes the right share.
- `stochastic`: a finished fp32 weight is rounded up or down, the nearer value with higher odds.

Random bits come from Philox, a counter-based generator (Salmon et al., "Parallel Random Numbers: As
Easy as 1, 2, 3", SC 2011). They depend only on seed, tensor name and element, not on ranks.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from alpaca.errors import UserError

# How many low bits of the fp32 pattern are zero in every (normal) number of the type.
LOW_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
CHUNK = 1 << 20  # elements processed at a time: about 30 MB of temporary tensors
BLOCK = 16  # uint16 values in one block of Philox


def random_bits(seed: int, name: str, start: int, count: int) -> Tensor:
    """`count` uniform int32 integers in [0, 2^16), for the elements of a tensor from `start` on."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    key = int.from_bytes(digest[:16], "little")
    first, skipped = divmod(start, BLOCK)
    words = -(-(skipped + count) // 4)
    raw = np.random.Philox(key=key, counter=first).random_raw(words).astype("<u8", copy=False)
    return torch.from_numpy(raw.view("<u2")[skipped : skipped + count].astype(np.int32))


def dither(
    values: Tensor, stored: torch.dtype, compute: torch.dtype, seed: int, name: str, start: int = 0
) -> None:
    """Move master weights, in place, to a random place in the interval that rounds to them.

    Afterwards each still rounds to the same number of the `stored` type and of the `compute` type.
    Unchanged are zeros, NaN, infinities, and fp32 weights that are not numbers of the compute type:
    their low bits already spread them over the interval.

    Args:
        values: fp32, contiguous, on the CPU; elements of the flattened tensor from `start` on.
        stored: the type of the base weights in their file.
        compute: the type that the forward pass rounds the master weights to; fp32 changes nothing.
        seed: of the run.
        name: of the tensor.
        start: index of the first element in the whole tensor.
    """
    low = min(LOW_BITS.get(stored) or LOW_BITS[compute], LOW_BITS[compute])
    if low == 0:
        return
    mask = (1 << low) - 1
    for at, part in _chunks(values):
        bits = part.view(torch.int32)
        noise = random_bits(seed, name, start + at, part.numel()) >> (16 - low)
        noise.sub_(1 << (low - 1)).clamp_(min=1 - (1 << (low - 1)))  # half a step would be a tie
        noise.mul_(((bits & mask) == 0) & (part != 0) & part.isfinite())
        # A value can be half-way between two numbers of the compute type (some fp16 values are). It
        # must still round to the same one, so where the noise would change that, its sign flips.
        moved = (bits + noise).view(torch.float32).to(compute) != part.to(compute)
        bits.add_(torch.where(moved, -noise, noise))


def stochastic(values: Tensor, dtype: torch.dtype, seed: int, name: str, start: int = 0) -> Tensor:
    """Round fp32 weights to `dtype`, up or down at random, so that the mean is preserved.

    Numbers of `dtype` are unchanged. For fp16, magnitudes below its smallest normal number, 6.1e-5,
    are finally rounded to the nearest 6e-8.

    Args:
        values: fp32, on the CPU, of any shape: elements of the flattened tensor from `start` on.
        dtype: bf16, fp16, or fp32, which changes nothing.
        seed: of the run.
        name: of the tensor.
        start: index of the first element in the whole tensor.
    """
    low = LOW_BITS[dtype]
    if low == 0:
        return values
    flat = values.contiguous().view(-1)
    result = torch.empty_like(flat, dtype=dtype)
    for at, part in _chunks(flat):
        bits = part.view(torch.int32)
        carried = bits + (random_bits(seed, name, start + at, part.numel()) >> (16 - low))
        rounded = (carried & -(1 << low)).view(torch.float32)
        # At the end of the range a carry would give infinity, and for a NaN it could give zero.
        kept = part.isfinite() & rounded.isfinite()
        result[at : at + part.numel()] = torch.where(kept, rounded, part)
    return result.view(values.shape)


def rounded(
    values: Tensor, dtype: torch.dtype, seed: int | None, use: str, name: str, start: int = 0
) -> Tensor:
    """Round fp32 weights to `dtype`: to the nearest without a `seed`, else stochastically.

    `use` says what for: another use of the same tensor draws other random bits. The other arguments
    are those of `stochastic`.

    Raises:
        UserError: a number is too large for fp16.
    """
    if seed is None:
        result = values.to(dtype)
    else:
        result = stochastic(values, dtype, seed, f"{use} {name}", start)
    if dtype == torch.float16 and result.isinf().any():
        raise UserError(
            f"{name} holds {float(values.abs().max()):.6g}; the largest number of fp16 is 65504.",
            "Choose bf16 or fp32 as the type to write.",
        )
    return result


class Error:
    """The rounding error of several tensors together."""

    def __init__(self) -> None:
        """Start with no tensors."""
        self.squares = 0.0
        self.error_squares = 0.0

    def add(self, exact: Tensor, rounded: Tensor) -> None:
        """Add one tensor (fp32, on the CPU) and its rounded version."""
        for at, part in _chunks(exact.contiguous()):
            other = rounded.reshape(-1)[at : at + part.numel()].float()
            self.squares += float(part.square().sum(dtype=torch.float64))
            self.error_squares += float((part - other).square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float:
        """Norm of the difference divided by the norm of the exact values; 0 before any `add`."""
        return (self.error_squares / self.squares) ** 0.5 if self.squares else 0.0


def _chunks(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    assert flat.dtype == torch.float32
    flat = flat.view(-1)
    for at in range(0, flat.numel(), CHUNK):
        yield at, flat[at : at + CHUNK]
