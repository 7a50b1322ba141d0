"""Learning rates by step: the shapes of transformers' `get_scheduler`, as pure functions.

Each returns the share of the peak rate at a step. It takes the step, the lengths of the warm-up and
of the run, and settings named as in transformers' `lr_scheduler_kwargs` (transformers 5.23,
optimization.py). Two shapes are left out, reduce_lr_on_plateau and greedy: they follow the loss, so
they are not functions of the step.
"""

import inspect
import json
import math
from collections.abc import Callable
from typing import Any

from alpaca.errors import UserError

CURVES = ("linear", "cosine", "1-sqrt")


def _warm(step: int, warmup: int) -> float:
    return step / max(1, warmup)


def _progress(step: int, warmup: int, steps: int) -> float:
    return (step - warmup) / max(1, steps - warmup)


def _wave(progress: float, cycles: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * cycles * 2 * progress))


def constant(step: int, warmup: int, steps: int, peak: float) -> float:
    """The peak from the first step on; there is no warm-up."""
    return 1.0


def constant_with_warmup(step: int, warmup: int, steps: int, peak: float) -> float:
    """The peak after the warm-up."""
    return _warm(step, warmup) if step < warmup else 1.0


def linear(step: int, warmup: int, steps: int, peak: float) -> float:
    """A straight line down to 0."""
    return _warm(step, warmup) if step < warmup else 1 - _progress(step, warmup, steps)


def cosine(step: int, warmup: int, steps: int, peak: float, *, num_cycles: float = 0.5) -> float:
    """Half a wave of the cosine down to 0."""
    if step < warmup:
        return _warm(step, warmup)
    return max(0.0, _wave(_progress(step, warmup, steps), num_cycles))


def cosine_with_restarts(
    step: int, warmup: int, steps: int, peak: float, *, num_cycles: float = 1
) -> float:
    """Half waves, each from the peak again."""
    if step < warmup:
        return _warm(step, warmup)
    return max(0.0, _wave(num_cycles * _progress(step, warmup, steps) % 1.0, 0.5))


