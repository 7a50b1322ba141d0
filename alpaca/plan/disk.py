"""How much disk space a run takes: its checkpoints, and the exported model to the byte."""

import math
from functools import cache

from alpaca import layout
from alpaca.plan.adapters import Adapter, Weights
from alpaca.plan.shapes import Shape
from alpaca.plan.workload import Workload
from alpaca.recipe import rules
from alpaca.recipe.arguments import LoopFlags
from alpaca.recipe.steps import steps_per_epoch


def checkpoint_bytes(weights: Weights, moments: float) -> int:
    """Bytes of a checkpoint: fp32 weights, `moments` bytes for each weight, and step counters.

    It holds what is trained: of a run with an adapter, the adapter alone.
    """
    state = (rules.MASTER_BYTES + moments) * weights.trained
    return round(state) + 4 * weights.tensors


def disk_bytes(flags: LoopFlags, work: Workload, checkpoint: int, exported: int) -> int:
    """Peak disk use: while a checkpoint, or the export, is written next to older checkpoints.

    If a signal stops a run, it writes one checkpoint more. An older one is deleted when the next is
    complete, the last one when the export is. The rehearsal of the export, before the first step,
    takes no more than the export. `--save_best` keeps one checkpoint more.
    """
    if flags.save_strategy == "no" and not flags.save_best:
        return exported
    written, limit = saves(flags, work) + 1, flags.save_total_limit + flags.save_best
    return max(min(limit + 1, written) * checkpoint, min(limit, written) * checkpoint + exported)


def saves(flags: LoopFlags, work: Workload) -> int:
    """How many checkpoints a run writes that nothing interrupts.

    With `--save_best`, each evaluation may have the lowest loss so far.
    """
    per_epoch = steps_per_epoch(work.examples, work.batch)
    due = rules.period(flags.save_strategy, flags.save_steps, per_epoch)
    best = rules.period(flags.eval_strategy, flags.eval_steps, per_epoch) if flags.save_best else 0
    periods = [period for period in (due, best) if period]
    earlier = work.steps - 1
    before_the_last = sum(earlier // period for period in periods)
    if len(periods) == 2:  # counted twice
        before_the_last -= earlier // math.lcm(due, best)
    # The last model is the export, or is kept in memory for it.
    return before_the_last + bool(due and not flags.save_only_model)


@cache
def adapter_bytes(shape: Shape, adapter: Adapter) -> int:
    """Exact size of an exported adapter's weights: one file, in fp32."""
    tensors = adapter.tensors(shape)
    data = sum(layout.tensor_bytes(size, "F32") for size in tensors.values())
    return len(layout.header({name: (size, "F32") for name, size in tensors.items()})) + data


@cache
def export_bytes(shape: Shape, dtype: str = "bf16") -> int:
    """Exact size of the exported weights: their files, and the index if there are several."""
    kind = layout.TYPE_NAMES[dtype]
    tensors = shape.tensors()

    def size(name: str) -> int:
        return layout.tensor_bytes(tensors[name], kind)

    files = layout.deal(list(tensors), size, layout.SHARD_BYTES)
    data = sum(map(size, tensors))
    headers = sum(len(layout.header({n: (tensors[n], kind) for n in file})) for file in files)
    if len(files) == 1:
        return headers + data
    named = dict(zip(layout.file_names(len(files)), files, strict=True))
    return headers + data + len(layout.index(named, data))
