"""Counts, on a sample of the weights, how many updates change the values computed with.

The forward pass rounds the fp32 masters to the compute type. An update much smaller than a step of
that type changes the rounded value of few weights. If the masters are spread over their rounding
cells, the share that changes equals the update's size in steps. If all masters are at the centres
of their cells, no value changes.
"""

from collections import deque
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

SAMPLE = 65_536  # weights per rank
WINDOW = 10  # steps
FEW = 100.0  # with fewer changes due in the window, the counts are mostly chance
LOST = 0.6  # with a smaller share of the due changes, updates count as lost
STILL = 0.01  # with a smaller share of changed masters, updates are too small even for fp32
MANTISSA = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}  # bits, the hidden one too


class Counts(NamedTuple):
    """Of `sampled` weights: masters changed, compute values changed, and how many of them were due.

    The last two count only updates below a quarter of a step. Larger updates are seldom lost, and
    would hide the loss of small ones.
    """

    sampled: float
    masters: float
    computed: float
    due: float
    small_computed: float
    small_due: float


class UpdateSample:
    """Every n-th weight of this rank's shards, saved before a step and compared after it."""

    def __init__(self, module: torch.nn.Module, compute: torch.dtype) -> None:
        """Sample the trainable parameters; `compute` is the type of the forward pass."""
        self.compute = compute
        local = [
            parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
            for parameter in module.parameters()
            if parameter.requires_grad
        ]
        stride = max(1, sum(weight.numel() for weight in local) // SAMPLE) | 1
        self.views = [weight.detach().view(-1)[::stride] for weight in local]
        self.previous = self._read()

    def _read(self) -> torch.Tensor:
        return torch.cat(self.views) if self.views else torch.zeros(0)

    @torch.no_grad()
    def count(self) -> torch.Tensor:
        """Counts since the last call (or since the start), as (6,) fp64 on the weights' device."""
        before, after = self.previous, self._read()
        self.previous = after
        _, exponent = torch.frexp(before)
        step = torch.ldexp(torch.ones_like(before), exponent - MANTISSA[self.compute])
        due = ((after - before).abs() / step).clamp(max=1)
        changed = before.to(self.compute) != after.to(self.compute)
        small = due < 0.25
        columns = (
            torch.ones_like(before),
            before != after,
            changed,
            due,
            changed & small,
            due * small,
        )
        return torch.stack([column.sum(dtype=torch.float64) for column in columns])


class UpdateWatch:
    """Warns once if a run's updates get lost in rounding."""

    def __init__(self, compute: torch.dtype) -> None:
        """`compute` is the type of the forward pass."""
        self.compute = str(compute).removeprefix("torch.")
        self.recent: deque[Counts] = deque(maxlen=WINDOW)
        self.warned = False

    def warning(self, counts: Counts) -> str | None:
        """Record a step whose learning rate is above 0; returns a warning, or None."""
        self.recent.append(counts)
        if self.warned or len(self.recent) < WINDOW:
            return None
        sampled, masters, _, _, computed, due = map(sum, zip(*self.recent, strict=True))
        message = None
        if masters < STILL * sampled:
            message = (
                f"{masters / sampled:.2%} of the fp32 weights changed in the last {WINDOW} steps: "
                "the updates are too small even for fp32"
            )
        elif due > FEW and computed < LOST * due:
            message = (
                f"rounding to {self.compute} hid {1 - computed / due:.0%} of the small updates of "
                f"the last {WINDOW} steps from the forward pass; --dither_masters True keeps them"
            )
        self.warned = message is not None
        return message
