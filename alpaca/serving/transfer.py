"""Numbers that a step needs, brought to its device in one copy that nobody waits for.

`torch.tensor(..., device="cuda")` waits until the GPU has done all that it was given. A copy out of
pinned memory does not, so a step's numbers are sent ahead of its pass.
"""

from collections.abc import Sequence

import torch


def send(
    device: torch.device, dtype: torch.dtype, *lists: Sequence[float]
) -> tuple[torch.Tensor, ...]:
    """Each list as a tensor (its length,) of `dtype` on `device`."""
    joined = torch.tensor([number for numbers in lists for number in numbers], dtype=dtype)
    if device.type == "cuda":
        joined = joined.pin_memory().to(device, non_blocking=True)
    parts: tuple[torch.Tensor, ...] = joined.split([len(numbers) for numbers in lists])
    return parts
