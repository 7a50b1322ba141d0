"""The length-controlled win rate: on made-up judges, against scikit-learn and statsmodels.

The last test needs AlpacaEval's published files: ALPACA_EVAL_RESULTS is the folder `results/`, with
`leaderboard.csv` next to it.
"""

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from alpaca.errors import UserError
from alpaca.evaluation.length_control import (
    STRENGTHS,
    Comparison,
    LengthControlled,
    folds,
    length_controlled,
)
from alpaca.evaluation.statistics import win_rate

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Made:
    """Verdicts of a made-up judge, and the columns of the regression."""

    preferences: list[float | None]
    lengths_1: list[int]
    lengths_2: list[int]
    difficulty: list[float]

    def fit(self, *, difficult: bool = False, gamed: tuple["Made", ...] = ()) -> LengthControlled:
        return length_controlled(
            self.preferences,
            self.lengths_1,
            self.lengths_2,
            self.difficulty if difficult else None,
            [one.comparison(difficult) for one in gamed],
        )

    def comparison(self, difficult: bool) -> Comparison:
        difficulty = self.difficulty if difficult else None
        return Comparison(self.preferences, self.lengths_1, self.lengths_2, difficulty)

    def columns(self) -> np.ndarray:
        """Length, difficulty and constant, by the formula of the paper."""
        difference = np.subtract(self.lengths_1, self.lengths_2)
        length = np.tanh(difference / difference.std(ddof=1))
        return np.stack([length, np.array(self.difficulty), np.ones(len(length))], axis=1)

    def target(self) -> np.ndarray:
        return np.array(self.preferences, dtype=float) - 1


def judged(
    rows: int, length: float, quality: float, *, longer: float = 0.0, seed: int = 0, hard: float = 0
) -> Made:
    """Verdicts of weighted certainty; `length`, `quality`, `hard` are the true coefficients."""
    rng = np.random.default_rng(seed)
    first = rng.integers(400, 2000, rows)
    second = np.maximum(1, first + rng.normal(longer, 400, rows).astype(int))
    difference = first - second
    difficulty = rng.normal(0, 1.5, rows)
    odds = length * np.tanh(difference / difference.std(ddof=1)) + quality + hard * difficulty
    certain = rng.beta(0.4, 0.4, rows)
    won = 1 / (1 + np.exp(-odds)) > rng.random(rows)
    share = np.where(won, np.maximum(certain, 1 - certain), np.minimum(certain, 1 - certain))
    return Made((1 + share).tolist(), first.tolist(), second.tolist(), difficulty.tolist())


def test_a_judge_who_only_likes_long_answers_gives_about_half() -> None:
    made = judged(3000, length=-3.0, quality=0.0, longer=500)
    assert win_rate(made.preferences).rate > 66
    fit = made.fit()
    assert fit.win_rate == pytest.approx(50, abs=4)
    assert fit.coefficients["length"] < -1


def test_a_better_model_with_short_answers_is_not_punished() -> None:
    made = judged(800, length=-3.0, quality=1.0, longer=-500)
    raw, fit = win_rate(made.preferences), made.fit()
    assert raw.rate < 45
    assert fit.win_rate is not None
    assert fit.win_rate > 55


def test_equal_lengths_give_about_the_raw_rate_and_its_error() -> None:
    made = judged(500, length=0.0, quality=0.7)
    same = Made(made.preferences, made.lengths_1, made.lengths_1, made.difficulty)
    raw, fit = win_rate(same.preferences), same.fit()
    assert fit.win_rate == pytest.approx(raw.rate, abs=0.5)
    assert fit.standard_error == pytest.approx(raw.standard_error, rel=0.02)
    assert fit.coefficients["length"] == 0
    assert "no effect" in fit.note
    assert same.fit(difficult=True, gamed=(made,)).note == fit.note
    assert made.fit().note == ""


def test_a_constant_difference_in_length_explains_nothing() -> None:
    made = judged(100, length=0.0, quality=0.7)
    longer = [length + 7 for length in made.lengths_1]
    fit = length_controlled(made.preferences, made.lengths_1, longer)
    assert fit.win_rate == pytest.approx(win_rate(made.preferences).rate, abs=2)
    assert fit.note


@pytest.mark.parametrize("difficult", [False, True])
def test_swapping_the_sides_gives_the_complement(difficult: bool) -> None:
    made = judged(300, length=-1.5, quality=0.6, longer=100, hard=0.8)
    preferences = [3 - value for value in made.preferences if value is not None]
    swapped = Made(
        [*preferences], made.lengths_2, made.lengths_1, [-value for value in made.difficulty]
    )
    one, other = made.fit(difficult=difficult), swapped.fit(difficult=difficult)
    assert one.win_rate is not None
    assert other.win_rate == pytest.approx(100 - one.win_rate, abs=1e-6)
    assert other.standard_error == pytest.approx(one.standard_error)
    assert one.win_rate > 55


