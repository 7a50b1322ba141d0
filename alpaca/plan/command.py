"""`python -m alpaca plan`: what a run needs and costs, and whether it fits, before it starts.

It takes every flag of train.py, and a machine: this one, or a card named from the table.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace

from alpaca.errors import UserError
from alpaca.plan import devices, planner, report
from alpaca.plan.plan import Machine
from alpaca.recipe import arguments as training
from alpaca.recipe import fsdp_config


class Parser(argparse.ArgumentParser):
    """Keeps the flags that it doesn't know in `training`, for train.py's own parser."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse; errors in the training flags are found when the command runs."""
        known: argparse.Namespace
        known, rest = self.parse_known_args(args, namespace)
        known.training = rest
        return known


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    made = Parser(
        usage="%(prog)s [--gpu NAME] [--gpus N] [--nodes N] [--FLAG OF train.py VALUE ...]",
        description="Show what a training run needs, how long it takes, and whether it fits.",
        epilog="Every flag of train.py is accepted too. --model_name_or_path may name a "
        "model that is not on disk: llama-7b, llama-2-70b, llama-3-8b and others. "
        f"Cards: {', '.join(devices.GPUS)}.",
        allow_abbrev=False,
    )
    made.add_argument("--gpu", metavar="NAME", help="a card by name (default: this machine's)")
    made.add_argument("--gpus", type=int, metavar="N", help="devices per node")
    made.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (%(default)s)")
    made.add_argument(
        "--ram", type=float, metavar="GB", help="memory per node (default: this machine's)"
    )
    made.add_argument("--price", type=float, metavar="X", help="price of one device for one hour")
    made.add_argument(
        "--examples",
        type=int,
        default=0,
        metavar="N",
        help="plan for N examples with the lengths of those in --data_path",
    )
    made.add_argument("--json", action="store_true", help="print everything as one JSON object")
    return made


def run(options: argparse.Namespace) -> None:
    """Print the plan; raises UserError (exit code 2) when a flag or the data is wrong."""
    arguments, notices = training.parse(options.training)
    arguments, more = fsdp_config.apply(arguments)
    given = planner.case(arguments, machine(options, arguments), options.examples)
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
    print("\n".join(report.lines(given, made, options.price)))
    if made.fits:
        print("  It fits.")
    else:
        print("  It does NOT fit: it " + "; and ".join(made.problems) + ".")
        print("\n".join(report.advice(given, made, remedies)))


def machine(options: argparse.Namespace, arguments: training.Arguments) -> Machine:
    """The named machine, or this one."""
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
        return Machine(devices.named(options.gpu), options.gpus or 1, options.nodes, ram)
    local = planner.this_machine(
        arguments.output_dir, devices.installed(), options.gpus or 0, options.nodes
    )
    return local if ram is None else replace(local, host=ram)
