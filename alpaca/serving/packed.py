"""Linear layers with weights laid out once for oneDNN: the step from 1 to 1.7 times on a CPU.

Decoding reads every weight once a step, so its speed is the speed of reading them. oneDNN reads
its own blocked layout faster than rows, and torch reorders on every call unless the weight was
reordered before (measured, bench/LOG.md). Where the operators are missing, layers stay as they are.
"""

import torch
from torch import nn

BATCH = 16  # the row count the layout is chosen for; it serves all others


class PackedLinear(nn.Module):
    """`nn.Linear` on a reordered weight; inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        """Take over a layer's weight and bias."""
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.packed = reorder(linear.weight.detach().contiguous(), BATCH)
        self.bias = linear.bias
        self.product = torch.ops.mkldnn._linear_pointwise.default  # found once, not at every call

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        product: torch.Tensor = self.product(inputs, self.packed, self.bias, "none", [], "")
        return product


def available(dtype: torch.dtype) -> bool:
    """Whether this torch and CPU can run packed layers in `dtype`, seen by running one."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        layer = nn.Linear(64, 64, dtype=dtype)
        with torch.inference_mode():
            PackedLinear(layer)(torch.zeros(2, 64, dtype=dtype))
    except (RuntimeError, AttributeError):
        return False
    return True


def pack(model: nn.Module) -> int:
    """Replace the model's linear layers on the CPU in place; returns how many.

    The rows of a weight shared with the embedding stay as well: they are looked up one by one.
    A model that accelerate spread over devices stays as it is: its layers fetch their weights.
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return 0
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(child))
                count += 1
    return count
