"""LoRA's layer computed with matrix products alone.

peft multiplies B A x by its scale and adds it to the base's result, each in a pass over memory of
its own, forward and backward. Here the products add to the result themselves, and nothing of the
result's size is kept. The values are peft's, but for the order of rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn

from alpaca import quantization
from alpaca.training.quantized import QuantizedLinear


class LowRankLinear(lora.Linear):
    """peft's layer; with dropout or DoRA, or switched off, it computes as peft does."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., in) to (..., out)."""
        [name] = self.active_adapters
        plain = isinstance(self.lora_dropout[name], nn.Identity) and not self.lora_variant
        if not plain or self.disable_adapters or self.merged:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        base = self.base_layer
        scale = self.scaling[name]
        if isinstance(base, QuantizedLinear):
            return _product(x, base.packed, base.scales, base.kind, base.bias, down, up, scale)
        return _product(x, base.weight, None, "", base.bias, down, up, scale)


def _product(x: Tensor, *rest: Any) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    result: Tensor = _Product.apply(flat, *rest)
    return result.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """W x + b + s B A x, for a frozen W and b; W may be held in fewer bits (`kind`)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        held: Tensor,
        scales: Tensor | None,
        kind: str,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        ctx.kind, ctx.scale = kind, scale
        inner = x @ down.T  # (tokens, rank)
        ctx.save_for_backward(x, held, scales, down, up, inner)
        result = F.linear(x, _weight(held, scales, kind, x.dtype), bias)
        return result.addmm_(inner, up.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, held, scales, down, up, inner = ctx.saved_tensors
        [above] = gradients
        error = (above @ up).mul_(ctx.scale)  # (tokens, rank)
        of_up = (above.T @ inner).mul_(ctx.scale)
        of_down = error.T @ x
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = above @ _weight(held, scales, ctx.kind, above.dtype)
            of_x.addmm_(error, down)
        return of_x, None, None, None, None, of_down, of_up, None


def _weight(held: Tensor, scales: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
    return held if scales is None else quantization.dequantize(kind, held, scales, dtype)
