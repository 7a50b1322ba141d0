"""Copies the numbers that a step needs to its device, in one asynchronous copy.

`torch.tensor(..., device="cuda")` waits until the GPU has finished all its queued work. A copy from
pinned memory does not wait, so a step's numbers are sent before its pass.
"""

from collections.abc import Sequence

import torch


def send(
    device: torch.device, dtype: torch.dtype, *lists: Sequence[float]
) -> tuple[torch.Tensor, ...]:
    """Each list as a tensor of shape (length,) and type `dtype` on `device`."""
    joined = torch.tensor([number for numbers in lists for number in numbers], dtype=dtype)
    if device.type == "cuda":
        joined = joined.pin_memory().to(device, non_blocking=True)
    parts: tuple[torch.Tensor, ...] = joined.split([len(numbers) for numbers in lists])
    return parts
