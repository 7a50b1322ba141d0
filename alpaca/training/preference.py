"""Direct Preference Optimization: of two answers, the preferred one is to gain more probability.

Rafailov et al., "Direct Preference Optimization", 2023, equation 7. An answer's reward is beta
times the logarithm of how much likelier it has become than under the reference: the base model,
which is the same model with its adapter switched off. The loss of a pair is the cross-entropy of
its preference under the difference of its rewards; `smoothing` is the chance that the preference is
wrong (Mitchell, "A note on DPO with noisy preferences", 2023). Both answers of a pair are in one
pack, so a pack's loss is a sum over its pairs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from alpaca.recipe.packing import Pack
from alpaca.training.adapters import switched_off
from alpaca.training.loss import TargetLoss, answer_logs

# What is logged besides the loss, by TRL's names; means over the pairs.
MEASURES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def pack_sums(
    module: TargetLoss,
    pack: Pack,
    device: torch.device,
    lengths: Sequence[int],
    *,
    beta: float,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Sums over the pairs of a pack, of the loss and of each of `MEASURES`: (5,), fp64."""
    with _as_reference(module):
        reference = answer_logs(module, pack, device, lengths)
    rewards = beta * (answer_logs(module, pack, device, lengths) - reference).view(-1, 2)
    chosen, rejected = rewards.unbind(1)  # (pairs,)
    margins = chosen - rejected
    losses = (smoothing - 1) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)
    measured = (chosen, rejected, margins, (margins > 0).double())
    return torch.stack([losses.sum(), *(part.detach().sum() for part in measured)])


@contextmanager
def _as_reference(module: TargetLoss) -> Iterator[None]:
    """Let the module compute as the base does: without its adapter, dropout and gradients."""
    training = module.training
    with torch.no_grad(), switched_off(module.model):
        module.eval()
        try:
            yield
        finally:
            module.train(training)
