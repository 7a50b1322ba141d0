"""Win rates, intervals, agreement and power: against scipy, statsmodels, krippendorff, sklearn."""

import math
import random
from collections.abc import Sequence

import krippendorff
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import fleiss_kappa
from statsmodels.stats.proportion import proportion_confint

from alpaca.errors import UserError
from alpaca.evaluation.agreement import cohen_kappa, krippendorff_alpha, position_bias
from alpaca.evaluation.statistics import (
    bootstrap,
    bootstrap_difference,
    detectable,
    power_table,
    shares,
    sign_test,
    wilson,
    win_rate,
)

# ---- win rate


def test_win_rate_of_a_hand_worked_case() -> None:
    found = win_rate([2, 2, 1, 1.5, 0, None, 1.75])
    assert (found.wins, found.ties, found.losses, found.total) == (3, 2, 1, 6)
    given = [1, 1, 0, 0.5, 0.5, 0.75]
    assert found.rate == pytest.approx(100 * 3.75 / 6)
    assert found.standard_error == pytest.approx(100 * stats.sem(given))
    low, high = proportion_confint(4, 6, method="wilson")  # three wins and two halves
    assert (found.low, found.high) == pytest.approx((100 * low, 100 * high))
    assert found.p_value == pytest.approx(stats.binomtest(3, 4).pvalue)


def test_swapping_the_sides_gives_the_complement() -> None:
    rng = random.Random(3)
    preferences = [rng.choice([1, 2, 1.5, rng.uniform(1, 2)]) for _ in range(200)]
    found, other = win_rate(preferences), win_rate([3 - value for value in preferences])
    assert other.rate == pytest.approx(100 - found.rate)
    assert (other.low, other.high) == pytest.approx((100 - found.high, 100 - found.low))
    assert other.p_value == found.p_value
    assert other.standard_error == pytest.approx(found.standard_error)
    assert 0 < found.p_value < 1


def test_one_verdict_has_no_standard_error() -> None:
    found = win_rate([2])
    assert found.rate == 100
    assert found.standard_error is None
    assert found.high == 100
    assert found.p_value == 1
    assert win_rate([1.5, 0]).p_value == 1  # ties only


def test_without_verdicts_there_is_no_win_rate() -> None:
    for empty in ([], [None, None]):
        with pytest.raises(UserError, match="no verdicts"):
            win_rate(empty)


@pytest.mark.parametrize("wrong", [0.5, 2.01, -1, float("nan"), float("inf")])
def test_a_preference_out_of_range_is_refused(wrong: float) -> None:
    with pytest.raises(UserError, match="outside the range"):
        win_rate([1, wrong])


def test_shares_are_from_zero_to_one_without_missing_ones() -> None:
    assert shares([1, None, 2, 0, 1.5, 1.25]).tolist() == [0, 1, 0.5, 0.5, 0.25]
    assert shares([]).tolist() == []


# ---- intervals and tests


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_equals_statsmodels(confidence: float) -> None:
    for total in (1, 2, 7, 150, 805):
        for successes in np.linspace(0, total, 5):
            expected = proportion_confint(successes, total, alpha=1 - confidence, method="wilson")
            assert wilson(successes, total, confidence) == pytest.approx(expected, abs=1e-12)


def test_wilson_ends_at_exactly_zero_and_one() -> None:
    for total in range(1, 300):
        assert wilson(0, total)[0] == 0
        assert wilson(total, total)[1] == 1


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (3, 2), (-1, 2), (math.nan, 2)])
def test_wilson_refuses_what_is_no_proportion(successes: float, total: int) -> None:
    with pytest.raises(UserError, match="not a proportion"):
        wilson(successes, total)


def test_a_confidence_outside_0_to_1_is_refused() -> None:
    with pytest.raises(UserError, match="confidence is 95"):
        wilson(1, 2, confidence=95)
    with pytest.raises(UserError, match="power is 1"):
        detectable(10, power=1)


def test_sign_test_equals_scipy() -> None:
    for wins in (0, 1, 4, 5, 6, 40, 75, 400, 1200):
        for losses in (0, 1, 5, 61, 405):
            if wins + losses:
                expected = stats.binomtest(wins, wins + losses).pvalue
                assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)
    assert sign_test(0, 0) == 1
    assert sign_test(3, 3) == 1
    assert 0 < sign_test(1000, 0) < 1e-300  # does not overflow


# ---- bootstrap


