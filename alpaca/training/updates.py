"""Do a step's updates reach the weights that are computed with? Counted on a sample of them.

The forward pass rounds the fp32 masters to the compute type. An update much smaller than a step of
that type changes the rounded value of few weights: of a share equal to its size in such steps where
the masters are spread over their rounding cells, of none where they are all at the centres.
"""

from collections import deque
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

SAMPLE = 65_536  # weights a rank
WINDOW = 10  # steps
FEW = 100.0  # changes due in the window below which chance decides
LOST = 0.6  # share of the due changes below which updates count as lost
STILL = 0.01  # share of masters that change below which fp32 itself swallows the updates
MANTISSA = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}  # bits, the hidden one too


class Counts(NamedTuple):
    """Of `sampled` weights: masters changed, compute values changed, and changes due of these.

    The last two are of updates below a quarter of a step only: larger ones are seldom lost, and
    would hide that the small ones are.
    """

    sampled: float
    masters: float
    computed: float
    due: float
    small_computed: float
    small_due: float


class UpdateSample:
    """Every n-th weight of this rank's shards, held before a step and compared after it."""

    def __init__(self, module: torch.nn.Module, compute: torch.dtype) -> None:
        """Look at trainable parameters; `compute` is the type of the forward pass."""
        self.compute = compute
        local = [
            parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
            for parameter in module.parameters()
            if parameter.requires_grad
        ]
        stride = max(1, sum(weight.numel() for weight in local) // SAMPLE) | 1
        self.views = [weight.detach().view(-1)[::stride] for weight in local]
        self.held = self._read()

    def _read(self) -> torch.Tensor:
        return torch.cat(self.views) if self.views else torch.zeros(0)

    @torch.no_grad()
    def count(self) -> torch.Tensor:
        """Counts since the last call (or since the start), as (6,) fp64 on the weights' device."""
        before, after = self.held, self._read()
        self.held = after
        _, exponent = torch.frexp(before)
        step = torch.ldexp(torch.ones_like(before), exponent - MANTISSA[self.compute])
        due = ((after - before).abs() / step).clamp(max=1)
        changed = before.to(self.compute) != after.to(self.compute)
        small = due < 0.25
        columns = (
            torch.ones_like(before), before != after, changed, due, changed & small, due * small,
        )  # fmt: skip
        return torch.stack([column.sum(dtype=torch.float64) for column in columns])


class UpdateWatch:
    """Warns, once, of a run whose updates get lost in rounding."""

    def __init__(self, compute: torch.dtype) -> None:
        """`compute` is the type of the forward pass."""
        self.compute = str(compute).removeprefix("torch.")
        self.recent: deque[Counts] = deque(maxlen=WINDOW)
        self.warned = False

    def warning(self, counts: Counts) -> str | None:
        """Take in one step with a learning rate above 0; what to tell the user, if anything."""
        self.recent.append(counts)
        if self.warned or len(self.recent) < WINDOW:
            return None
        sampled, masters, _, _, computed, due = map(sum, zip(*self.recent, strict=True))
        told = None
        if masters < STILL * sampled:
            told = (
                f"{masters / sampled:.2%} of the fp32 weights changed in the last {WINDOW} steps: "
                "the updates are too small even for fp32"
            )
        elif due > FEW and computed < LOST * due:
            told = (
                f"rounding to {self.compute} hid {1 - computed / due:.0%} of the small updates of "
                f"the last {WINDOW} steps from the forward pass; --dither_masters True keeps them"
            )
        self.warned = told is not None
        return told
