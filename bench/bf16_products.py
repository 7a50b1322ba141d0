"""bf16 matrix products at fp32 speed on a CPU without bf16 instructions.

A product of two bf16 numbers is exact in fp32, so an fp32 product of bf16 matrices, rounded once,
is what bf16 hardware with fp32 sums computes. torch's own bf16 kernel is 7 times slower there. For
measurements of numbers, not of speed.
"""

import contextlib
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class FP32Products(TorchDispatchMode):
    """While active, bf16 products on the CPU are computed in fp32 and rounded once."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        if (
            func not in PRODUCTS
            or args[-1].dtype != torch.bfloat16
            or args[-1].device.type != "cpu"
        ):
            return func(*args, **kwargs)
        wide = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
        value = PRODUCTS[func](*wide, **{k: v for k, v in kwargs.items() if k != "out"})
        out = kwargs.get("out", args[0] if func is aten.addmm_.default else None)
        return value.bfloat16() if out is None else out.copy_(value)


PRODUCTS: dict[Any, Any] = {
    aten.mm.default: torch.mm,
    aten.mm.out: torch.mm,
    aten.bmm.default: torch.bmm,
    aten.addmm.default: torch.addmm,
    aten.addmm_.default: torch.addmm,
}


def products() -> contextlib.AbstractContextManager[object]:
    """The context to compute bf16 in; it does nothing where the processor has bf16 instructions."""
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return contextlib.nullcontext() if fast else FP32Products()
