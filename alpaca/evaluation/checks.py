"""Checks of an answer that need neither people nor a judge: verifiable instructions, exact match.

The verifiable instructions are IFEval's (Zhou et al., 2023, arXiv:2311.07911), checked by the
package if-verifiable. It skips a name that it does not know, takes random arguments for wrong ones,
and draws where it detects languages; here such suites are refused, and the draws have a seed.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alpaca.errors import UserError
from alpaca.evaluation.suites import Task

AROUND = " \"'`*_“”„‘’«»"  # quotes and marks of emphasis
END = ".,;:!?…。"


@dataclass(frozen=True)
class Followed:
    """Which of a task's instructions an answer follows: strictly, and loosely.

    Loosely: also without its first or last line, or without asterisks, as IFEval defines it.
    """

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def normalized(text: str) -> str:
    """A short answer as it is compared: without case, quotes, emphasis, and signs at its end."""
    return " ".join(text.casefold().split()).lstrip(AROUND).rstrip(AROUND + END)


def matches(output: str, answers: Sequence[str]) -> bool:
    """Whether an answer is one of the right ones; signs alone are compared as they are."""
    given = normalized(output)
    if not given:
        return bool(output.strip()) and output.strip() in {answer.strip() for answer in answers}
    return given in {normalized(answer) for answer in answers}


def verified(task: Task, output: str) -> Followed | None:
    """What an answer follows; None if a check needs data of NLTK's that is not installed.

    Raises:
        UserError: the suite names an instruction that IFEval does not have, or its arguments are
            wrong.
    """
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    for name, given in task.checks:
        _check(name, given, task, INSTRUCTION_DICT)
    try:
        results = _evaluated(task, output)
    except RecursionError:  # "[[[[...": no JSON, too deep for the parser to say so
        results = []
    except (re.error, TypeError) as error:  # a keyword is searched for as a regular expression
        raise UserError(
            f"The checks cannot be made ({error}): {task.instruction[:80]}",
            f"Write a sign such as + in a keyword as \\+: {[dict(one) for _, one in task.checks]}.",
        ) from None
    except LookupError as error:
        if isinstance(error, KeyError | IndexError):
            raise
        return None
    if not results:  # an empty answer
        return Followed((False,) * len(task.checks), (False,) * len(task.checks))
    return Followed(
        tuple(one.strict_pass for one in results), tuple(one.loose_pass for one in results)
    )


def _evaluated(task: Task, output: str) -> list[Any]:
    """The package's results; it logs every answer whose language it cannot detect."""
    import langdetect
    from if_verifiable.common import evaluate_instructions
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    langdetect.DetectorFactory.seed = 0
    names, arguments = (list(part) for part in zip(*task.checks, strict=True))
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        results, _ = evaluate_instructions(
            output, names, arguments, task.instruction, INSTRUCTION_DICT
        )
    finally:
        logging.disable(before)
    return list(results)


def _check(name: str, given: Mapping[str, Any], task: Task, known: Mapping[str, Any]) -> None:
    """Refuse a name that IFEval does not have, and arguments that it would replace by chance."""
    if name not in known:
        raise UserError(
            f"The suite checks {name!r}, which IFEval does not have: {task.instruction[:80]}",
            f"It has: {', '.join(sorted(known))}.",
        )
    checker = known[name](name)
    try:
        checker.build_description(**given)
        taken = checker.get_instruction_args() or {}
        wrong = [key for key, value in taken.items() if not _same(value, given.get(key))]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"The arguments of {name} are wrong: {error}.", str(dict(given))) from None
    if wrong and "prompt" not in taken:
        raise UserError(
            f"The suite's {name} has no usable {wrong[0]}: {task.instruction[:80]}",
            f"It was given {dict(given)}.",
        )


def _same(taken: Any, given: Any) -> bool:
    """Whether a checker uses what it was given; it strips, sorts and lowers texts."""
    if isinstance(taken, list) and isinstance(given, list):
        return sorted(map(str, set(taken))) == sorted(map(str, set(given)))
    return str(taken).strip().lower() == str(given).strip().lower()
