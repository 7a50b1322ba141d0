"""The report on a judge's verdicts: win rate, length-controlled win rate, position bias."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from alpaca.errors import UserError
from alpaca.evaluation import verdict_forms, verdicts
from alpaca.evaluation.annotations import Annotation
from alpaca.evaluation.ballot import TIE
from alpaca.evaluation.length_control import length_controlled


def report(judged: Sequence[Annotation], html: Path | None, json: Path | None) -> None:
    """Print it; write it as a page and as JSON where files are named.

    Raises:
        UserError: no pair has a verdict.
    """
    if all(one.preference is None for one in judged):
        raise UserError(
            f"None of the {len(judged)} pairs has a verdict: no reply held 0, 1 or 2.",
            "Look at the replies in the .journal.jsonl file; a judge that thinks first needs a "
            "larger --max_tokens, and another --output.",
        )
    found = replace(
        verdicts.judged(judged), sides=sides(judged), lines=[*agreement(judged), controlled(judged)]
    )
    verdict_forms.tell(found, html, json)


def sides(judged: Sequence[Annotation]) -> tuple[int, int]:
    """How often the answer shown first won, and the one shown second, over both orders.

    `verdicts` of an annotation are turned to output_1's side: in the second order output_2 was
    shown first.
    """
    shown = [
        (one.extra["verdicts"][0], 3 - one.extra["verdicts"][1])
        for one in judged
        if _both(one) is not None
    ]
    each = [preference for pair in shown for preference in pair]
    return sum(one < TIE for one in each), sum(one > TIE for one in each)


def agreement(judged: Sequence[Annotation]) -> list[str]:
    """On how many pairs the two orders have one winner, and how many have no verdict."""
    both = [found for one in judged if (found := _both(one)) is not None]
    same = sum((a > TIE) == (b > TIE) and (a < TIE) == (b < TIE) for a, b in both)
    lines = [f"Both orders have the same winner, or none, on {same:,} of {len(both):,} pairs."]
    missing = sum(one.preference is None for one in judged)
    if missing:
        lines.append(f"{missing:,} pairs have no verdict: a reply held none.")
    return lines


def _both(one: Annotation) -> tuple[float, float] | None:
    first, second = one.extra.get("verdicts") or (None, None)
    return None if first is None or second is None else (first, second)


def controlled(judged: Sequence[Annotation]) -> str:
    """The win rate if both answers were equally long, or why there is none."""
    known = [one for one in judged if one.preference is not None]
    found = length_controlled(
        [one.preference for one in known],
        [len(one.output_1) for one in known],
        [len(one.output_2) for one in known],
    )
    if found.win_rate is None:
        return f"No length-controlled win rate: {found.note}"
    return (
        f"Length-controlled win rate: {found.win_rate:.1f}% "
        f"(standard error {found.standard_error:.1f}); "
        "AlpacaEval's model, without instruction difficulty."
    )
