"""`python -m alpaca score`: what can be said of answers with neither people nor a judge.

Checks a program can make, exact matches, the loss of the suite's own answers, answers that were
cut, refusals, repetition and language; each with the 95% interval of a bootstrap over the tasks.
Several files are compared on the tasks they share: the others are held against the first.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alpaca import atomic
from alpaca.errors import UserError
from alpaca.evaluation import outputs, suites
from alpaca.evaluation.measures import MEASURES, Measure, Scores, difference, measure, perplexity
from alpaca.evaluation.statistics import Interval
from alpaca.passport import json_numbers


def parser() -> argparse.ArgumentParser:
    """Flags of the verb."""
    made = argparse.ArgumentParser(
        description="score answers: checks, matches, loss, repetition, ends; with intervals",
        epilog="docs/evaluation.md says what each number can tell.",
    )
    add = made.add_argument
    add(
        "outputs",
        type=Path,
        nargs="+",
        metavar="OUTPUTS",
        help="files of `answer`, or AlpacaEval's",
    )
    add(
        "--suite", type=Path, action="append", metavar="FILE",
        help="tasks with checks and right answers; ours by default",
    )  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write the figures, with those of each task")
    add(
        "--html",
        type=Path,
        metavar="FILE",
        help="write a page: plots, and the answers side by side",
    )
    return made


def run(arguments: argparse.Namespace) -> None:
    """Measure each file and print one table."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    inputs = [*arguments.outputs, *(arguments.suite or [])]
    for flag in ("json", "html"):
        if getattr(arguments, flag) is not None:
            outputs.check_target(getattr(arguments, flag), f"--{flag}", inputs)
    tasks = {
        task.key: task for suite in arguments.suite or [suites.OURS] for task in suites.read(suite)
    }
    models = [measure(outputs.read(path), tasks) for path in arguments.outputs]
    names = [model.generator for model in models]
    if len(set(names)) < len(names):
        raise UserError(
            f"Two files are of one generator: {', '.join(names)}.",
            "Answer again with another --generator, so that the table can tell them apart.",
        )
    for notice in notices(models, tasks):
        print(f"score: {notice}", file=sys.stderr)
    show(models)
    if arguments.json:
        atomic.write_text(arguments.json, outputs.encoded(json_numbers(as_json(models))))
    if arguments.html:
        from alpaca.evaluation.scorepage import page

        atomic.write_text(arguments.html, page(models, tasks))
        print(f"page: {arguments.html}")


def notices(models: Sequence[Scores], tasks: dict[str, suites.Task]) -> list[str]:
    """What the table cannot show."""
    found = list(dict.fromkeys(notice for model in models for notice in model.notices))
    for model in models:
        known = sum(one.task.key in tasks for one in model.outputs)
        if known < len(model.outputs):
            found.append(
                f"{len(model.outputs) - known} of {len(model.outputs)} answers of "
                f"{model.generator} are to tasks that --suite does not have: they have no checks"
            )
    first = {one.task.key for one in models[0].outputs}
    for model in models[1:]:
        shared = len(first & {one.task.key for one in model.outputs})
        if shared < max(len(first), len(model.outputs)):
            found.append(
                f"{model.generator} is held against {models[0].generator} on the {shared} tasks "
                "that both answered"
            )
        if _otherwise_counted(models[0], model):
            found.append(
                f"{model.generator} and {models[0].generator} have other tokens in the same "
                "references: their losses, which are per token, do not compare"
            )
    return found


def _otherwise_counted(first: Scores, second: Scores) -> bool:
    """Whether two models' tokenizers cut the same references into different numbers of tokens."""
    return any(first.weights.get(key, count) != count for key, count in second.weights.items())


def show(models: Sequence[Scores]) -> None:
    """Print the table: a row a measure, a column a model, and its difference to the first."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from alpaca.evaluation.verdict_forms import plain

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("measure")
    table.add_column("tasks", justify="right")
    for number, model in enumerate(models):
        table.add_column(Text(plain(model.generator)), justify="right")
        if number:
            table.add_column(Text(plain(f"- {models[0].generator}")), justify="right")
    for name, kind in MEASURES.items():
        if not any(model.values[name] for model in models):
            continue
        cells = [kind.title, str(max(len(model.values[name]) for model in models))]
        for number, model in enumerate(models):
            cells.append(written(model.interval(name), kind))
            if number:
                cells.append(changed(difference(models[0], model, name), kind))
        table.add_row(*map(Text, cells))
    Console(width=None if sys.stdout.isatty() else 1000).print(table)
    print("In brackets: 95% intervals, from resampling the tasks. *: better or worse beyond them.")


def written(found: Interval | None, kind: Measure) -> str:
    """A measure with its interval."""
    if found is None:
        return "-"
    if kind.share:
        return f"{found.mean:.1%} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
    mean, low, high = (f"{part:.{kind.digits}f}" for part in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"


def changed(found: Interval | None, kind: Measure) -> str:
    """A difference with its interval; a star where the interval excludes zero."""
    if found is None:
        return "-"
    star = "*" if kind.better and (found.low > 0 or found.high < 0) else ""
    if kind.share:
        points = [100 * part for part in (found.mean, found.low, found.high)]
        return f"{points[0]:+.1f}{star} [{points[1]:+.1f}, {points[2]:+.1f}]"
    mean, low, high = (f"{part:+.{kind.digits}f}" for part in (found.mean, found.low, found.high))
    return f"{mean}{star} [{low}, {high}]"


def as_json(models: Sequence[Scores]) -> dict[str, Any]:
    """The figures: over all tasks, by kind, of each task; the differences to the first model."""
    return {
        "models": [_model(model) for model in models],
        "differences": [
            {
                "generator": model.generator,
                "baseline": models[0].generator,
                **{
                    name: vars(found)
                    for name in MEASURES
                    if (found := difference(models[0], model, name)) is not None
                },
            }
            for model in models[1:]
        ],
    }


def _model(model: Scores) -> dict[str, Any]:
    present = [name for name in MEASURES if model.values[name]]
    found: dict[str, Any] = {
        "generator": model.generator,
        "tasks": len(model.outputs),
        "settings": model.outputs[0].settings,
        "measures": {},
        "kinds": {},
        "each": [
            {
                "instruction": one.task.instruction,
                "input": one.task.input,
                **{
                    name: model.values[name][one.task.key]
                    for name in present
                    if one.task.key in model.values[name]
                },
            }
            for one in model.outputs
        ],
    }
    for name in present:
        over_all = model.interval(name)
        assert over_all is not None
        found["measures"][name] = {**vars(over_all), "tasks": len(model.values[name])}
        found["kinds"][name] = model.by_kind(name)
    if "loss" in present:
        found["measures"]["perplexity"] = {
            part: perplexity(value)
            for part, value in found["measures"]["loss"].items()
            if part != "tasks"
        }
        found["kinds"]["perplexity"] = {k: perplexity(v) for k, v in found["kinds"]["loss"].items()}
    return found
