"""The recipe's AdamW, with moments in fp32 or, where memory is short, in 8 bits."""

import torch

from alpaca.recipe.arguments import OptimizerFlags


def build(module: torch.nn.Module, flags: OptimizerFlags) -> torch.optim.Optimizer:
    """AdamW over the parameters of `module`; no weight decay on norms and biases.

    In 8 bits, the two moments of a weight take 2 bytes instead of 8: blocks of 256 share a scale
    (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022).
    """
    parameters = [one for one in module.parameters() if one.requires_grad]
    groups = [
        {
            "params": [p for p in parameters if p.ndim > 1],
            "weight_decay": flags.weight_decay,
        },
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    rate, epsilon = flags.learning_rate, flags.adam_epsilon
    betas = (flags.adam_beta1, flags.adam_beta2)
    if flags.moments_8bit:
        from torchao.optim import AdamW8bit

        made: torch.optim.Optimizer = AdamW8bit(groups, lr=rate, betas=betas, eps=epsilon)
        return made
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=epsilon, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups; torchao keeps it as a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
