"""The win rate if all answers were as long as the baseline's: AlpacaEval 2's length control.

A logistic regression explains each verdict by the difference in length, the difficulty of the
instruction and a constant. The win rate is its mean prediction with the length difference set to
zero (Dubois et al., 2024, arXiv:2404.04475). The reference enters each verdict twice (label 1 with
weight p, 0 with weight 1 - p) into liblinear; the sum of losses is the same as of one row with
target p, which the proximal Newton method here minimizes exactly, without a random order of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alpaca.errors import UserError
from alpaca.evaluation.statistics import shares

MINIMUM = 10  # verdicts; each of the five folds then holds two
FOLDS = 5
STRENGTHS = np.logspace(-4, 4, 10)  # C of the L1 penalty: |coefficients| / C is added to the loss
GAMED_WEIGHT = 0.2  # of all gamed rows together, relative to the model's own rows
EDGE = 1e-15  # predictions are kept this far from 0 and 1 when folds are scored

Preferences = Sequence[float | None]


@dataclass(frozen=True)
class Comparison:
    """One model against the baseline, row by row.

    preferences: 1 (baseline better) to 2 (model better), None without a verdict; lengths in
    characters, 1 the baseline's; difficulty: log odds, one number an instruction, or None.
    """

    preferences: Preferences
    lengths_1: Sequence[int]
    lengths_2: Sequence[int]
    difficulty: Sequence[float] | None = None


@dataclass(frozen=True)
class LengthControlled:
    """The length-controlled win rate, or the reason why there is none (`note`).

    win_rate: percent. standard_error: percentage points, of the estimate (sandwich estimator).
    spread_error: percentage points, what AlpacaEval publishes as lc_standard_error: it measures how
    much the instructions differ, not how sure the win rate is. coefficients: length, difficulty (if
    used), constant. strength: C, as chosen by cross-validation.
    """

    win_rate: float | None
    standard_error: float | None
    spread_error: float | None
    coefficients: dict[str, float]
    strength: float | None
    note: str = ""


@dataclass(frozen=True)
class _Rows:
    """Columns x (rows, columns), targets and weights (rows,)."""

    x: np.ndarray
    target: np.ndarray
    weight: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "_Rows":
        return _Rows(self.x[chosen], self.target[chosen], self.weight[chosen])


def length_controlled(
    preferences: Preferences,
    lengths_1: Sequence[int],
    lengths_2: Sequence[int],
    difficulty: Sequence[float] | None = None,
    gamed: Sequence[Comparison] = (),
) -> LengthControlled:
    """The win rate of output_2 if it were as long as output_1.

    The arguments are those of `Comparison`. `gamed` holds the baseline model told to be verbose and
    told to be concise: rows that hold the length coefficient in place. Without `difficulty` and
    `gamed` this is AlpacaEval's `length_controlled_minimal`, with both `length_controlled_v1`.

    Raises:
        UserError: columns of different lengths, a preference outside 1 to 2, or a difficulty that
            is not finite.
    """
    own = Comparison(preferences, lengths_1, lengths_2, difficulty)
    for one in (own, *gamed):
        _check(one, difficulty is not None)
    judged = sum(value is not None for value in preferences)
    if judged < MINIMUM:
        why = f"{judged} verdicts are too few to control for length: at least {MINIMUM} are needed."
        return LengthControlled(None, None, None, {}, None, why)
    rows = _together(own, gamed)
    strength = _strength(rows)
    theta = _fit(rows, strength)
    names = ("length", *(() if difficulty is None else ("difficulty",)), "constant")
    return _result(rows, _columns(own, 1.0), theta, strength, names)


def _check(one: Comparison, difficulty: bool) -> None:
    counts = {len(one.preferences), len(one.lengths_1), len(one.lengths_2)}
    if one.difficulty is not None:
        counts.add(len(one.difficulty))
    if len(counts) > 1:
        raise UserError(
            f"The columns have different numbers of rows: {sorted(counts)}.",
            "Give one preference, two lengths and (if any) one difficulty for each instruction.",
        )
    if one.difficulty is not None and not np.isfinite(one.difficulty).all():
        raise UserError(
            "An instruction difficulty is NaN or infinite.",
            "Give each instruction a finite one, or leave the difficulties out.",
        )
    if difficulty != (one.difficulty is not None):
        raise UserError(
            "Some rows have an instruction difficulty and some have none.",
            "Give it for the model's rows and the gamed rows, or for neither.",
        )


# ---- rows of the regression


def _columns(one: Comparison, constant: float) -> np.ndarray:
    """Length, difficulty (if given), constant: (rows, 2 or 3), of all rows, judged or not."""
    difference = np.subtract(one.lengths_1, one.lengths_2, dtype=float)
    # Without any spread the reference divides by zero; here the length explains nothing.
    spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
    length = np.tanh(difference / spread) if spread > 0 else np.zeros(len(difference))
    columns = [length, np.full(len(length), constant)]
    if one.difficulty is not None:
        columns.insert(1, np.asarray(one.difficulty, dtype=float))
    return np.stack(columns, axis=1)


def _rows(one: Comparison, constant: float, weight: float) -> _Rows:
    """The rows with a verdict; as in AlpacaEval, lengths are standardized over all rows."""
    judged = np.array([value is not None for value in one.preferences], dtype=bool)
    target = shares(one.preferences)
    return _Rows(_columns(one, constant)[judged], target, np.full(len(target), weight))


def _together(own: Comparison, gamed: Sequence[Comparison]) -> _Rows:
    """Gamed rows first, as in the reference: the folds depend on the order."""
    parts = [_rows(one, 0.0, GAMED_WEIGHT / len(gamed)) for one in gamed] + [_rows(own, 1.0, 1.0)]
    return _Rows(
        np.concatenate([part.x for part in parts]),
        np.concatenate([part.target for part in parts]),
        np.concatenate([part.weight for part in parts]),
    )


# ---- fit


def folds(rows: int) -> np.ndarray:
    """The fold of each row, as scikit-learn's GroupKFold(5) with each row a group: (rows,)."""
    return (rows - 1 - np.arange(rows)) % FOLDS


