"""What a run minimizes: cross-entropy of answers, or DPO's loss of preference pairs.

Either is a mean over all that a step holds, on all ranks: a pack gives sums, and the count that
they are divided by.
"""

from collections.abc import Iterable, Sequence

import torch

from alpaca.recipe.arguments import LoopFlags
from alpaca.recipe.corpus import Corpus
from alpaca.recipe.packing import Pack
from alpaca.training import loss, preference
from alpaca.training.loss import TargetLoss


class Objective:
    """The loss of `--loss`, and what is measured besides."""

    def __init__(self, flags: LoopFlags) -> None:
        """Read the loss and its settings from the flags."""
        self.flags = flags
        self.pairs = flags.loss == "dpo"
        self.measures = preference.MEASURES if self.pairs else ()

    def count(self, corpus: Corpus, example_ids: Sequence[int]) -> int:
        """What the loss of these examples is a mean over: their targets, or the pairs; from 1."""
        found = len(example_ids) if self.pairs else sum(map(corpus.targets, example_ids))
        return max(1, found)

    def sums(
        self, module: TargetLoss, pack: Pack, device: torch.device, lengths: Sequence[int]
    ) -> torch.Tensor:
        """The sum of a pack's losses, which has a gradient, then of each of the measures."""
        if not self.pairs:
            return loss.pack_loss(module, pack, device, lengths)[None]
        beta, smoothing = self.flags.dpo_beta, self.flags.dpo_label_smoothing
        return preference.pack_sums(module, pack, device, lengths, beta=beta, smoothing=smoothing)

    def named(self, means: Iterable[float], before: str = "") -> dict[str, float]:
        """The means by their names in the log, each with `before` in front."""
        names = (f"{before}{name}" for name in ("loss", *self.measures))
        return dict(zip(names, means, strict=True))
