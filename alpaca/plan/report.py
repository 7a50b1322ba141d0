"""A plan as text, for `alpaca plan` and a starting run, and compared with measured figures."""

from collections.abc import Sequence

from alpaca.plan.duration import CPU_EFFICIENCY, DISK, EFFICIENCY, LINK_EFFICIENCY
from alpaca.plan.plan import Plan
from alpaca.plan.planner import ADAPTED, Case, more_devices
from alpaca.plan.remedies import Remedy
from alpaca.recipe.progress import Progress

MOMENTS = {
    "loss": "the loss",
    "backward start": "the start of the backward pass",
    "layer": "the backward pass of a layer",
    "root": "the backward pass of the embedding",
}


def lines(given: Case, made: Plan, price: float | None) -> list[str]:
    """The plan as a person reads it."""
    one, work, arguments = made.machine, made.work, given.arguments
    kind = "" if work.exact else ", lengths estimated"
    saved = 1 - work.tokens / work.padded
    half = "bf16" if made.setting.compute == 2 else "fp32"
    memory = _sizes(made)
    return [
        f"{arguments.model_name_or_path.name}: {made.parameters:,} parameters, on "
        f"{one.world_size} x {one.device.name}"
        + (f" ({one.nodes} nodes)" if one.nodes > 1 else ""),
        *([_adapter(made)] if made.setting.adapter else []),
        f"  data      {work.examples:,} examples{kind}: {work.steps:,} steps of {work.batch}",
        f"  tokens    {work.tokens:,} computed of {work.real:,}, {work.padded:,} in the padded "
        f"recipe ({saved:.0%} saved); in {half}",
        f"  memory    {made.memory.total / 1e9:.1f} of {one.device.memory / 1e9:.1f} GB per "
        f"device, worst in {MOMENTS[made.memory.moment]}; headroom {made.headroom / 1e9:.1f}:",
        f"            {memory[0]},",
        f"            {memory[1]}",
        f"  disk      {made.disk / 1e9:.1f} GB: a checkpoint {made.checkpoint / 1e9:.1f}, "
        f"{_left(made)}{_of(one.disk)}; "
        f"RAM {made.host / 1e9:.1f} GB per node{_of(one.host)}",
        f"  time      {duration(made.seconds)}{_assumption(made)}",
        f"            {_files(made)}",
        *([f"  cost      {_cost(made, price)}"] if price is not None else []),
    ]


def _adapter(made: Plan) -> str:
    """What is trained, and how the base is held."""
    adapter = made.setting.adapter
    assert adapter is not None
    kind = "DoRA" if adapter.dora else "LoRA"
    half = "bf16" if made.setting.compute == 2 else "fp32"
    held = half if adapter.quantized == "no" else adapter.quantized
    return (
        f"  adapter   {kind} of rank {adapter.rank} trains {made.trained:,} parameters "
        f"({made.trained / made.parameters:.2%}); the frozen base is held in {held}"
    )


def _left(made: Plan) -> str:
    """What a run leaves on the disk."""
    if made.setting.adapter is None:
        return f"the model {made.export / 1e9:.1f}"
    merged = f", the merged model {made.merged / 1e9:.1f}" if made.merged else ""
    return f"the adapter {made.export / 1e9:.1f}{merged}"


def _of(available: int | None) -> str:
    return "" if available is None else f" (of {available / 1e9:.1f})"


def _sizes(made: Plan) -> tuple[str, str]:
    memory = made.memory
    parts = [
        f"{name} {getattr(memory, name) / 1e9:.1f}"
        for name in (
            "weights",
            "gradients",
            "optimizer",
            "activations",
            "logits",
            "communication",
            "allocator",
            "runtime",
        )
    ]
    return ", ".join(parts[:5]), ", ".join(parts[5:])


def _assumption(made: Plan) -> str:
    if made.time is None:
        return ": the speed of this device is unknown"
    device = made.machine.device
    if made.time.bound == "traffic":
        return f", limited by traffic at {LINK_EFFICIENCY:.0%} of the links' speed"
    if not device.cuda:
        return f" at {CPU_EFFICIENCY:.0%} of this processor's matrix products"
    kind = "bf16" if made.setting.compute == 2 else "fp32"
    return f" at {EFFICIENCY:.0%} of the {kind} peak"


def _files(made: Plan) -> str:
    """The time of a run's files, and what it consists of."""
    saves = f"{made.saves} save{'' if made.saves == 1 else 's'}"
    parts = [
        ("loading", made.files.loading),
        ("rehearsal", made.files.rehearsal),
        (saves, made.files.saving),
        ("export", made.files.export),
    ]
    listed = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts if seconds)
    return f"{duration(made.files.total)} for files at {DISK / 1e9:g} GB/s: {listed}"


def _cost(made: Plan, price: float) -> str:
    cost = made.cost(price)
    return "unknown" if cost is None else f"{cost:,.2f} at {price:g} per device and hour"


def duration(seconds: float | None) -> str:
    """A duration for people: 45 s, 12 min, 3 h 05 min."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def advice(given: Case, made: Plan, remedies: Sequence[Remedy]) -> list[str]:
    """What makes it fit, the cheapest first, as flags to paste."""
    if not remedies:
        return [f"  No flag makes it fit. {more_devices(given)}"]
    told = []
    plain = [_row(made, remedy) for remedy in remedies if not remedy.adapts]
    adapters = [_row(made, remedy) for remedy in remedies if remedy.adapts]
    if plain:
        told += ["  Fits with (the cheapest first):", *plain]
    if adapters:
        told += [f"  {'Or' if plain else 'Fits'} with (the cheapest first; {ADAPTED}):", *adapters]
    return told


def _row(made: Plan, remedy: Remedy) -> str:
    spent = remedy.plan.seconds
    slower = f", {spent / made.seconds:.2f} x the time" if spent and made.seconds else ""
    return f"    {remedy.flags}   ({remedy.plan.memory.total / 1e9:.1f} GB{slower})"


def compare(made: Plan | None, done: Progress) -> list[str]:
    """Predicted and measured figures, one line each; empty if there was no plan."""
    if made is None:
        return []
    work, gigabyte, memory = made.work, 1e9, made.memory.total
    if made.machine.device.cuda:  # torch measures tensors only, not CUDA's and allocator memory
        memory -= made.memory.runtime + made.memory.allocator
    rows = [
        ("steps", work.steps, done.steps, ",.0f"),
        ("tokens", work.tokens, done.tokens, ",.0f"),
        ("memory, GB per rank", memory / gigabyte, done.memory / gigabyte, ",.2f"),
    ]
    if made.seconds is not None:
        rows.append(("seconds of steps", made.seconds, done.step_seconds, ",.0f"))
    return [
        "train: predicted and measured",
        *(f"    {name:<18} {ours:{kind}} and {real:{kind}}" for name, ours, real, kind in rows),
    ]
