"""`python -m alpaca generate`: grow an instruction data set from seed tasks with a teacher model.

Three files are next to OUTPUT and named after it: `.journal.jsonl` (every reply, synced to disk;
the same command resumes from it), `.dropped.jsonl` (every dropped task with its reason) and
`.neighbours.jsonl` (the nearest earlier instructions of each kept one). OUTPUT itself is written
whole, from the journal, when the run ends or is stopped.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from alpaca.dataset import limits
from alpaca.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The command line of `generate`."""
    made = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0].partition(": ")[2],
        epilog="The endpoint's key is read from OPENAI_API_KEY. Ctrl-C once waits for the "
        "requests in flight, twice abandons them; the same command then resumes.",
    )
    add = made.add_argument
    add("--teacher", required=True, metavar="URL", help="OpenAI-compatible endpoint, up to /v1")
    add("--model", required=True, help="the teacher's model name at that endpoint")
    add(
        "--num_instructions",
        type=limits.positive,
        required=True,
        help="tasks to generate, without seeds",
    )
    add("--output", type=Path, default=Path("alpaca_data.json"))
    add("--seed_tasks", type=Path, default=Path("data/seed_tasks.jsonl"))
    add("--endpoint", choices=["chat", "completion"], default="chat")
    add("--per_request", type=limits.positive, default=20, help="tasks per request")
    limits.add_flags(made)
    add("--seed", type=int, default=0, help="random seed for the examples in each request")
    add("--temperature", type=float, default=1.0)
    add("--top_p", type=float, default=1.0)
    add("--max_tokens", type=limits.positive, default=4096, help="most tokens in one reply")
    add(
        "--extra",
        type=_object,
        default={},
        metavar="JSON",
        help="object merged into the request body; null removes a key",
    )
    return made


def run(arguments: argparse.Namespace) -> None:
    """Generate, write the files, and print a summary."""
    try:
        from alpaca.dataset import session  # imports libraries that --help does not need
    except ImportError as error:
        raise UserError(
            f"The package {error.name} is missing.", "pip install -e '.[data]'"
        ) from None
    session.run(arguments)


def _object(text: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("is not a JSON object")
    return value
