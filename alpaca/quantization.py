"""Frozen weights in 4 or 8 bits: how they are rounded, and read back.

`nf4` is QLoRA's type (Dettmers et al., 2023): each block of 64 numbers of a row shares a scale, the
largest magnitude, and each number is the nearest of 16 quantiles of a normal distribution.
bitsandbytes rounds and reads it. `int8` has one scale for each row: the largest magnitude / 127.

Rows are rounded alone, always on a CPU. So any division of a weight by rows, and any number of
ranks, gives the same numbers, and a merge can repeat what a run trained on.

Sizes are told without torch, for a plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 64  # numbers that share a scale in nf4
BITS = {"nf4": 4 + 32 / BLOCK, "int8": 8.0}  # per weight; int8's one scale a row is not counted


def fits(kind: str, width: int) -> bool:
    """Whether rows of `width` numbers can be rounded to a type: nf4 needs whole blocks."""
    return kind == "int8" or width % BLOCK == 0


def sizes(kind: str, width: int) -> tuple[int, int]:
    """Bytes of a row's numbers, and of its scales, which are fp32."""
    return (width // 2, width // BLOCK * 4) if kind == "nf4" else (width, 4)


def quantize(kind: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round (rows, width) fp32, on the CPU, to bytes and the bytes of their scales.

    Both are uint8, (rows, bytes) as `sizes` says: frozen parameters that are sharded like the
    weight, by rows, and that mixed precision does not convert.
    """
    count, width = rows.shape
    if kind == "nf4":
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(rows.contiguous(), blocksize=BLOCK, quant_type="nf4")
        return packed.view(count, width // 2), _bytes(state.absmax.view(count, -1))
    import torch

    scales = rows.abs().amax(1, keepdim=True) / 127
    numbers = (rows / scales.where(scales > 0, 1.0)).round().to(torch.int8)
    return numbers.view(torch.uint8), _bytes(scales)


def dequantize(kind: str, packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that bytes from `quantize` stand for: (rows, width) of `dtype`, on any device."""
    import torch

    numbers = scales.view(torch.float32)
    if kind == "nf4":
        from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

        state = QuantState(
            absmax=numbers.reshape(-1),
            shape=torch.Size((packed.shape[0], 2 * packed.shape[1])),
            code=get_4bit_type("nf4", device=packed.device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )
        weight: Tensor = dequantize_4bit(packed.reshape(-1, 1), state)
        return weight
    return (packed.view(torch.int8).float() * numbers).to(dtype)


def rounded(kind: str, rows: Tensor) -> Tensor:
    """What rounding makes of (rows, width) fp32, on the CPU; unchanged where it does not fit."""
    if not fits(kind, rows.shape[1]):
        return rows
    return dequantize(kind, *quantize(kind, rows), rows.dtype)


def _bytes(scales: Tensor) -> Tensor:
    import torch

    return scales.float().contiguous().view(torch.uint8)