def test_bootstrap_interval_is_near_the_normal_one_and_repeats_by_seed() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400).tolist()
    found = bootstrap(values, seed=4)
    assert found.mean == pytest.approx(np.mean(values))
    expected = stats.norm.interval(0.95, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, abs=0.03)
    assert bootstrap(values, seed=4) == found
    assert bootstrap(values, seed=5) != found
    narrow = bootstrap(values, seed=4, confidence=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(300):
        found = bootstrap(rng.exponential(1, 80).tolist(), seed=seed, resamples=400, confidence=0.9)
        covered += found.low <= 1 <= found.high
    assert 0.83 < covered / 300 < 0.95


def test_bootstrap_of_many_values_is_drawn_in_parts() -> None:
    values = [0.0, 1.0] * 1_100_000  # more than half a part: one resample at a time
    found = bootstrap(values, seed=0, resamples=5)
    assert found.low < 0.5005
    assert found.high > 0.4995
    assert found.low < found.high


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    rng = np.random.default_rng(6)
    task = rng.normal(0, 10, 200)
    first, second = task + rng.normal(1, 1, 200), task + rng.normal(0, 1, 200)
    found = bootstrap_difference(first.tolist(), second.tolist(), seed=0)
    assert found.mean == pytest.approx((first - second).mean())
    assert 0.5 < found.low < 1 < found.high < 1.5
    back = bootstrap_difference(second.tolist(), first.tolist(), seed=0)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_bootstrap_refuses_nothing_nan_and_unpaired() -> None:
    for wrong in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(UserError, match="no values"):
            bootstrap(wrong, seed=0)
    with pytest.raises(UserError, match="cannot be paired"):
        bootstrap_difference([1], [1, 2], seed=0)
    assert bootstrap([2.5], seed=0).low == 2.5


# ---- agreement


def test_cohen_kappa_equals_scikit_learn() -> None:
    rng = random.Random(8)
    for count in (2, 10, 100):
        for labels in ("ab", "abcd"):
            first = [*"ab", *rng.choices(labels, k=count)]
            second = [label if rng.random() < 0.5 else rng.choice(labels) for label in first]
            found = cohen_kappa(first, second)
            assert found == pytest.approx(cohen_kappa_score(first, second))
    assert cohen_kappa("aabb", "abab") == 0
    assert cohen_kappa("ab", "ba") == -1


def test_cohen_kappa_is_none_where_undefined() -> None:
    assert cohen_kappa([], []) is None
    assert cohen_kappa("aaa", "aaa") is None
    assert cohen_kappa("aaa", "bbb") == 0  # two labels: defined
    with pytest.raises(UserError, match="cannot be paired"):
        cohen_kappa("a", "ab")


def coded(table: Sequence[Sequence[int | None]]) -> np.ndarray:
    return np.array([[math.nan if x is None else x for x in row] for row in table], dtype=float)


def test_krippendorff_alpha_equals_the_package_with_missing_values() -> None:
    rng = random.Random(9)
    for judges in (2, 3, 6):
        for missing in (0.0, 0.3, 0.6):
            truth = [rng.randrange(3) for _ in range(40)]
            table = [
                [None if rng.random() < missing else x if rng.random() < 0.6 else 1 for x in truth]
                for _ in range(judges)
            ]
            expected = krippendorff.alpha(coded(table), level_of_measurement="nominal")
            found = krippendorff_alpha(table)
            assert found == pytest.approx(expected)
            assert found is not None
            assert 0 < found < 1


def test_krippendorff_alpha_of_the_example_in_the_paper() -> None:
    # Krippendorff (2011), section C: four observers, nominal, missing values; alpha is 0.743.
    missing = None
    table = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, missing, missing, missing],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, missing, 3],
        [missing, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, missing],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, missing],
    ]
    assert krippendorff_alpha(table) == pytest.approx(0.743, abs=5e-4)


def test_krippendorff_alpha_nears_fleiss_kappa_with_many_items() -> None:
    rng = random.Random(10)
    table = [[x if rng.random() < 0.7 else 1 - x for x in [0, 1] * 2000] for _ in range(3)]
    ones = np.sum(table, axis=0)
    expected = fleiss_kappa(np.stack([3 - ones, ones], axis=1))
    assert krippendorff_alpha(table) == pytest.approx(expected, abs=1e-3)


def test_krippendorff_alpha_is_none_where_undefined() -> None:
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([[], []]) is None
    assert krippendorff_alpha([["a", "b"]]) is None  # one judge: no pairs
    assert krippendorff_alpha([["a", None], [None, "b"]]) is None
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None
    assert krippendorff_alpha([["a", "b"], ["a", "b"]]) == 1
    with pytest.raises(UserError, match="different numbers of items"):
        krippendorff_alpha([["a"], ["a", "b"]])


def test_position_bias() -> None:
    found = position_bias(60, 40)
    assert found is not None
    assert found.share == 60
    low, high = proportion_confint(60, 100, method="wilson")
    assert (found.low, found.high) == pytest.approx((100 * low, 100 * high))
    assert found.p_value == pytest.approx(stats.binomtest(60, 100).pvalue)
    assert position_bias(0, 0) is None


# ---- power


def power(pairs: int, rate: float, alpha: float) -> float:
    """By a direct sum over all outcomes, with scipy's test and probabilities."""
    return sum(
        float(stats.binom.pmf(wins, pairs, rate))
        for wins in range(pairs // 2 + 1, pairs + 1)
        if stats.binomtest(wins, pairs).pvalue <= alpha
    )


@pytest.mark.parametrize(
    ("pairs", "wanted", "alpha"),
    [(6, 0.8, 0.05), (7, 0.5, 0.05), (20, 0.9, 0.01), (150, 0.8, 0.05), (252, 0.8, 0.05)],
)
def test_detectable_is_the_smallest_rate_with_the_power(
    pairs: int, wanted: float, alpha: float
) -> None:
    found = detectable(pairs, wanted, alpha)
    assert found is not None
    assert power(pairs, found / 100, alpha) >= wanted
    assert power(pairs, (found - 0.1) / 100, alpha) < wanted
    assert round(found, 1) == found


def test_too_few_pairs_detect_nothing() -> None:
    assert [detectable(pairs) for pairs in range(6)] == [None] * 6
    assert detectable(6) is not None
    assert detectable(2, power=0.5, alpha=0.9999) is not None


def test_more_pairs_detect_smaller_differences() -> None:
    table = power_table()
    assert {150, 252, 805} <= {row.pairs for row in table}
    rates = [row.detectable for row in table]
    assert None not in rates
    assert rates == sorted(rates, key=lambda rate: -(rate or 0))
    for row in table:
        low, high = proportion_confint(row.pairs / 2, row.pairs, method="wilson")
        assert row.half_width == pytest.approx(50 * (high - low))
    assert dict(zip([row.pairs for row in table], rates, strict=True))[150] == 61.7
    assert power_table([4])[0].detectable is None
