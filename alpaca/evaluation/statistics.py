"""Win rates and how sure they are: intervals, sign test, what a number of pairs can show.

Preferences are AlpacaEval's: 1 (output_1, the baseline's, is better) to 2 (output_2 is better), 1.5
a tie, 0 an old spelling of 1.5, None no verdict. Only numpy is used: binomial sums are exact, with
Python's integers. What is undefined is None or a UserError, never NaN.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from alpaca.errors import UserError

POWER_PAIRS = (50, 100, 150, 200, 252, 300, 500, 805, 1000)  # 252 and 805: public task sets
CHUNK = 4_000_000  # resampled values in memory at once

# ---- win rate


@dataclass(frozen=True)
class WinRate:
    """How often output_2 is preferred; all but the counts and p_value in percent.

    rate: mean of the preferences, as AlpacaEval's win_rate. standard_error: percentage points, None
    for one verdict. low, high: 95% Wilson interval of wins + ties / 2 of total. p_value: exact
    two-sided sign test of wins and losses. Weighted verdicts count as a win above 1.5.
    """

    wins: int
    ties: int
    losses: int
    total: int
    rate: float
    standard_error: float | None
    low: float
    high: float
    p_value: float


def shares(preferences: Sequence[float | None]) -> np.ndarray:
    """Preferences as 0 (output_1 is better) to 1: float64, without the rows that have no verdict.

    Raises:
        UserError: a value outside 1 to 2 that is not 0.
    """
    given = np.array([value for value in preferences if value is not None], dtype=float)
    given[given == 0] = 1.5
    wrong = given[~((given >= 1) & (given <= 2))]
    if len(wrong):
        raise UserError(
            f"A preference of {wrong[0]:g} is outside the range 1 to 2.",
            "1: output_1 is better, 2: output_2 is better, 1.5: a tie, null: no verdict.",
        )
    return given - 1


def win_rate(preferences: Sequence[float | None]) -> WinRate:
    """The win rate of output_2 over output_1 (AlpacaEval's `AbsoluteScoringRule`).

    Raises:
        UserError: there is no verdict, or a preference is outside 1 to 2.
    """
    given = shares(preferences)
    total = len(given)
    if not total:
        raise UserError(
            "There are no verdicts, so there is no win rate.",
            "Check the annotations: every preference is null, or there are none.",
        )
    wins, losses = int((given > 0.5).sum()), int((given < 0.5).sum())
    ties = total - wins - losses
    low, high = wilson(wins + ties / 2, total)
    error = 100 * float(given.std(ddof=1)) / math.sqrt(total) if total > 1 else None
    rate, p_value = 100 * float(given.mean()), sign_test(wins, losses)
    return WinRate(wins, ties, losses, total, rate, error, 100 * low, 100 * high, p_value)


def wilson(successes: float, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, as fractions; halves (ties) are allowed.

    Source: E. B. Wilson, "Probable inference", JASA 22 (1927), p. 209.

    Raises:
        UserError: there are no trials, or more successes than trials.
    """
    if total <= 0 or not 0 <= successes <= total:
        raise UserError(
            f"{successes:g} of {total} is not a proportion.",
            "Give at least one trial, and at most as many successes as trials.",
        )
    z = NormalDist().inv_cdf((1 + _fraction(confidence, "confidence")) / 2)
    rate, spread = successes / total, z * z / total
    middle = rate + spread / 2
    half = z * math.sqrt(rate * (1 - rate) / total + spread / (4 * total))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    # Rounding leaves 1e-17 where the interval ends at exactly 0 or 1.
    return (low if successes > 0 else 0.0, high if successes < total else 1.0)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value that wins and losses are equally likely; 1 without any."""
    pairs, most = wins + losses, max(wins, losses)
    tail = sum(math.comb(pairs, k) for k in range(most, pairs + 1))
    return min(1.0, float(2 * tail / 2**pairs))


def _fraction(value: float, name: str) -> float:
    if not 0 < value < 1:
        raise UserError(f"{name} is {value:g}.", "Give a number between 0 and 1, such as 0.95.")
    return value


# ---- bootstrap


@dataclass(frozen=True)
class Interval:
    """A mean and its interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: Sequence[float], *, seed: int, resamples: int = 2000, confidence: float = 0.95
) -> Interval:
    """The mean and its percentile interval (Efron, 1979); the same seed gives the same interval.

    Raises:
        UserError: there are no values, or one is not a finite number.
    """
    given = np.asarray(values, dtype=float)
    if not len(given) or not np.isfinite(given).all():
        raise UserError(
            "There are no values to resample, or one of them is NaN or infinite.",
            "Leave out the tasks without a score.",
        )
    rng = np.random.default_rng(seed)
    tail = (1 - _fraction(confidence, "confidence")) / 2
    rows = max(1, CHUNK // len(given))
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = np.concatenate(
        [given[rng.integers(len(given), size=(size, len(given)))].mean(axis=1) for size in sizes]
    )
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(given.mean()), float(low), float(high))


def bootstrap_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Mean of first minus second on the same tasks, in the same order, with a paired interval.

    Raises:
        UserError: as `bootstrap`, or the two have different numbers of tasks.
    """
    if len(first) != len(second):
        raise UserError(
            f"{len(first)} and {len(second)} scores cannot be paired.",
            "Give both models' scores on the same tasks, in the same order.",
        )
    difference = np.subtract(first, second, dtype=float)
    return bootstrap(difference.tolist(), seed=seed, resamples=resamples, confidence=confidence)


# ---- what a number of pairs can show


@dataclass(frozen=True)
class Power:
    """What untied pairs can show: `detectable` (percent), and the Wilson half-width (points)."""

    pairs: int
    detectable: float | None
    half_width: float


def detectable(pairs: int, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The smallest true win rate above 50 that the sign test finds: percent, in steps of 0.1.

    Found: with a probability of at least `power`, there are more wins than losses and the exact
    two-sided p-value is at most `alpha`. None if so few untied pairs never reach `alpha`.
    """
    _fraction(power, "power")
    needed = _needed_wins(pairs, _fraction(alpha, "alpha"))
    if needed is None:
        return None
    low, high = 500, 1000  # tenths of a percent; the power grows with the rate
    while high - low > 1:
        middle = (low + high) // 2
        enough = _at_least(needed, pairs, middle / 1000) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high / 10


def power_table(pairs: Sequence[int] = POWER_PAIRS) -> list[Power]:
    """`detectable` and the half-width of the 95% Wilson interval at 50%, for numbers of pairs."""
    found = []
    for count in pairs:
        low, high = wilson(count / 2, count)
        found.append(Power(count, detectable(count), 50 * (high - low)))
    return found


def _needed_wins(pairs: int, alpha: float) -> int | None:
    """The fewest wins with a p-value of at most alpha; None if there are none."""
    tail = 0
    for wins in range(pairs, pairs // 2, -1):
        tail += math.comb(pairs, wins)
        if 2 * tail / 2**pairs > alpha:
            return wins + 1 if wins < pairs else None
    return pairs // 2 + 1 if pairs else None


def _at_least(wins: int, pairs: int, rate: float) -> float:
    """P(at least `wins` of `pairs`), each won with probability `rate` below 1."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, pairs + 1)))])  # of factorials
    won = np.arange(wins, pairs + 1)
    chances = logs[pairs] - logs[won] - logs[pairs - won]
    return float(np.exp(chances + won * math.log(rate) + (pairs - won) * math.log1p(-rate)).sum())
