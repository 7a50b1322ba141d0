"""Frozen linear layers held in 4 or 8 bits, whose bytes FSDP shards like any parameter."""

from typing import Any

import torch
from torch import Tensor, nn

from alpaca import quantization
from alpaca.training.products import linear


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is held in 4 or 8 bits; bias as it was."""

    def __init__(self, inner: nn.Linear, kind: str) -> None:
        """Take the place of `inner`, a layer on the meta device."""
        super().__init__()
        self.kind = kind
        self.in_features, self.out_features = inner.in_features, inner.out_features
        numbers, scales = quantization.sizes(kind, inner.in_features)
        self.packed = _frozen_bytes(inner.out_features, numbers)
        self.scales = _frozen_bytes(inner.out_features, scales)
        self.bias = inner.bias

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that it stands for."""
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) to (..., out), in the type of x."""
        result: Tensor = _QuantizedProduct.apply(x, self.packed, self.scales, self.kind)
        return result if self.bias is None else result + self.bias


class _QuantizedProduct(torch.autograd.Function):
    """x times a quantized weight; the weight is read back in each pass, and never saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scales: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(packed, scales)
        ctx.kind = kind
        return linear(x, quantization.dequantize(kind, packed, scales, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        packed, scales = ctx.saved_tensors
        weight = quantization.dequantize(ctx.kind, packed, scales, gradients[0].dtype)
        return linear(gradients[0], weight.T), None, None, None


def _frozen_bytes(rows: int, width: int) -> nn.Parameter:
    empty = torch.empty(rows, width, dtype=torch.uint8, device="meta")
    return nn.Parameter(empty, requires_grad=False)
