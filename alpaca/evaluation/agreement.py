"""Judges: whether they agree beyond chance, and whether one prefers a place to an answer."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from alpaca.errors import UserError
from alpaca.evaluation.statistics import sign_test, wilson


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement of two judges beyond chance, nominal; None without pairs or with one label only.

    Source: J. Cohen, "A coefficient of agreement for nominal scales" (1960).

    Raises:
        UserError: the judges have different numbers of labels.
    """
    if len(first) != len(second):
        raise UserError(
            f"{len(first)} and {len(second)} labels cannot be paired.",
            "Give one label of each judge for each item.",
        )
    total = len(first)
    agreed = sum(a == b for a, b in zip(first, second, strict=True))
    counts, others = Counter(first), Counter(second)
    chance = sum(count * others[label] for label, count in counts.items())
    if total * total == chance:  # one label only, or no pairs
        return None
    return (agreed * total - chance) / (total * total - chance)


def krippendorff_alpha(table: Sequence[Sequence[Hashable | None]]) -> float | None:
    """Agreement of any number of judges, nominal: table[judge][item], None where there is no label.

    None if no item has two labels, or all such labels are the same. Source: K. Krippendorff,
    "Computing Krippendorff's Alpha-Reliability" (2011).

    Raises:
        UserError: the judges have different numbers of items.
    """
    if len({len(row) for row in table}) > 1:
        raise UserError(
            "The judges have different numbers of items.",
            "Give each judge one label (or None) for each item.",
        )
    columns = zip(*table, strict=True)
    items = [Counter(label for label in item if label is not None) for item in columns]
    paired = [item for item in items if item.total() > 1]
    totals = sum(paired, Counter[Hashable]())
    values = totals.total()
    apart = sum(_unequal(item) / (item.total() - 1) for item in paired)
    expected = _unequal(totals)
    return 1 - (values - 1) * apart / expected if expected else None


def _unequal(counts: Counter[Hashable]) -> int:
    """Ordered pairs of different labels."""
    return counts.total() ** 2 - sum(count * count for count in counts.values())


@dataclass(frozen=True)
class PositionBias:
    """How often the answer shown first wins: percent, 95% Wilson interval, sign test's p-value."""

    share: float
    low: float
    high: float
    p_value: float


def position_bias(first_wins: int, second_wins: int) -> PositionBias | None:
    """Whether a judge prefers a position: wins of the answer shown first, and of the second.

    Ties are left out; None without any win. Only a share over both orders of each pair is a bias.
    """
    total = first_wins + second_wins
    if not total:
        return None
    low, high = wilson(first_wins, total)
    share, p_value = 100 * first_wins / total, sign_test(first_wins, second_wins)
    return PositionBias(share, 100 * low, 100 * high, p_value)
