"""How much disk space a run takes: its checkpoints, and the exported model to the byte."""

from alpaca import layout
from alpaca.plan.shapes import Shape
from alpaca.plan.workload import Workload
from alpaca.recipe import rules
from alpaca.recipe.arguments import SavingFlags
from alpaca.recipe.steps import steps_per_epoch


def checkpoint_bytes(shape: Shape, moments: float) -> int:
    """Bytes of a checkpoint: fp32 weights, `moments` bytes for each weight, and step counters."""
    state = (rules.MASTER_BYTES + moments) * shape.parameters
    return round(state) + 4 * len(shape.tensors())


def disk_bytes(flags: SavingFlags, work: Workload, checkpoint: int, exported: int) -> int:
    """Peak disk use: while a checkpoint, or the export, is written next to older checkpoints.

    If a signal stops a run, it writes one checkpoint more. An older one is deleted when the next is
    complete, the last one when the export is. The rehearsal of the export, before the first step,
    takes no more than the export.
    """
    if flags.save_strategy == "no":
        return exported
    written, limit = saves(flags, work) + 1, flags.save_total_limit
    return max(min(limit + 1, written) * checkpoint, min(limit, written) * checkpoint + exported)


def saves(flags: SavingFlags, work: Workload) -> int:
    """How many checkpoints a run writes that nothing interrupts."""
    if flags.save_strategy == "no":
        return 0
    per_epoch = steps_per_epoch(work.examples, work.batch)
    period = rules.period(flags.save_strategy, flags.save_steps, per_epoch)
    before_the_last = -(-work.steps // period) - 1
    return before_the_last + (not flags.save_only_model)  # the last model is the export


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
