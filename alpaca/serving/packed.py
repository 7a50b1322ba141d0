"""Linear layers with weights repacked once for a CPU: decoding steps are up to twice as fast.

Decoding reads every weight once per step, so reading sets its speed. The weights of a 16-bit
checkpoint, times one power of two per matrix, are exact fp16 numbers. FBGEMM keeps such a matrix in
fp16 and multiplies in fp32: half the reading, exact, and a row's result does not depend on the
other rows. Other matrices use oneDNN's blocked layout, into which torch would otherwise reorder
them at every call. Figures: bench/LOG.md. If the operators are missing, layers are not changed.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

ROWS = 16  # oneDNN chooses the layout for this row count; it works for all others
HALF = torch.finfo(torch.float16)
AVX2_ROWS = 6
MAX_SHIFT = 100  # so that the scale, its inverse and products with it are normal fp32 numbers


class HalfLinear(nn.Module):
    """`nn.Linear` in fp32 with a weight stored exactly in fp16; for inference only."""

    def __init__(self, linear: nn.Linear, shift: int) -> None:
        """Repack a layer's weight and bias; `shift` is the `half_shift` of the weight."""
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach().float()
        self.scale = 2.0**-shift
        if shift:
            weight = weight * 2.0**shift
        bias = None if linear.bias is None else linear.bias.detach().float() * 2.0**shift
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        self.product = torch.ops.quantized.linear_dynamic_fp16.default  # looked up once

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), both fp32."""
        product: torch.Tensor
        rows = inputs.numel() // self.in_features
        extra = padding(rows)
        if extra:
            flat = nn.functional.pad(inputs.reshape(rows, -1), (0, 0, 0, extra))
            product = self.product(flat, self.packed)[:rows].view(*inputs.shape[:-1], -1)
        else:
            product = self.product(inputs, self.packed)
        return product if self.scale == 1 else product.mul_(self.scale)

    def unpacked(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight (out, in) and bias, fp32."""
        weight, bias = torch.ops.quantized.linear_unpack_fp16(self.packed)
        return weight * self.scale, None if bias is None else bias * self.scale


def padding(rows: int) -> int:
    """Rows to add so that a row's result does not depend on the number of rows.

    Without AVX-512, FBGEMM computes six rows at a time and then the remainder together. For a
    remainder of one or two rows it uses a kernel that rounds differently.
    """
    rest = rows % AVX2_ROWS
    return 3 - rest if rest in (1, 2) and torch.backends.cpu.get_cpu_capability() == "AVX2" else 0


class BlockedLinear(nn.Module):
    """`nn.Linear` with a weight in oneDNN's blocked layout; for inference only."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        """Repack a layer's weight and bias."""
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.packed = reorder(linear.weight.detach().to(dtype).contiguous(), ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.product = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        product: torch.Tensor = self.product(inputs, self.packed, self.bias, "none", [], "")
        return product

    def unpacked(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight (out, in) and bias, in the type that is computed in."""
        weight: torch.Tensor = self.packed.to_dense()
        return weight, self.bias


def half_shift(weight: torch.Tensor) -> int | None:
    """The exponent s for which every value times 2^s is an exact fp16 number, or None.

    0 if that works, else the one that brings the largest value close to the largest of fp16. bf16
    has the exponents of fp32 and fewer digits than fp16, so a bf16 matrix fails only if it has
    values 2^32 times smaller than its largest.
    """
    weight = weight.detach().float()
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if not math.isfinite(largest):
        return None
    for shift in (0, math.frexp(HALF.max)[1] - 1 - math.frexp(largest)[1]):
        scaled = weight * 2.0**shift if shift else weight
        fits = abs(shift) < MAX_SHIFT and largest * 2.0**shift <= HALF.max
        if fits and torch.equal(scaled.half().float(), scaled):
            return shift
    return None


def half_available() -> bool:
    """Whether this torch and CPU can run `HalfLinear`."""
    return _runs(lambda linear: HalfLinear(linear, 0), torch.float32)


def blocked_available(dtype: torch.dtype) -> bool:
    """Whether this torch and CPU can run `BlockedLinear` in `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    return _runs(lambda linear: BlockedLinear(linear, dtype), dtype)


def _runs(make: Callable[[nn.Linear], nn.Module], dtype: torch.dtype) -> bool:
    """Whether a kind of layer works here, found by running a small one."""
    try:
        with torch.inference_mode():
            make(nn.Linear(64, 64))(torch.zeros(2, 64, dtype=dtype))
    except (RuntimeError, AttributeError):
        return False
    return True


def pack(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace the model's linear layers on the CPU in place; returns how many are stored in fp16.

    The new layers compute in `dtype`, whatever the type of their weights. Layers are replaced one
    at a time, so that memory never holds the model twice. A weight shared with the embedding is
    also kept unpacked, because embedding rows are looked up one by one. A model that accelerate
    spread over devices is not changed, because its layers fetch their weights.
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return 0
    half = dtype == torch.float32 and half_available()
    blocked = blocked_available(dtype)
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child.weight.device.type != "cpu":
                continue
            shift = half_shift(child.weight) if half else None
            if shift is not None:
                setattr(parent, name, HalfLinear(child, shift))
                count += 1
            elif blocked:
                setattr(parent, name, BlockedLinear(child, dtype))
    return count
