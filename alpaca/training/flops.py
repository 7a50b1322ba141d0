"""The FLOPs of a pack and the peak FLOP/s of the device: `mfu` in the log is their ratio.

Only the FLOPs that the loss and its gradient need are counted (Chowdhery et al., "PaLM", 2022,
appendix B: 6 for each weight and token, and attention). A frozen weight has no gradient of its own,
so it takes 4. Padding, recomputed activations, and the
vocabulary at tokens that are not trained on are not counted.
"""

import math
import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from alpaca.plan import devices
from alpaca.recipe.packing import Pack
from alpaca.training.quantized import QuantizedLinear


@dataclass(frozen=True)
class ModelFlops:
    """The sizes of a model that its FLOPs depend on: layer weights, attention, vocabulary.

    `trained`, `frozen`: how many of the layers' weights are; where some are frozen, the vocabulary
    is too.
    """

    trained: int
    frozen: int
    layers: int
    attention_width: int
    vocabulary_weights: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelFlops":
        """Read the sizes from a model; sharded parameters count in full."""
        config = model.config
        vocabulary = config.vocab_size * config.hidden_size
        tables = vocabulary * (1 if config.tie_word_embeddings else 2)
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        trained, frozen = counts(model)
        return cls(
            trained=trained if frozen else trained - tables,
            frozen=frozen - tables if frozen else 0,
            layers=config.num_hidden_layers,
            attention_width=head * heads,
            vocabulary_weights=vocabulary,
        )

    def of_pack(self, pack: Pack) -> float:
        """FLOPs of a pack's forward and backward pass."""
        layers = 6.0 * self.trained + 4.0 * self.frozen
        vocabulary = (4.0 if self.frozen else 6.0) * self.vocabulary_weights
        attention = 12.0 * self.attention_width * self.layers
        return layers * pack.tokens + vocabulary * pack.targets + attention * pack.attended()

    def of_reference(self, pack: Pack) -> float:
        """FLOPs of a forward pass with the adapter switched off."""
        products = self.frozen * pack.tokens + self.vocabulary_weights * pack.targets
        attention = 4.0 * self.attention_width * self.layers
        return 2.0 * products + attention * pack.attended()


def counts(model: PreTrainedModel) -> tuple[int, int]:
    """How many weights of a model are trained, and how many are frozen; shards count in full."""
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    frozen = sum(
        one.numel()
        for one in model.parameters()
        if not one.requires_grad and one.dtype.is_floating_point
    )
    quantized = (one for one in model.modules() if isinstance(one, QuantizedLinear))
    return trained, frozen + sum(math.prod(one.shape) for one in quantized)


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOP/s that `mfu` is relative to: the card's published peak, else a measured rate."""
    if device.type == "cuda":
        card = devices.recognized(torch.cuda.get_device_name(device), 0)
        published = card.bf16 if dtype == torch.bfloat16 else card.fp32
        if published is not None:
            return published
    return matmul_rate(device, dtype)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP/s of a large matrix product in `dtype`: the best of eight, under 0.3 s."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(8):
        _wait(device)
        started = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
