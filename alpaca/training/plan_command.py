"""`python -m alpaca plan`: what a run needs and costs, and whether it fits, before it starts.

It takes every flag of train.py, and a machine: the one at hand, or one named from the table.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace

from alpaca.errors import UserError
from alpaca.training import arguments as training
from alpaca.training import fsdp_config, gpus, plan_time, planning
from alpaca.training.plan import Machine, Plan
from alpaca.training.plan_remedies import Remedy
from alpaca.training.planning import Case

MOMENTS = {
    "loss": "the loss",
    "turn": "the first moment of the backward pass",
    "layer": "the backward pass of a layer",
    "root": "the backward pass of the embedding",
}


class Parser(argparse.ArgumentParser):
    """Leaves the flags it doesn't know, for train.py's own parser to read, in `training`."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse; what is wrong with the training flags is found when the verb runs."""
        known: argparse.Namespace
        known, rest = self.parse_known_args(args, namespace)
        known.training = rest
        return known


def parser() -> argparse.ArgumentParser:
    """Flags of the verb."""
    made = Parser(
        usage="%(prog)s [--gpu NAME] [--gpus N] [--nodes N] [--FLAG OF train.py VALUE ...]",
        description="Say what a training run needs, how long it takes, and whether it fits.",
        epilog="Every flag of train.py is understood as well. --model_name_or_path may name a "
        "model that is not there: llama-7b, llama-2-70b, llama-3-8b and others. "
        f"Cards: {', '.join(gpus.GPUS)}.",
        allow_abbrev=False,
    )
    made.add_argument("--gpu", metavar="NAME", help="a card by name; the default is this machine")
    made.add_argument("--gpus", type=int, metavar="N", help="devices in a node")
    made.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (%(default)s)")
    made.add_argument("--ram", type=float, metavar="GB", help="memory of a node, if not this one")
    made.add_argument("--price", type=float, metavar="X", help="of one device for one hour")
    made.add_argument(
        "--examples", type=int, default=0, metavar="N",
        help="plan for N examples with the lengths of those in --data_path",
    )  # fmt: skip
    made.add_argument("--json", action="store_true", help="print everything as one JSON object")
    return made


def run(options: argparse.Namespace) -> None:
    """Print the plan; raises UserError, so exit code 2, when a flag or the data is wrong."""
    arguments, notices = training.parse(options.training)
    arguments, more = fsdp_config.apply(arguments)
    given = planning.case(arguments, machine(options, arguments), options.examples)
    made = given.plan()
    remedies = [] if made.fits else given.remedies()
    if options.json:
        facts = made.facts() | {
            "remedies": [
                {"flags": remedy.flags, "plan": remedy.plan.facts()} for remedy in remedies
            ],
            "cost": None if options.price is None else made.cost(options.price),
            "notices": [*notices, *more],
        }
        print(json.dumps(facts, indent=1))
        return
    print("\n".join(lines(given, made, options.price)))
    if made.fits:
        print("  It fits.")
    else:
        print("  It does NOT fit: it " + "; and ".join(made.problems) + ".")
        print("\n".join(advice(given, made, remedies)))


def machine(options: argparse.Namespace, arguments: training.Arguments) -> Machine:
    """The machine named, or the one at hand."""
    for name in ("gpus", "nodes"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(options, name)}.")
    if options.examples < 0:
        raise UserError(f"--examples must be at least 1, not {options.examples}.")
    for name in ("ram", "price"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"--{name} must be a number, not {value}.")
    ram = None if options.ram is None else round(options.ram * 1e9)
    if options.gpu:
        return Machine(gpus.named(options.gpu), options.gpus or 1, options.nodes, ram)
    here = planning.this_machine(
        arguments.output_dir, gpus.installed(), options.gpus or 0, options.nodes
    )
    return here if ram is None else replace(here, host=ram)


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
        f"  data      {work.examples:,} examples{kind}: {work.steps:,} steps of {work.batch}",
        f"  tokens    {work.tokens:,} computed of {work.real:,}, {work.padded:,} in the padded "
        f"recipe ({saved:.0%} saved); in {half}",
        f"  memory    {made.memory.total / 1e9:.1f} of {one.device.memory / 1e9:.1f} GB a device, "
        f"worst in {MOMENTS[made.memory.moment]}; headroom {made.headroom / 1e9:.1f}:",
        f"            {memory[0]},",
        f"            {memory[1]}",
        f"  disk      {made.disk / 1e9:.1f} GB: a checkpoint {made.checkpoint / 1e9:.1f}, "
        f"the model {made.export / 1e9:.1f}{_of(one.disk)}; "
        f"RAM {made.host / 1e9:.1f} GB a node{_of(one.host)}",
        f"  time      {duration(made.seconds)}{_assumption(made)}",
        *([f"  cost      {_cost(made, price)}"] if price is not None else []),
    ]


def _of(there: int | None) -> str:
    return "" if there is None else f" (of {there / 1e9:.1f})"


def _sizes(made: Plan) -> tuple[str, str]:
    memory = made.memory
    parts = [
        f"{name} {getattr(memory, name) / 1e9:.1f}"
        for name in (
            "weights", "gradients", "optimizer", "activations", "logits", "communication",
            "allocator", "runtime",
        )
    ]  # fmt: skip
    return ", ".join(parts[:5]), ", ".join(parts[5:])


def _assumption(made: Plan) -> str:
    if made.time is None:
        return ": the speed of this device is not known"
    device = made.machine.device
    if made.time.bound == "traffic":
        return f", bound by traffic at {plan_time.LINK_EFFICIENCY:.0%} of the links"
    if not device.cuda:
        return f" at {plan_time.CPU_EFFICIENCY:.0%} of this processor's matrix products"
    kind = "bf16" if made.setting.compute == 2 else "fp32"
    return f" at {plan_time.EFFICIENCY:.0%} of the {kind} peak"


def _cost(made: Plan, price: float) -> str:
    cost = made.cost(price)
    return "not known" if cost is None else f"{cost:,.2f} at {price:g} a device and hour"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return "not known"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def advice(given: Case, made: Plan, remedies: Sequence[Remedy]) -> list[str]:
    """What makes it fit, the cheapest first, as flags to paste."""
    if not remedies:
        return [f"  No flag makes it fit. {planning.more_devices(given)}"]
    told = []
    for remedy in remedies:
        spent = remedy.plan.seconds
        slower = f", {spent / made.seconds:.2f} x the time" if spent and made.seconds else ""
        told.append(f"    {remedy.flags}   ({remedy.plan.memory.total / 1e9:.1f} GB{slower})")
    return ["  Fits with (the cheapest first):", *told]
