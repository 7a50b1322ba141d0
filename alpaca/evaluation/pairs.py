"""Pairs of two models' answers to the same tasks, and the seed's order of them.

A pair's place in that order depends on the seed and the pair alone, so that a judge who continues
with grown files, or with another --limit, sees the rest in the same order.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alpaca.errors import UserError
from alpaca.evaluation import outputs


@dataclass(frozen=True)
class Pair:
    """Two answers to one task; answers[0] is of the first file, whatever side it is shown on."""

    key: str
    instruction: str
    input: str
    answers: tuple[str, str]
    dataset: str = ""
    kind: str = ""

    @property
    def identical(self) -> bool:
        """Whether a reader would see no difference."""
        return self.answers[0].strip() == self.answers[1].strip()

    @property
    def content(self) -> tuple[str, ...]:
        """What is asked and answered: the same for repeats of a task with the same answers."""
        return (self.instruction, self.input, *self.answers)


@dataclass(frozen=True)
class Contest:
    """Two models' answers to the tasks that both have; alone: how many only one of them has."""

    names: tuple[str, str]
    pairs: list[Pair]
    alone: tuple[int, int]


def joined(first: Path, second: Path) -> Contest:
    """The pairs of two files of answers, by instruction and input; repeats of those by order.

    Raises:
        UserError: as `outputs.read`; the files have no task in common, or hold the same answers of
            one model.
    """
    ours, theirs = _answers(first), _answers(second)
    common = [key for key in ours if key in theirs]
    if not common:
        raise UserError(
            f"{first} and {second} have no task in common.",
            "Let both models answer the same suite: instruction and input must be equal.",
        )
    pairs = [
        Pair(
            key=key,
            instruction=(task := ours[key].task).instruction,
            input=task.input,
            answers=(ours[key].output, theirs[key].output),
            dataset=task.dataset,
            kind=task.kind,
        )
        for key in common
    ]
    alone = (len(ours) - len(common), len(theirs) - len(common))
    one, other = (next(iter(each.values())).generator for each in (ours, theirs))
    if one == other:
        if not any(alone) and all(pair.answers[0] == pair.answers[1] for pair in pairs):
            raise UserError(
                f"{first} and {second} hold the same answers of {one}.",
                "Name the files of two models, or of two runs of one.",
            )
        one, other = f"{one} (1)", f"{other} (2)"
    return Contest((one, other), pairs, alone)


def _answers(path: Path) -> dict[str, outputs.Output]:
    """The answers by the key of their task."""
    return {one.task.key: one for one in outputs.read(path)}


def ordered(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The pairs, shuffled by the seed; a pair's place among others does not depend on the rest."""
    return sorted(pairs, key=lambda pair: drawn("order", seed, pair.key))


def drawn(*parts: object) -> str:
    """A hash of the parts, in hex: a draw that every run repeats."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
