"""What to change when a run does not fit: flags to paste, the cheapest first.

All combinations of the few changes that save memory are planned. This is arithmetic and takes
milliseconds. None of them changes which examples a step uses. An adapter in place of all weights
changes what is learned, so it comes last, whatever else there is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from alpaca.plan.plan import Machine, Plan, make
from alpaca.plan.shapes import Shape
from alpaca.plan.workload import Workload
from alpaca.recipe.arguments import ADAPTER_RANK, Arguments

MOST_NODES = 64
MOST = 3  # remedies that train all weights; one less where two adapters are named besides


@dataclass(frozen=True)
class Remedy:
    """Changes that make a run fit, and the plan with them."""

    changed: dict[str, Any]
    plan: Plan

    @property
    def flags(self) -> str:
        """The changes as flags to paste."""
        return " ".join(
            f'--{name} "{value}"' if " " in str(value) else f"--{name} {value}"
            for name, value in self.changed.items()
        )

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained in place of all weights."""
        return "lora_rank" in self.changed


def remedies(
    shape: Shape, arguments: Arguments, machine: Machine, count: Callable[[Arguments], Workload]
) -> list[Remedy]:
    """Changes of flags that make the run fit, the cheapest first.

    Cheap means little time. Changes that round numbers come after all others, and giving up
    checkpoints comes last. Those that train an adapter in place of all weights come after all of
    these; at least one is named where one fits. `count` counts the work under other flags.
    """
    found = []
    works: dict[tuple[bool, int], Workload] = {}
    for changed in _changes(arguments, machine):
        other = replace(arguments, **changed)
        key = (other.packing, other.pack_tokens)
        if key not in works:
            works[key] = count(other)
        plan = make(shape, other, machine, works[key])
        if plan.fits:
            found.append((_cost(changed, plan), Remedy(changed, plan)))
    found.sort(key=lambda pair: pair[0])
    ordered = [remedy for _, remedy in found]
    kept = _simplest([remedy for remedy in ordered if not remedy.adapts])
    others = _adapters([remedy for remedy in ordered if remedy.adapts])
    return kept[: MOST - len(others) + 1] + others


def _changes(arguments: Arguments, machine: Machine) -> list[dict[str, Any]]:
    """Every combination of the changes that save memory, each with only the changed flags."""
    combined: list[dict[str, Any]] = [{}] if arguments.packing else [{"packing": True}]
    smallest, size = arguments.longest_example, arguments.pack_tokens
    packs: list[dict[str, Any]] = [{}]
    while (size := size // 2) >= smallest:
        packs.append({"max_tokens_per_pack": size})
    options = [packs]
    if not arguments.gradient_checkpointing:
        options.append([{}, {"gradient_checkpointing": True}])
    if arguments.sharding != "full_shard":
        options.append([{}, {"fsdp": "full_shard auto_wrap"}])
    if not arguments.moments_8bit:
        options.append([{}, {"optim": "adamw_8bit"}])
    if arguments.bf16 is not True and machine.device.fast_bf16:
        options.append([{}, {"bf16": True}])
    if not arguments.offload:
        options.append([{}, {"fsdp": "full_shard auto_wrap offload"}])
    if arguments.save_strategy != "no":
        fewer = [{"save_total_limit": 1}] if arguments.save_total_limit > 1 else []
        options.append([{}, *fewer, {"save_strategy": "no"}])
    options.append(_adapting(arguments))
    for option in options:
        combined = [{**one, **other} for one in combined for other in option]
    unique = {tuple(sorted(one.items())): one for one in combined if one}
    return list(unique.values())


def _adapting(arguments: Arguments) -> list[dict[str, Any]]:
    """No change, an adapter, and one over a quantized base, as far as the run has none."""
    quantized = {"quantize_base": "nf4"}
    if not arguments.lora_rank:
        adapter = {"lora_rank": ADAPTER_RANK}
        return [{}, adapter, {**adapter, **quantized}]
    holds = arguments.quantize_base != "no" or arguments.use_dora
    return [{}] if holds else [{}, quantized]


def _cost(changed: dict[str, Any], plan: Plan) -> tuple[Any, ...]:
    """Sort key of remedies: loss of safety, of precision, of time, then the number of flags."""
    return (
        changed.get("save_strategy") == "no",
        ("optim" in changed) + ("bf16" in changed) + ("quantize_base" in changed),
        round(plan.seconds or 0),
        len(changed),
    )


def _adapters(remedies: list[Remedy]) -> list[Remedy]:
    """The cheapest over a base in the compute type, and over a quantized one, the faster first."""
    found = [
        next((remedy for remedy in remedies if ("quantize_base" in remedy.changed) == wanted), None)
        for wanted in (False, True)
    ]
    faster = sorted(filter(None, found), key=lambda remedy: round(remedy.plan.seconds or 0))
    return _simplest(faster)


def _simplest(remedies: list[Remedy], most: int = MOST) -> list[Remedy]:
    """The first `most` remedies, without those that only add flags to a cheaper one."""
    kept: list[Remedy] = []
    for remedy in remedies:
        if not any(other.changed.items() <= remedy.changed.items() for other in kept):
            kept.append(remedy)
    return kept[:most]


def enough_nodes(
    shape: Shape, arguments: Arguments, machine: Machine, count: Callable[[Arguments], Workload]
) -> int | None:
    """How many such nodes would hold the run with the smallest packs and checkpointing.

    None: not even `MOST_NODES` would, or the disk is too small, which more nodes do not change.
    """
    small = replace(
        arguments,
        packing=True,
        max_tokens_per_pack=arguments.longest_example,
        gradient_checkpointing=True,
        fsdp="full_shard auto_wrap",
    )
    work = count(small)
    for nodes in range(machine.nodes + 1, MOST_NODES + 1):
        if make(shape, small, replace(machine, nodes=nodes), work).fits:
            return nodes
    return None
