"""`python -m alpaca answer`: answer a suite of tasks, for `score`, `compare` and `judge`.

A folder is answered by the engine itself, without a server, many tasks at a time; a URL is asked
over OpenAI's API. Every finished answer is in a journal, so the same command goes on where it was
stopped. The output is written whole, in the suite's order, at the end.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from alpaca.address import is_url
from alpaca.dataset.limits import positive, progress_bar
from alpaca.errors import UserError
from alpaca.evaluation import suites
from alpaca.evaluation.outputs import Output, check_target, write
from alpaca.evaluation.suites import LONE, Task

SETTINGS = ("temperature", "top_p", "max_new_tokens", "seed")


def parser() -> argparse.ArgumentParser:
    """Flags of the verb."""
    made = argparse.ArgumentParser(
        description="answer a suite of tasks: AlpacaEval's model_outputs.json, resumable",
        epilog="Suites: AlpacaEval's, Self-Instruct's user_oriented_instructions.jsonl, IFEval's, "
        "Alpaca-format data, and ours, the default. Of a URL, OPENAI_API_KEY is its key.",
    )
    add = made.add_argument
    add("--model", required=True, metavar="FOLDER|URL", help="model folder, or an endpoint's URL")
    add("--suite", type=Path, default=suites.OURS, metavar="FILE", help="tasks to answer")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="outputs.json")
    add(
        "--generator", metavar="NAME", help="name of the model in the file; the folder's by default"
    )
    add("--limit", type=positive, help="only the first tasks")
    add("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    add("--top_p", type=float, default=1.0)
    add("--seed", type=int, default=0, help="of sampling; each task draws with its own")
    add("--max_new_tokens", type=positive, default=512, help="most tokens of an answer")
    add("--model_id", metavar="ID", help="of a URL: its model; the first it lists by default")
    add("--concurrency", type=positive, default=16, help="of a URL: requests in flight")
    return made


def run(arguments: argparse.Namespace) -> None:
    """Answer the suite and write the file."""
    from alpaca.dataset.journal import Journal, side_file

    _check(arguments)
    tasks = suites.read(arguments.suite, arguments.limit)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    source = _remote(arguments, tasks) if is_url(arguments.model) else _local(arguments, tasks)
    generator = arguments.generator or source.name
    begun = {"model": source.identity, "generator": generator, **settings}
    with Journal(side_file(arguments.output, "journal"), begun) as journal:
        given = {entry["key"]: entry for entry in journal.entries}
        left = [task for task in tasks if not _current(task, given.get(task.key))]
        answers = source.answer(left, settings, answered=bool(given))
        with progress_bar("answers", len(tasks), len(tasks) - len(left)) as bar:
            for entry in answers:
                journal.append(entry)
                given[entry["key"]] = entry
                bar.update()
    outputs = [_output(task, given[task.key], generator, settings) for task in tasks]
    write(arguments.output, outputs)
    print(_summary(outputs, arguments.output))


def _check(arguments: argparse.Namespace) -> None:
    """Refuse values that no run can have, before anything is loaded."""
    if not 0 <= arguments.temperature <= 5 or not 0 < arguments.top_p <= 1:
        raise UserError(
            f"--temperature is {arguments.temperature}, --top_p {arguments.top_p}.",
            "Set --temperature to 0 to 5, --top_p to above 0 and at most 1.",
        )
    if LONE.search(arguments.generator or ""):
        raise UserError("--generator holds bytes that are not UTF-8.", "Give another name.")
    check_target(arguments.output, "--output", [arguments.suite])


def _current(task: Task, entry: dict[str, Any] | None) -> bool:
    """Whether a task was answered; if its reference was scored, whether that is still the same."""
    return entry is not None and entry.get("reference", task.scored) == task.scored


def _local(arguments: argparse.Namespace, tasks: list[Task]) -> Any:
    # Before torch is loaded: its threads else wait in a loop, and take the time of other programs.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from alpaca.evaluation.offline import Offline

    return Offline(Path(arguments.model), tasks, arguments.max_new_tokens)


def _remote(arguments: argparse.Namespace, tasks: list[Task]) -> Any:
    try:
        from alpaca.evaluation.endpoint import Endpoint
    except ImportError as error:
        raise UserError(
            f"The package {error.name} is missing.", "pip install -e '.[evaluation]'"
        ) from None
    return Endpoint(arguments.model, tasks, arguments.model_id, arguments.concurrency)


def _output(task: Task, entry: dict[str, Any], generator: str, settings: dict[str, Any]) -> Output:
    told = ("output", "tokens", "finish_reason", "reference_loss", "reference_tokens")
    return Output(
        task=task,
        generator=generator,
        settings=settings,
        **{name: entry[name] for name in told if name in entry},
    )


def _summary(outputs: list[Output], path: Path) -> str:
    reasons = [one.finish_reason or "" for one in outputs]
    refused = [reason for reason in reasons if reason.startswith("refused")]
    cut = reasons.count("length")
    ended = f", {cut} of them cut at the limit" if cut else ""
    if refused:
        ended += f", {len(refused)} without an answer (the first {refused[0]})"
    return f"{len(outputs)} answers of {outputs[0].generator}{ended}: {path}"
