"""Suites of tasks: what a model is asked, and what can be checked of its answers.

Four forms are read, told apart by their keys: AlpacaEval's (`instruction`, `output`, `dataset`),
the Self-Instruct evaluation's (`instruction`, `instances`), IFEval's (`prompt`,
`instruction_id_list`, `kwargs`) and Alpaca's data, to which our own suite adds `kind`, `answers`
and IFEval's two keys.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alpaca.datafile import DuplicateKeys, read_raw
from alpaca.errors import UserError
from alpaca.passport import text_sha256

LONE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair: some models answer it
OURS = Path(__file__).resolve().parents[2] / "data" / "evaluation_tasks.jsonl"


@dataclass(frozen=True)
class Task:
    """One task.

    key: hash of what is asked and of how often it was asked before in the suite. reference: a good
    answer. answers: the only right ones, for an exact match. checks: names and arguments of
    IFEval's verifiable instructions.
    """

    instruction: str
    input: str = ""
    kind: str = ""
    dataset: str = ""
    reference: str | None = None
    answers: tuple[str, ...] = ()
    checks: tuple[tuple[str, dict[str, Any]], ...] = ()
    key: str = field(default="", compare=False)

    @property
    def scored(self) -> str:
        """What identifies the reference whose loss was computed; "" without one."""
        return "" if self.reference is None else text_sha256(self.reference)[:16]


def read(path: Path, limit: int | None = None) -> list[Task]:
    """Read a suite; with `limit`, its first tasks.

    Raises:
        UserError: as `read_raw`; or an entry is of no form, named by its number.
    """
    items = read_raw(path)[:limit]
    if not items:
        raise UserError(f"{path} holds no tasks.", "Give it at least one.")
    name = path.name.removesuffix(".gz").partition(".")[0]
    return keyed([_task(path, number, item, name) for number, item in enumerate(items)])


def keyed(tasks: Sequence[Task]) -> list[Task]:
    """The tasks with their keys."""
    seen: Counter[str] = Counter()
    found = []
    for task in tasks:
        asked = json.dumps([task.instruction, task.input])
        found.append(replace(task, key=text_sha256(f"{asked}{seen[asked]}")[:16]))
        seen[asked] += 1
    return found


def seed_of(seed: int, place: int) -> int:
    """The seed of the task at a place in the suite, so that each draws its own numbers."""
    return (seed + place) % 2**63


def _task(path: Path, number: int, item: Any, name: str) -> Task:
    try:
        if not isinstance(item, dict):
            raise ValueError("it is no object")
        if isinstance(item, DuplicateKeys):
            raise ValueError(f"{item.duplicate} occurs more than once")
        return _read(item, name)
    except (KeyError, ValueError, TypeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path}: entry {number} is no task: {why}.",
            "A task has an instruction (or IFEval's prompt); see docs/evaluation.md.",
        ) from None


def _read(item: Mapping[str, Any], name: str) -> Task:
    instances = item.get("instances")
    if instances is not None:  # the Self-Instruct evaluation: one instance a task
        one = isinstance(instances, list) and len(instances) == 1
        if not one or not isinstance(instances[0], dict):
            raise ValueError("instances does not hold one instance")
        item = {
            "dataset": "selfinstruct",
            "kind": item.get("motivation_app"),
            **item,
            **instances[0],
        }
    asked = "instruction" if "instruction" in item else "prompt"
    if asked == "prompt" and "instruction_id_list" not in item:
        raise KeyError("instruction")
    instruction = _text(item, asked)
    if not instruction.strip():
        raise ValueError(f"{asked} is empty")
    reference = item.get("output")
    return Task(
        instruction=instruction,
        input=_text(item, "input", ""),
        kind=_text(item, "kind", ""),
        dataset=_text(item, "dataset", name),
        reference=None if reference is None else _text(item, "output"),
        answers=_texts(item, "answers"),
        checks=_checks(item),
    )


def _text(item: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = item[key] if default is None else item.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str) or LONE.search(value):
        raise ValueError(f"{key} is no text")
    return value


def _texts(item: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = item.get(key) or []
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise ValueError(f"{key} is no list of texts")
    return tuple(values)


def _checks(item: Mapping[str, Any]) -> tuple[tuple[str, dict[str, Any]], ...]:
    names, arguments = _texts(item, "instruction_id_list"), item.get("kwargs") or []
    if not isinstance(arguments, list) or not all(isinstance(one, dict) for one in arguments):
        raise ValueError("kwargs is no list of objects")
    if len(names) != len(arguments):
        raise ValueError("instruction_id_list and kwargs have different lengths")
    # the published file has every argument of every check, null where it does not belong
    given = [{k: v for k, v in one.items() if v is not None} for one in arguments]
    return tuple(zip(names, given, strict=True))
