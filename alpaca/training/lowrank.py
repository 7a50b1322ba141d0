"""LoRA's layer computed with matrix products alone.

peft multiplies B A x by its scale and adds it to the base's result, each in a pass over memory of
its own, forward and backward. Here the products add to the result themselves, and nothing of the
result's size is kept. The values are peft's, but for the order of rounding.

A gated MLP keeps its gate's and its up layer's output for the backward pass, and computes the rest
again: autograd would also keep SiLU(gate) and its product with up, the down layer's input.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from transformers.activations import ACT2FN

from alpaca import quantization
from alpaca.training.products import linear
from alpaca.training.quantized import QuantizedLinear


class LowRankLinear(lora.Linear):
    """peft's layer; with dropout or DoRA, or switched off, it computes as peft does."""

    def forward(self, x: Tensor, *args: Any, gate: Tensor | None = None, **kwargs: Any) -> Tensor:
        """x: (..., in) to (..., out); with a gate, (..., in), of SiLU(gate) x."""
        [name] = self.active_adapters
        plain = isinstance(self.lora_dropout[name], nn.Identity) and not self.lora_variant
        if not plain or self.disable_adapters or self.merged:
            whole = x if gate is None else F.silu(gate) * x
            result: Tensor = super().forward(whole, *args, **kwargs)
            return result
        base, scale = self.base_layer, self.scaling[name]
        if isinstance(base, QuantizedLinear):
            held, scales, kind = base.packed, base.scales, base.kind
        else:
            held, scales, kind = base.weight, None, ""
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        flat = x.reshape(-1, x.shape[-1])
        gate = None if gate is None else gate.reshape(flat.shape)
        product: Tensor = _Product.apply(flat, gate, held, scales, kind, base.bias, down, up, scale)
        return product.view(*x.shape[:-1], -1)


def gated(mlp: nn.Module) -> bool:
    """Whether a module computes down(SiLU(gate(x)) up(x)), and an adapter changes `down`."""
    return isinstance(getattr(mlp, "act_fn", None), type(ACT2FN["silu"])) and isinstance(
        getattr(mlp, "down_proj", None), LowRankLinear
    )


def gated_forward(mlp: Any, x: Tensor) -> Tensor:
    """The forward pass of a `gated` module: (..., width) to (..., width)."""
    result: Tensor = mlp.down_proj(mlp.up_proj(x), gate=mlp.gate_proj(x))
    return result


class _Product(torch.autograd.Function):
    """W x + b + s B A x, for a frozen W and b; W may be held in fewer bits (`kind`).

    With a gate, SiLU(gate) x takes the place of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        held: Tensor,
        scales: Tensor | None,
        kind: str,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        ctx.kind, ctx.scale = kind, scale
        whole = x if gate is None else F.silu(gate).mul_(x)
        inner = linear(whole, down)  # (tokens, rank)
        ctx.save_for_backward(x, gate, held, scales, down, up, inner)
        result = linear(whole, _weight(held, scales, kind, x.dtype), bias)
        return result.addmm_(inner, up.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, held, scales, down, up, inner = ctx.saved_tensors
        [above] = gradients
        error = linear(above, up.T).mul_(ctx.scale)  # (tokens, rank)
        of_up = (above.T @ inner).mul_(ctx.scale)
        opened = None if gate is None else F.silu(gate)
        of_down = error.T @ (x if opened is None else opened * x)
        of_x = of_gate = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            of_x = linear(above, _weight(held, scales, ctx.kind, above.dtype).T)
            of_x.addmm_(error, down)
            if opened is not None:
                of_gate = torch.ops.aten.silu_backward(of_x * x, gate)
                of_x.mul_(opened)
        return of_x, of_gate, None, None, None, None, of_down, of_up, None


def _weight(held: Tensor, scales: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
    return held if scales is None else quantization.dequantize(kind, held, scales, dtype)
