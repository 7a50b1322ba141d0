"""Answers of a model to a suite: AlpacaEval's `model_outputs.json`, and more keys.

AlpacaEval reads `instruction`, `output`, `generator` and `dataset`. We add `input`, `kind`,
`tokens` and `finish_reason` of the answer, `reference_loss` and `reference_tokens` (how likely the
model finds the suite's own answer) and `settings`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alpaca import atomic
from alpaca.datafile import read_raw
from alpaca.errors import UserError
from alpaca.evaluation.suites import LONE, Task, keyed

LARGEST = 1e15  # of a number of tokens, or a loss


@dataclass(frozen=True)
class Output:
    """One answer.

    finish_reason: stop, length if a limit cut it, or "refused: ..." if there is none.
    reference_loss: the sum of the negative log likelihoods, in nats, of the reference_tokens tokens
    of the reference answer and its end.
    """

    task: Task
    output: str
    generator: str
    tokens: int | None = None
    finish_reason: str | None = None
    reference_loss: float | None = None
    reference_tokens: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """The object in the file."""
        task = self.task
        found = {
            "instruction": task.instruction,
            "input": task.input,
            "output": self.output,
            "generator": self.generator,
            "dataset": task.dataset,
            "kind": task.kind,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "reference_loss": self.reference_loss,
            "reference_tokens": self.reference_tokens,
            "settings": self.settings,
        }
        return {key: value for key, value in found.items() if value is not None}


def write(path: Path, outputs: list[Output]) -> None:
    """Write the file atomically."""
    atomic.write_text(path, encoded([one.entry() for one in outputs]))


def encoded(value: Any) -> str:
    """A JSON value as a file has it; half of a surrogate pair, which has no UTF-8, as an escape."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    return LONE.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def check_target(path: Path, flag: str, inputs: Sequence[Path] = ()) -> None:
    """Refuse a file that could not be written, or that is an input, before the work is done.

    Raises:
        UserError: it is a folder or in none, or one of `inputs`.
    """
    try:
        above = next(parent for parent in path.absolute().parents if parent.exists())
        folder, blocked = path.is_dir(), not above.is_dir()
        own = path.exists() and any(one.exists() and path.samefile(one) for one in inputs)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}.") from None
    if folder or blocked:
        what = f"{path} is a folder" if folder else f"{above} is no folder"
        raise UserError(f"{flag} {path} cannot be written: {what}.", "Name another file.")
    if own:
        raise UserError(f"{flag} {path} is an input, and would be lost.", "Name another file.")


def read(path: Path) -> list[Output]:
    """Read a file of this program or another.

    Raises:
        UserError: it is no list of answers of one generator, or an entry lacks a key, or holds
            half of a surrogate pair.
    """
    items = read_raw(path)
    remedy = "It needs AlpacaEval's keys: instruction, output, generator (and dataset)."
    found = []
    for number, item in enumerate(items):
        wrong = _fault(item)
        if wrong:
            raise UserError(f"{path}: entry {number}: {wrong}.", remedy)
        if any(isinstance(text, str) and LONE.search(text) for text in item.values()):
            raise UserError(
                f"{path}: entry {number} holds half of a surrogate pair, which is not text.",
                "Replace it in the file, or leave the entry out.",
            )
        found.append(_output(item))
    names = sorted({one.generator for one in found})
    if not names:
        raise UserError(f"{path} holds no answers.", remedy)
    if len(names) > 1:
        told = ", ".join(names[:5])
        raise UserError(f"{path} holds the answers of several generators ({told}).", remedy)
    tasks = keyed([one.task for one in found])
    return [replace(one, task=task) for one, task in zip(found, tasks, strict=True)]


def _fault(item: Any) -> str | None:
    if not isinstance(item, dict):
        return "it is no object"
    for key in ("instruction", "output", "generator"):
        if not isinstance(item.get(key), str):
            return f"{key} is no text"
    for key in ("input", "dataset", "kind", "finish_reason"):
        if not isinstance(item.get(key, ""), str | None):
            return f"{key} is no text"
    for key, kind in (("tokens", int), ("reference_loss", int | float), ("reference_tokens", int)):
        value = item.get(key)
        number = isinstance(value, kind) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value <= LARGEST):
            whole = " whole" if kind is int else ""
            return f"{key} is no{whole} number of at least 0"
    return None


def _output(item: dict[str, Any]) -> Output:
    task = Task(
        instruction=item["instruction"],
        input=item.get("input") or "",
        kind=item.get("kind") or "",
        dataset=item.get("dataset") or "",
    )
    numbers = ("tokens", "finish_reason", "reference_loss", "reference_tokens")
    settings = item.get("settings")
    return Output(
        task,
        item["output"],
        item["generator"],
        settings=settings if isinstance(settings, dict) else {},
        **{name: item.get(name) for name in numbers},
    )
