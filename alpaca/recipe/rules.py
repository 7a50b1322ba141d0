"""Rules that the trainer and the planner share, each defined once. No torch."""

import os
from pathlib import Path

LOSS_CHUNK = 512  # target tokens whose logits exist at a time
MASTER_BYTES = 4  # fp32 master weights
GRADIENT_BYTES = 4  # gradients are reduced and kept in fp32
# AdamW's two moments, bytes per parameter: fp32; or 8 bits, with an fp32 scale for each 256.
ADAMW_BYTES = 8.0
ADAMW_8BIT_BYTES = 2 + 2 * 4 / 256


def shards(sharding: str, world_size: int, ranks_per_node: int) -> int:
    """How many ranks share each parameter; with `hybrid_shard`, those of one node."""
    return {"hybrid_shard": ranks_per_node, "no_shard": 1}.get(sharding, world_size)


def regathers(sharding: str) -> bool:
    """Whether weights are freed after the forward pass and gathered again for the backward pass.

    Modes that shard only gradients, or nothing, keep them.
    """
    return sharding in ("full_shard", "hybrid_shard")


def reduces_once(parameters: int, shards: int, memory: int, *, offload: bool) -> bool:
    """Whether a rank adds up whole gradients and reduces them with the last pack of a step.

    Otherwise each pack's gradients are reduced at once. `memory` is the device's total, not what is
    free now, because a resumed run must decide as before. Sharded weights, gradients and moments
    take 16 bytes per parameter, whole gradients 4; 40% of the memory is left for activations.
    Offloaded gradients are always moved to the host at once.
    """
    state = MASTER_BYTES + GRADIENT_BYTES + ADAMW_BYTES
    return not offload and parameters * (state / shards + GRADIENT_BYTES) <= 0.6 * memory


def computes_bf16(wanted: bool | None, *, fast: bool, cuda: bool) -> bool:
    """Whether a run computes in bf16.

    It does so only where the hardware is `fast` at bf16. There `--bf16` decides; without the flag,
    GPUs compute in bf16 and CPUs do not.
    """
    return fast and (cuda if wanted is None else wanted)


def period(strategy: str, every: int, steps_per_epoch: int) -> int:
    """Steps between two evaluations or checkpoints; 0: none before the end."""
    return {"no": 0, "steps": every, "epoch": steps_per_epoch}[strategy]


def cpu_multiplies_bf16(info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor has bf16 products: AMX or AVX512-BF16.

    Others emulate them at about 1% of their fp32 rate (measured). ALPACA_CPU_BF16=1 computes in
    bf16 anyway, to try out its numerical results.
    """
    if os.environ.get("ALPACA_CPU_BF16") == "1":
        return True
    try:
        flags = set(info.read_text(errors="replace").split())
    except OSError:
        return False
    return bool(flags & {"amx_tile", "avx512_bf16"})