def test_equals_statsmodels_where_the_penalty_is_weak() -> None:
    made = judged(3000, length=-1.5, quality=0.6, hard=0.8)
    gamed = (judged(3000, -2, 0, seed=1, hard=1), judged(3000, -2, 0, seed=2, hard=1))
    fit = made.fit(difficult=True, gamed=gamed)
    assert fit.strength is not None
    assert fit.strength > 2
    x = np.concatenate([*(one.columns() * [1, 1, 0] for one in gamed), made.columns()])
    target = np.concatenate([one.target() for one in (*gamed, made)])
    weights = np.repeat([0.1, 1.0], [6000, 3000])
    model = sm.GLM(target, x, family=sm.families.Binomial(), freq_weights=weights)
    expected = model.fit().params
    assert list(fit.coefficients) == ["length", "difficulty", "constant"]
    assert list(fit.coefficients.values()) == pytest.approx(expected, abs=0.005)


def test_standard_error_is_the_sandwich_of_statsmodels() -> None:
    made = judged(2000, length=-1.5, quality=0.6)
    fit = made.fit()
    model = sm.GLM(made.target(), made.columns()[:, [0, 2]], family=sm.families.Binomial())
    robust = model.fit(cov_type="HC0")
    assert fit.win_rate is not None
    share = fit.win_rate / 100
    assert fit.standard_error == pytest.approx(100 * share * (1 - share) * robust.bse[1], rel=0.01)
    assert fit.spread_error == pytest.approx(0, abs=1e-9)  # one prediction for all instructions


def test_standard_error_covers_the_choice_of_instructions() -> None:
    rates, errors = [], []
    for seed in range(60):
        fit = judged(150, length=-1, quality=-0.5, hard=1, seed=seed).fit(difficult=True)
        assert fit.win_rate is not None
        assert fit.standard_error is not None
        rates.append(fit.win_rate)
        errors.append(fit.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(rates, ddof=1), rel=0.2)


def liblinear(x: np.ndarray, target: np.ndarray, weight: np.ndarray, strength: float) -> np.ndarray:
    """The reference's fit: each row twice, label 1 with weight p and label 0 with weight 1 - p."""
    model = LogisticRegression(
        C=strength, l1_ratio=1, solver="liblinear", fit_intercept=False, tol=1e-8, max_iter=10_000
    )
    labels = np.repeat([1, 0], len(target))
    doubled = np.concatenate([weight * target, weight * (1 - target)])
    coefficients: np.ndarray = model.fit(np.tile(x, (2, 1)), labels, doubled).coef_[0]
    return coefficients


def held_out(theta: np.ndarray, x: np.ndarray, target: np.ndarray, weight: np.ndarray) -> float:
    share = np.clip(1 / (1 + np.exp(-x @ theta)), 1e-15, 1 - 1e-15)
    loss = target * np.log(share) + (1 - target) * np.log(1 - share)
    return float(-(weight * loss).mean())


@pytest.mark.parametrize(("rows", "quality"), [(60, 0.4), (101, -2.0)])
def test_equals_the_reference_in_scikit_learn(rows: int, quality: float) -> None:
    made = judged(rows, length=-1.5, quality=quality, hard=0.5)
    gamed = (judged(50, -2, 0, seed=1, hard=1), judged(50, -2, 0, seed=2, hard=1))
    fit = made.fit(difficult=True, gamed=gamed)
    x = np.concatenate([*(one.columns() * [1, 1, 0] for one in gamed), made.columns()])
    target = np.concatenate([one.target() for one in (*gamed, made)])
    weight = np.repeat([0.1, 1.0], [100, rows])
    splits = list(GroupKFold(5).split(x, groups=np.arange(len(x))))
    losses = [
        np.mean(
            [
                held_out(
                    liblinear(x[train], target[train], weight[train], strength),
                    *(values[test] for values in (x, target, weight)),
                )
                for train, test in splits
            ]
        )
        for strength in STRENGTHS
    ]
    assert fit.strength == STRENGTHS[np.argmin(losses)]
    expected = liblinear(x, target, weight, fit.strength)
    assert list(fit.coefficients.values()) == pytest.approx(expected, abs=1e-4)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("rows", [10, 11, 102, 803, 2415])
def test_folds_are_those_of_group_k_fold(rows: int) -> None:
    expected = np.empty(rows)
    groups = np.tile(np.arange(rows), 2)
    for number, (_, test) in enumerate(GroupKFold(5).split(groups, groups=groups)):
        expected[groups[test]] = number
    assert (folds(rows) == expected).all()


def test_all_verdicts_the_same_gives_a_rate_near_the_end() -> None:
    made = judged(100, length=0.0, quality=0.0)
    for value, expected in ((1.0, 0.0), (2.0, 100.0), (1.5, 50.0), (0, 50.0)):
        fit = length_controlled([value] * 100, made.lengths_1, made.lengths_2)
        assert fit.win_rate == pytest.approx(expected, abs=1)
        assert fit.standard_error is not None
        assert 0 <= fit.standard_error < 1


def test_verdicts_that_cannot_be_told_from_chance_keep_an_error() -> None:
    fit = judged(40, length=0.0, quality=0.0, seed=5).fit()
    assert fit.win_rate == pytest.approx(50, abs=15)
    assert fit.standard_error is not None
    assert fit.standard_error > 4


