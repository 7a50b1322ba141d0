"""Cross-entropy on target tokens only, or the log-probabilities of whole answers.

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
from alpaca.training.products import linear


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
        owners: torch.Tensor | None = None,
        answers: int = 0,
    ) -> torch.Tensor:
        """Sum of a pack's losses, fp32; ids, positions: (tokens,), sources, labels: (targets,).

        Without labels: the most likely next token after each of `sources`. With owners (targets,),
        numbers below `answers`: the log-probability of each answer, (answers,), fp64.
        """
        decoder = self.model.base_model
        hidden = decoder(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, pack=pack
        ).last_hidden_state[0]  # (tokens, width)
        weight = self.model.get_output_embeddings().weight  # (vocabulary, width)
        if labels is None:
            return F.linear(hidden[sources], weight).argmax(-1)
        if owners is not None:
            tokens = TargetLogs.apply(hidden[sources], weight, labels, torch.is_grad_enabled())
            none = torch.zeros(answers, dtype=torch.float64, device=tokens.device)
            return none.index_add(0, owners, tokens.double())
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
            losses, weights, sums = _cross_entropies(part, weight, target)
            total += losses.sum()
            if wanted:
                error = _errors(weights, sums, target)
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


class TargetLogs(torch.autograd.Function):
    """Log-probability of each target: (targets, width), (vocabulary, width), (targets,), fp32.

    As `CrossEntropySum`, with a gradient for each target, which the backward pass scales alone. The
    vocabulary's matrix is frozen here.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, wanted: bool
    ) -> torch.Tensor:
        """(targets,); if `wanted`, also saves the gradient of each, in the type of `hidden`."""
        assert not ctx.needs_input_grad[1]
        logs = torch.empty(len(labels), 1, dtype=torch.float32, device=hidden.device)
        grads = torch.empty_like(hidden) if wanted else hidden
        for part, target, log, out in zip(
            hidden.split(LOSS_CHUNK),
            labels[:, None].split(LOSS_CHUNK),
            logs.split(LOSS_CHUNK),
            grads.split(LOSS_CHUNK),
            strict=True,
        ):
            losses, weights, sums = _cross_entropies(part, weight, target)
            log.copy_(-losses)
            if wanted:
                error = _errors(weights, sums, target).neg_()
                torch.mm(error.to(weight.dtype), weight, out=out)
        ctx.save_for_backward(grads)
        return logs[:, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Scale the gradient that the forward pass saved of each target."""
        (grads,) = ctx.saved_tensors
        return (grads * gradients[0][:, None]).to(grads.dtype), None, None, None


def _cross_entropies(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses (n, 1), and the softmax (n, vocabulary) before it is divided by its sums (n, 1)."""
    logits = linear(hidden, weight).float()
    right, top = logits.gather(1, target), logits.amax(-1, keepdim=True)
    weights = logits.sub_(top).exp_()
    sums = weights.sum(-1, keepdim=True)
    return sums.log() + top - right, weights, sums


def _errors(weights: torch.Tensor, sums: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The losses' gradient in the logits, in place of `weights`: the softmax, 1 less at targets."""
    error = weights.div_(sums)
    return error.scatter_add_(1, target, torch.full_like(sums, -1.0))


def pack_loss(
    module: torch.nn.Module, pack: Pack, device: torch.device, lengths: Sequence[int] = ()
) -> torch.Tensor:
    """Move a pack to `device` and return its loss sum.

    `lengths`: the pack is padded to the next of them, so that compiled layers see few shapes.
    """
    labels = torch.as_tensor(pack.labels, device=device)
    loss: torch.Tensor = module(*_tensors(packing.fill(pack, lengths), device), labels)
    return loss


def answer_logs(
    module: torch.nn.Module, pack: Pack, device: torch.device, lengths: Sequence[int] = ()
) -> torch.Tensor:
    """The log-probability of each answer of a pack of pairs: (answers,), fp64."""
    labels, owners = (torch.as_tensor(a, device=device) for a in (pack.labels, pack.owners))
    tensors = _tensors(packing.fill(pack, lengths), device)
    logs: torch.Tensor = module(*tensors, labels, owners, pack.answers)
    return logs


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
