"""Answers of a model to a suite: AlpacaEval's `model_outputs.json`, and more keys.

AlpacaEval reads `instruction`, `output`, `generator` and `dataset`. We add `input`, `kind`,
`tokens` and `finish_reason` of the answer, `reference_loss` and `reference_tokens` (how likely the
model finds the suite's own answer) and `settings`.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpaca import atomic
from alpaca.datafile import read_raw
from alpaca.errors import UserError
from alpaca.evaluation.suites import Task, keyed


@dataclass(frozen=True)
class Output:
    """One answer.

    finish_reason: stop, or length if a limit cut it. reference_loss: the sum of the negative log
    likelihoods, in nats, of the reference_tokens tokens of the reference answer and its end.
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
    entries = [one.entry() for one in outputs]
    atomic.write_text(path, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> list[Output]:
    """Read a file of this program or another.

    Raises:
        UserError: it is no list of answers of one generator, or an entry lacks a key.
    """
    items = read_raw(path)
    remedy = "It needs AlpacaEval's keys: instruction, output, generator (and dataset)."
    found = []
    for number, item in enumerate(items):
        wrong = _fault(item)
        if wrong:
            raise UserError(f"{path}: entry {number}: {wrong}.", remedy)
        found.append(_output(item))
    names = sorted({one.generator for one in found})
    if len(names) != 1:
        told = ", ".join(names[:5]) or "no answers"
        raise UserError(f"{path} holds the answers of several generators ({told}).", remedy)
    tasks = keyed([one.task for one in found])
    return [Output(**{**vars(one), "task": task}) for one, task in zip(found, tasks, strict=True)]


def _fault(item: Any) -> str | None:
    if not isinstance(item, dict):
        return "it is no object"
    for key in ("instruction", "output", "generator"):
        if not isinstance(item.get(key), str):
            return f"{key} is no text"
    for key in ("input", "dataset", "kind", "finish_reason"):
        if not isinstance(item.get(key, ""), str | None):
            return f"{key} is no text"
    for key in ("tokens", "reference_loss", "reference_tokens"):
        value = item.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value) and value >= 0):
            return f"{key} is no number of at least 0"
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