def test_rows_without_a_verdict_are_not_fitted() -> None:
    made = judged(300, length=-1.5, quality=0.6)
    some: list[float | None] = list(made.preferences)
    some[::3] = [None] * 100
    fit, full = length_controlled(some, made.lengths_1, made.lengths_2), made.fit()
    assert fit.win_rate is not None
    assert fit.win_rate != full.win_rate
    assert fit.win_rate == pytest.approx(full.win_rate, abs=5)


def test_too_few_verdicts_give_a_reason_instead() -> None:
    made = judged(12, length=0.0, quality=0.0)
    few: list[float | None] = [*made.preferences[:9], None, None, None]
    fit = length_controlled(few, made.lengths_1, made.lengths_2)
    assert fit.win_rate is None
    assert fit.standard_error is None
    assert "9 verdicts are too few" in fit.note
    assert length_controlled([], [], []).win_rate is None
    assert length_controlled(made.preferences, made.lengths_1, made.lengths_2).win_rate is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths_1": [1] * 19}, "different numbers of rows"),
        ({"difficulty": [0.0] * 19}, "different numbers of rows"),
        ({"preferences": [2.5] * 20}, "outside the range"),
        ({"preferences": [float("nan")] * 20}, "outside the range"),
        ({"difficulty": [float("nan")] * 20}, "NaN or infinite"),
        ({"gamed": [Comparison([1.0], [1], [2], [0.0])]}, "some have none"),
        ({"difficulty": [0.0] * 20, "gamed": [Comparison([1.0], [1], [2])]}, "some have none"),
    ],
)
def test_wrong_columns_are_refused(change: dict[str, Any], message: str) -> None:
    right = {"preferences": [1.0] * 20, "lengths_1": [1] * 20, "lengths_2": [2] * 20}
    assert length_controlled(**right).win_rate is not None
    with pytest.raises(UserError, match=message):
        length_controlled(**(right | change))


# ---- the program that reproduces the published numbers


def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "alpaca_eval_bench", ROOT / "bench/alpaca_eval.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def stored(path: Path, made: Made, model: str, shares: list[float] | None = None) -> None:
    path.parent.mkdir(parents=True)
    entries = [
        {
            "instruction": f"task {number}",
            "output_1": "a" * made.lengths_1[number],
            "generator_1": "gpt4_1106_preview",
            "dataset": "made",
            "output_2": "b" * made.lengths_2[number],
            "generator_2": model,
            "annotator": "judge",
            "preference": preference,
        }
        | ({"glm_preference": shares[number]} if shares else {})
        for number, preference in enumerate(made.preferences)
    ]
    path.write_text(json.dumps(entries))


def test_the_program_falls_back_and_says_so(tmp_path: Path) -> None:
    bench, made = program(), judged(40, length=-1, quality=0.5, hard=1)
    judge = "weighted_alpaca_eval_gpt4_turbo"
    stored(tmp_path / "ours" / judge / "annotations.json", made, "ours")
    found, _, told = bench.evaluate(tmp_path)
    assert "minimal" in told
    assert found["ours"]["length_controlled_winrate"] == made.fit().win_rate

    weight, constant = bench.DIFFICULTY_FROM["vicuna-13b-v1.5"]
    odds = weight * np.array(made.difficulty) + constant
    shares = (1 / (1 + np.exp(-odds))).tolist()
    doubled = tmp_path / "vicuna-13b-v1.5" / judge / judge / "annotations.json"
    stored(doubled, made, "vicuna", shares)
    found, incomplete, told = bench.evaluate(tmp_path)
    assert "noreg" in told
    expected = made.fit(difficult=True).win_rate
    assert found["ours"]["length_controlled_winrate"] == pytest.approx(expected, abs=1e-6)
    assert found.keys() == {"ours", "vicuna-13b-v1.5"}
    assert not incomplete

    for name in bench.GAMED:
        stored(tmp_path / name / judge / "annotations.json", made, name)
    found, _, told = bench.evaluate(tmp_path)
    assert "v1" in told
    expected = made.fit(difficult=True, gamed=(made, made)).win_rate
    assert found["ours"]["length_controlled_winrate"] == pytest.approx(expected, abs=1e-6)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="annotations"):
        program().evaluate(tmp_path)


@pytest.mark.skipif("ALPACA_EVAL_RESULTS" not in os.environ, reason="needs AlpacaEval's results")
def test_equals_the_published_win_rates() -> None:
    bench, results = program(), Path(os.environ["ALPACA_EVAL_RESULTS"])
    found, _, told = bench.evaluate(results)
    assert "v1" in told
    theirs = bench.published(results.parent / "leaderboard.csv")
    both = [model for model in found if model in theirs]
    assert len(both) >= 10
    close = 0
    for model in both:
        gaps = [abs(found[model][key] - theirs[model][key]) for key in bench.KEYS]
        assert gaps[0] <= 0.01, model
        assert gaps[1] <= 0.01, model
        assert gaps[2] <= 0.15, model  # two choices of C may differ by so much
        close += gaps[2] <= 0.1
    assert close >= max(10, 0.95 * len(both))