def cosine_with_min_lr(
    step: int,
    warmup: int,
    steps: int,
    peak: float,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> float:
    """Half a wave down to `min_lr`, or to the share `min_lr_rate` of the peak."""
    if step < warmup:
        return _warm(step, warmup)
    least = _least(min_lr, min_lr_rate, peak)
    return max(0.0, _wave(_progress(step, warmup, steps), num_cycles) * (1 - least) + least)


def cosine_warmup_with_min_lr(
    step: int,
    warmup: int,
    steps: int,
    peak: float,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> float:
    """As `cosine_with_min_lr`, but one step ahead, so that no step has rate 0."""
    if step < warmup:
        if warmup_lr_rate is None:
            return (step + 1) / max(1, warmup)
        return warmup_lr_rate + (1 - warmup_lr_rate) * step / max(1, warmup - 1)
    least = _least(min_lr, min_lr_rate, peak)
    progress = (step - warmup + 1) / max(1, steps - warmup)
    return max(0.0, _wave(progress, num_cycles) * (1 - least) + least)


def _least(rate: float | None, share: float | None, peak: float) -> float:
    if rate is not None:
        return rate / peak
    assert share is not None  # by check()
    return share


def polynomial(
    step: int, warmup: int, steps: int, peak: float, *, lr_end: float = 1e-7, power: float = 1.0
) -> float:
    """A power of the share of steps left, down to the rate `lr_end`."""
    if step < warmup:
        return _warm(step, warmup)
    left = (1 - _progress(step, warmup, steps)) ** power
    return float(((peak - lr_end) * left + lr_end) / peak)


def inverse_sqrt(
    step: int, warmup: int, steps: int, peak: float, *, timescale: float | None = None
) -> float:
    """One over the square root of the steps since the warm-up, in units of `timescale`."""
    if step < warmup:
        return _warm(step, warmup)
    scale = timescale or warmup or 10_000
    return 1 / math.sqrt((step + scale - warmup) / scale)


def warmup_stable_decay(
    step: int,
    warmup: int,
    steps: int,
    peak: float,
    *,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> float:
    """Warm-up by one curve, constant, then decay by another to the share `min_lr_ratio`."""
    if num_stable_steps is None:
        num_stable_steps = steps - warmup - num_decay_steps
    decay_step = step - warmup - num_stable_steps
    if step < warmup:
        factor = _curve(warmup_type, 1 - _warm(step, warmup), 0.5)
    elif decay_step < 0:
        return 1.0
    elif decay_step < num_decay_steps:
        factor = _curve(decay_type, decay_step / max(1, num_decay_steps), num_cycles)
    else:
        return min_lr_ratio
    return max(0.0, factor * (1 - min_lr_ratio) + min_lr_ratio)


def _curve(kind: str, progress: float, cycles: float) -> float:
    """A curve from 1, at progress 0, down to 0."""
    if kind == "cosine":
        return _wave(progress, cycles)
    return 1 - (math.sqrt(progress) if kind == "1-sqrt" else progress)


SHAPES: dict[str, Callable[..., float]] = {
    shape.__name__: shape
    for shape in (
        cosine,
        linear,
        constant,
        constant_with_warmup,
        polynomial,
        cosine_with_min_lr,
        warmup_stable_decay,
        cosine_with_restarts,
        cosine_warmup_with_min_lr,
        inverse_sqrt,
    )
}
WITHOUT_WARMUP = ("constant",)


def settings(shape: str, text: str, peak: float) -> dict[str, Any]:
    """The settings of a shape from the JSON of `--lr_scheduler_kwargs`.

    Raises:
        UserError: it is not a JSON object, has a setting that the shape does not take, or lacks one
            that the shape needs.
    """
    flag = "--lr_scheduler_kwargs"
    try:
        given = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} is not JSON: {error}.", f"{_example(shape)}") from None
    if not isinstance(given, dict):
        raise UserError(f"{flag} {text} is not a JSON object.", _example(shape))
    taken = inspect.signature(SHAPES[shape]).parameters.values()
    kinds = {part.name: part for part in taken if part.kind is part.KEYWORD_ONLY}
    for name, value in given.items():
        if name not in kinds:
            takes = ", ".join(kinds) or "none"
            raise UserError(
                f"--lr_scheduler_type {shape} has no setting {name}.", f"It takes: {takes}."
            )
        if name.endswith("_type"):
            right, wanted = value in CURVES, f"one of {', '.join(CURVES)}"
        else:
            right = isinstance(value, int | float) and not isinstance(value, bool)
            right, wanted = right and math.isfinite(value) and value >= 0, "a number of at least 0"
        if not right:
            raise UserError(f"{flag}: {name} is {value!r}.", f"Give {wanted}.")
    missing = [n for n, part in kinds.items() if part.default is part.empty and n not in given]
    if missing:
        raise UserError(f"--lr_scheduler_type {shape} needs {missing[0]}.", _example(shape))
    if "min_lr" in kinds and ("min_lr" in given) == ("min_lr_rate" in given):
        raise UserError(
            f"--lr_scheduler_type {shape} needs one of min_lr and min_lr_rate.", _example(shape)
        )
    end = given.get("lr_end", 1e-7) if shape == "polynomial" else 0 if "min_lr" in given else -1
    if peak <= end:
        raise UserError(
            f"--lr_scheduler_type {shape} needs a --learning_rate above {end}, not {peak}.",
            "Raise it, or choose another shape.",
        )
    return given


def _example(shape: str) -> str:
    examples = {
        "warmup_stable_decay": '{"num_decay_steps": 100}',
        "cosine_with_min_lr": '{"min_lr_rate": 0.1}',
        "cosine_warmup_with_min_lr": '{"min_lr_rate": 0.1}',
        "polynomial": '{"power": 2.0}',
        "inverse_sqrt": '{"timescale": 1000}',
    }
    return f"For example: --lr_scheduler_kwargs '{examples.get(shape, '{}')}'"
