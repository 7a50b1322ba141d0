"""What votes say: wins, over all and by dataset, kind and judge; agreement of judges; sides.

Wins are output_2's, as everywhere in AlpacaEval: output_1 is the baseline's.
With several judges, a pair counts once in "all", "dataset" and "kind": for the answer that most of
its judges prefer. Votes of several judges on one pair are not independent, so that counting each
would make the interval too narrow.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from alpaca.errors import UserError
from alpaca.evaluation import annotations
from alpaca.evaluation.agreement import cohen_kappa, krippendorff_alpha
from alpaca.evaluation.annotations import Annotation
from alpaca.evaluation.ballot import TIE, content_of
from alpaca.evaluation.statistics import WinRate, win_rate


@dataclass(frozen=True)
class Row:
    """One line of the report; group: all, dataset, kind or judge."""

    group: str
    label: str
    rate: WinRate


@dataclass(frozen=True)
class Verdict:
    """The report; the rates are of names[1]. Agreement is None where it is not defined."""

    names: tuple[str, str]
    judges: list[str]
    votes: int
    pairs: int
    identical: int
    rows: list[Row]
    kappas: list[tuple[str, str, int, float | None]]  # two judges, pairs of both, Cohen's kappa
    alpha: float | None  # Krippendorff's, nominal
    sides: tuple[int, int]  # wins of the answer that was shown on the left, and on the right
    lines: Sequence[str] = ()  # more sentences of the report


def load(paths: Sequence[Path]) -> Verdict:
    """The report on files of votes.

    Raises:
        UserError: as `annotations.read`; the files compare different models, or a judge's votes
            on a pair are in two of them.
    """
    entries: list[Annotation] = []
    seen: dict[tuple[str, ...], Path] = {}
    for path in paths:
        for entry in annotations.read(path):
            turned = _turned(entry, entries[0] if entries else entry, path)
            vote = (turned.annotator, *content_of(turned))
            if seen.setdefault(vote, path) != path:
                raise UserError(
                    f"{path} and {seen[vote]} both have {vote[0]}'s vote on one pair.",
                    "Name each file once, and no copies.",
                )
            entries.append(turned)
    return judged(entries)


def _turned(entry: Annotation, first: Annotation, path: Path) -> Annotation:
    """The entry with the models in the order of the first one's."""
    names = (first.generator_1, first.generator_2)
    own = (entry.generator_1, entry.generator_2)
    if own == names:
        return entry
    if own != names[::-1]:
        raise UserError(
            f"{path} compares {' with '.join(own)}, and not {' with '.join(names)}.",
            "A report is on one pair of models.",
        )
    shown = entry.extra.get("shown_first")
    return replace(
        entry,
        output_1=entry.output_2,
        output_2=entry.output_1,
        generator_1=names[0],
        generator_2=names[1],
        preference=None if entry.preference is None else 3 - entry.preference,
        extra={**entry.extra, "shown_first": 3 - shown if shown in (1, 2) else None},
    )


def judged(entries: Sequence[Annotation]) -> Verdict:
    """The report on votes on one pair of models; UserError if there are none."""
    entries = [entry for entry in entries if entry.preference is not None]
    if not entries:
        raise UserError("There are no votes.", "Judge some pairs first.")
    judges = list(dict.fromkeys(entry.annotator for entry in entries))
    table = _by_pair(entries)
    read = [votes for votes in table if not _identical(votes)]
    return Verdict(
        names=(entries[0].generator_1, entries[0].generator_2),
        judges=judges,
        votes=len(entries),
        pairs=len(table),
        identical=len(table) - len(read),
        rows=_rows(judges, entries, table),
        kappas=_kappas(judges, read),
        alpha=_alpha(judges, read),
        sides=_sides(entries),
    )


Votes = dict[str, Annotation]  # on one pair, by judge


def _by_pair(entries: Iterable[Annotation]) -> list[Votes]:
    """The votes on each pair; a judge's second vote on equal content is about the task's repeat."""
    found: dict[tuple[object, ...], Votes] = {}
    for entry in entries:
        content, repeat = content_of(entry), 0
        while entry.annotator in found.get((*content, repeat), {}):
            repeat += 1
        found.setdefault((*content, repeat), {})[entry.annotator] = entry
    return list(found.values())


def _rows(
    judges: Sequence[str], entries: Sequence[Annotation], table: Sequence[Votes]
) -> list[Row]:
    """All pairs; then each dataset, kind and judge, where there are several."""
    firsts = [next(iter(votes.values())) for votes in table]
    decided = [decision(votes.values()) for votes in table]
    if len(judges) == 1:
        decided = [preference_of(first) for first in firsts]  # weighted ones keep their weight
    rows = [Row("all", "all", win_rate(decided))]
    datasets = [first.dataset or "no dataset" for first in firsts]
    kinds = [str(first.extra.get("kind") or "no kind") for first in firsts]
    for group, labels in (("dataset", datasets), ("kind", kinds)):
        for label in sorted(set(labels)) if len(set(labels)) > 1 else ():
            picked = [one for one, own in zip(decided, labels, strict=True) if own == label]
            rows.append(Row(group, label, win_rate(picked)))
    for judge in judges if len(judges) > 1 else ():
        own = [preference_of(entry) for entry in entries if entry.annotator == judge]
        rows.append(Row("judge", judge, win_rate(own)))
    return rows


def _identical(votes: Votes) -> bool:
    first = next(iter(votes.values()))
    return first.output_1.strip() == first.output_2.strip()


def preference_of(vote: Annotation) -> float:
    """The preference of a vote that has one."""
    assert vote.preference is not None
    return vote.preference


def decision(votes: Iterable[Annotation]) -> float:
    """What most votes prefer: 1, 2, or a tie; weighted votes count as whole ones."""
    given = [preference_of(vote) for vote in votes]
    lean = sum(one < TIE for one in given) - sum(one > TIE for one in given)
    return TIE if lean == 0 else 1.0 if lean > 0 else 2.0


def _kappas(
    judges: Sequence[str], table: Sequence[Votes]
) -> list[tuple[str, str, int, float | None]]:
    found = []
    for one, other in combinations(judges, 2):
        both = [votes for votes in table if one in votes and other in votes]
        if both:
            given = [[decision([votes[judge]]) for votes in both] for judge in (one, other)]
            found.append((one, other, len(both), cohen_kappa(*given)))
    return found


def _alpha(judges: Sequence[str], table: Sequence[Votes]) -> float | None:
    return krippendorff_alpha(
        [[decision([v[judge]]) if judge in v else None for v in table] for judge in judges]
    )


def _sides(entries: Iterable[Annotation]) -> tuple[int, int]:
    """How often the answer on the left won, and the one on the right."""
    wins = [
        (preference_of(entry) < TIE) == (entry.extra["shown_first"] == 1)
        for entry in entries
        if entry.extra.get("shown_first") in (1, 2) and entry.preference != TIE
    ]
    return wins.count(True), wins.count(False)
