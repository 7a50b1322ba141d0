"""Cross-entropy on target tokens only.

Hidden states are selected at target positions before the output projection, so the model's
largest matrix is never multiplied for prompts. The loss is a sum over a pack. Dividing it by the
targets of the whole global step gives a mean that does not depend on packs and ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from alpaca.recipe import packing
from alpaca.recipe.packing import Pack
from alpaca.recipe.rules import LOSS_CHUNK
from alpaca.training.attention import PackIndex, index


class TargetLoss(torch.nn.Module):
    """A causal language model with its loss, as one module that FSDP can wrap."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a model in training mode whose logits are not capped or scaled (stored.CAPPED)."""
        super().__init__()
        self.model = model

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        pack: PackIndex,
        sources: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """Sum of a pack's losses, fp32; ids, positions: (tokens,), sources, labels: (targets,).

        Without labels: the most likely next token after each of `sources`.
        """
        decoder = self.model.base_model
        hidden = decoder(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, pack=pack
        ).last_hidden_state[0]  # (tokens, width)
        weight = self.model.get_output_embeddings().weight  # (vocabulary, width)
        if labels is None:
            return F.linear(hidden[sources], weight).argmax(-1)
        loss: torch.Tensor = CrossEntropySum.apply(
            hidden[sources], weight, labels, torch.is_grad_enabled()
        )
        return loss


class CrossEntropySum(torch.autograd.Function):
    """Sum of cross-entropies: (targets, width), (vocabulary, width), (targets,) to a scalar, fp32.

    Targets are processed in chunks, and the gradients are computed with the loss. So the logits of
    a whole pack (targets x vocabulary, in fp32) never exist at once, and none is computed twice.
    torch's chunked `linear_cross_entropy` does the same, but returns the sum in the inputs' type:
    three digits of a loss in bf16 (torch 2.13, measured).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, wanted: bool
    ) -> torch.Tensor:
        """The sum; if `wanted`, also saves its gradients, in the inputs' types."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted else hidden
        trains_weight = wanted and ctx.needs_input_grad[1]  # not where the base is frozen
        grad_weight = torch.zeros_like(weight) if trains_weight else None
        for part, target, out in zip(
            hidden.split(LOSS_CHUNK),
            labels[:, None].split(LOSS_CHUNK),
            grad_hidden.split(LOSS_CHUNK),
            strict=True,
        ):
            logits = F.linear(part, weight).float()
            right, top = logits.gather(1, target), logits.amax(-1, keepdim=True)
            weights = logits.sub_(top).exp_()  # the softmax, before it is divided by its sum
            sums = weights.sum(-1, keepdim=True)
            total += (sums.log() + top - right).sum()
            if wanted:
                error = weights.div_(sums)  # the softmax, minus 1 at the target
                error.scatter_add_(1, target, torch.full_like(sums, -1.0))
                torch.mm(error.to(weight.dtype), weight, out=out)
                if grad_weight is not None:
                    grad_weight.addmm_(error.to(weight.dtype).T, part)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        """Scale the gradients that the forward pass saved."""
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = None if grad_weight is None else grad_weight * gradients[0]
        return grad_hidden * gradients[0], scaled, None, None


def pack_loss(
    module: torch.nn.Module, pack: Pack, device: torch.device, lengths: Sequence[int] = ()
) -> torch.Tensor:
    """Move a pack to `device` and return its loss sum.

    `lengths`: the pack is padded to the next of them, so that compiled layers see few shapes.
    """
    labels = torch.as_tensor(pack.labels, device=device)
    loss: torch.Tensor = module(*_tensors(packing.fill(pack, lengths), device), labels)
    return loss


@torch.no_grad()
def likeliest(
    module: torch.nn.Module, sequences: Sequence[Sequence[int]], device: torch.device
) -> list[int]:
    """The most likely token after each sequence."""
    found: list[int] = module(*_tensors(packing.unlabelled(sequences), device), None).tolist()
    return found


def _tensors(pack: Pack, device: torch.device) -> tuple[Any, ...]:
    def tensor(array: object) -> torch.Tensor:
        return torch.as_tensor(array, device=device)

    return (
        tensor(pack.ids),
        tensor(pack.positions),
        index(pack.segments, device),
        tensor(pack.sources),
    )
