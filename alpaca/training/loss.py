"""Cross-entropy on target tokens only.

Hidden states are selected at target positions before they meet the vocabulary, so the largest
matrix of the model is never multiplied for prompts. The sum over a pack is returned; dividing by
the targets of the whole global step makes the mean independent of packs and ranks.
"""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from alpaca.errors import UserError
from alpaca.training.attention import PackIndex, index
from alpaca.training.packing import Pack

CHUNK = 1024


class TargetLoss(torch.nn.Module):
    """A causal language model with its loss, as one module that FSDP can wrap."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a model in training mode; refuses those that change logits after the projection."""
        super().__init__()
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(model.config, name, None):
                raise UserError(
                    f"Models with {name} ({model.config.model_type}) can't be trained here yet.",
                    "Use a LLaMA, SmolLM2, Mistral or Qwen model.",
                )
        self.model = model

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        pack: PackIndex,
        sources: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """Sum of the losses of a pack, fp32; ids, positions: (tokens,), the rest (targets,)."""
        decoder = self.model.base_model
        hidden = decoder(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, pack=pack
        ).last_hidden_state[0]  # (tokens, width)
        weight = self.model.get_output_embeddings().weight  # (vocabulary, width)
        return cross_entropy_sum(hidden[sources], weight, labels)


def cross_entropy_sum(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Sum of cross-entropies: (targets, width), (vocabulary, width), (targets,) to a scalar.

    Targets go through in chunks that are computed again in the backward pass, so the logits of a
    whole pack (targets x vocabulary, in fp32) never exist at once.
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, target in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
        total = total + torch.utils.checkpoint.checkpoint(
            _logit_loss, part, weight, target, use_reentrant=False
        )
    # With no targets at all the result must still reach every parameter, or ranks would disagree
    # about which gradients to exchange.
    return total if len(labels) else total + 0.0 * hidden.sum() + 0.0 * weight[:0].sum()


def _logit_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def run(module: torch.nn.Module, pack: Pack, device: torch.device) -> torch.Tensor:
    """Move a pack to `device` and return its loss sum."""

    def tensor(array: object) -> torch.Tensor:
        return torch.as_tensor(array, device=device)

    loss: torch.Tensor = module(
        tensor(pack.ids), tensor(pack.positions), index(pack.segments, device),
        tensor(pack.sources), tensor(pack.labels),
    )  # fmt: skip
    return loss