def _strength(rows: _Rows) -> float:
    """The C with the best mean score over the folds; the smallest among equals."""
    fold = folds(len(rows.target))
    losses = np.zeros(len(STRENGTHS))
    for held in range(FOLDS):
        train, test = rows[fold != held], rows[fold == held]
        for number, strength in enumerate(STRENGTHS):
            losses[number] += _held_out_loss(test, _fit(train, strength))
    return float(STRENGTHS[losses.argmin()])


def _held_out_loss(rows: _Rows, theta: np.ndarray) -> float:
    """Mean weighted log loss, for targets anywhere from 0 to 1."""
    predicted = np.clip(_logistic(rows.x @ theta), EDGE, 1 - EDGE)
    loss = rows.target * np.log(predicted) + (1 - rows.target) * np.log1p(-predicted)
    return -float(np.mean(rows.weight * loss))


def _fit(rows: _Rows, strength: float) -> np.ndarray:
    """Coefficients that minimize the summed log loss + |coefficients| / C, by proximal Newton."""
    theta = np.zeros(rows.x.shape[1])
    value = _objective(rows, theta, strength)
    for _ in range(100):
        predicted = _logistic(rows.x @ theta)
        gradient = rows.x.T @ (rows.weight * (predicted - rows.target))
        step = _newton_target(theta, gradient, _curvature(rows, predicted), 1 / strength) - theta
        better = _objective(rows, theta + step, strength)
        while better > value and np.abs(step).max() > 1e-9:
            step /= 2
            better = _objective(rows, theta + step, strength)
        if better > value or np.abs(step).max() <= 1e-9:
            break
        theta, value = theta + step, better
    return theta


def _curvature(rows: _Rows, predicted: np.ndarray) -> np.ndarray:
    """Second derivatives of the loss: (columns, columns), positive even for a column of zeros."""
    scaled = rows.x * (rows.weight * predicted * (1 - predicted))[:, None]
    curvature: np.ndarray = scaled.T @ rows.x + 1e-10 * np.eye(rows.x.shape[1])
    return curvature


def _newton_target(
    theta: np.ndarray, gradient: np.ndarray, curvature: np.ndarray, penalty: float
) -> np.ndarray:
    """The minimum of the quadratic model plus the L1 penalty, by coordinate descent."""
    target = theta.copy()
    for _ in range(200):
        before = target.copy()
        for at in range(len(theta)):
            slope = gradient[at] + curvature[at] @ (target - theta)
            free = curvature[at, at] * target[at] - slope
            shrunk = np.sign(free) * max(abs(free) - penalty, 0.0)
            target[at] = shrunk / curvature[at, at]
        if np.abs(target - before).max() < 1e-11:
            break
    return target


def _objective(rows: _Rows, theta: np.ndarray, strength: float) -> float:
    odds = rows.x @ theta
    loss = rows.weight @ (np.logaddexp(0, odds) - rows.target * odds)
    return float(loss + np.abs(theta).sum() / strength)


def _logistic(odds: np.ndarray) -> np.ndarray:
    probability: np.ndarray = np.exp(-np.logaddexp(0, -odds))
    return probability


# ---- result


def _result(
    rows: _Rows, own: np.ndarray, theta: np.ndarray, strength: float, names: Sequence[str]
) -> LengthControlled:
    """`own`: the columns of all rows of the model, judged or not, as in the reference."""
    at_equal_length = own.copy()
    at_equal_length[:, 0] = 0.0
    predicted = _logistic(at_equal_length @ theta)
    return LengthControlled(
        win_rate=100 * float(predicted.mean()),
        standard_error=100 * _standard_error(rows, at_equal_length, theta),
        spread_error=100 * float(predicted.std(ddof=1) / np.sqrt(len(predicted))),
        coefficients=dict(zip(names, theta.tolist(), strict=True)),
        strength=strength,
        note="" if own[:, 0].any() else "The lengths differ equally in all rows: no effect to fit.",
    )


def _standard_error(rows: _Rows, at_equal_length: np.ndarray, theta: np.ndarray) -> float:
    """Of the mean prediction: the part of the coefficients and the part of the instructions.

    The covariance of the coefficients is the sandwich estimator (White, 1982). The gamed rows are
    taken as fixed, and so is a coefficient that the penalty sets to zero, except the constant's.
    """
    predicted, fitted = _logistic(at_equal_length @ theta), _logistic(rows.x @ theta)
    own, active = rows.x[:, -1] != 0, theta != 0
    active[-1] = True
    residual = rows.weight * (rows.target - fitted)
    scores = (rows.x * residual[:, None])[own][:, active]
    slope = ((predicted * (1 - predicted)) @ at_equal_length / len(predicted))[active]
    influence = scores @ np.linalg.solve(_curvature(rows, fitted)[np.ix_(active, active)], slope)
    return float(np.sqrt(influence @ influence + predicted.var(ddof=1) / len(predicted)))
