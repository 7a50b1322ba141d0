"""fp32 products with a weight on a CPU, by oneDNN.

torch gives fp32 products to MKL, which on an AMD processor reaches nine tenths of oneDNN's rate
(bench/LOG.md, "LoRA"). bf16 products it gives to oneDNN itself.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 1 << 22  # multiplications; oneDNN prepares each shape, which costs more than it gains
LONGEST = 1 << 14  # numbers in a sum: oneDNN adds them in one row, MKL in parts, so more exactly


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., in), weight (out, in), bias (out,) to (..., out).

    Faster only where no gradient is recorded, as within an autograd.Function.
    """
    if not _fits(x, weight):
        return F.linear(x, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _fits(x: Tensor, weight: Tensor) -> bool:
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return (
        not torch.compiler.is_compiling()  # it chooses by itself
        and not recorded
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[-1] <= LONGEST
        and x.numel() * weight.shape[0] >= SMALLEST
        and _available()
    )


@cache
def _available() -> bool:
    """Whether this torch has both libraries, and the operator, which torch.compile uses too."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
