"""The examples and the learning rate of optimizer step k: pure functions.

Both depend only on the seed and k, never on the number of ranks, so a run resumed on other
hardware sees the same data in the same order.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from alpaca.recipe.arguments import ScheduleFlags
from alpaca.recipe.schedules import SHAPES, WITHOUT_WARMUP


@dataclass(frozen=True)
class Schedule:
    """`examples` in the data, `batch` of them per step, `steps` in total."""

    examples: int
    batch: int
    steps: int
    warmup: int
    seed: int
    peak: float
    shape: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass."""
        return steps_per_epoch(self.examples, self.batch)

    def indices(self, step: int) -> list[int]:
        """Indices of the examples of `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, self.examples)
        return [int(i) for i in order[place * self.batch : (place + 1) * self.batch]]

    def learning_rate(self, step: int) -> float:
        """The rate of a step: the peak, by the shape's share (`alpaca.recipe.schedules`)."""
        share = SHAPES[self.shape]
        return self.peak * share(step, self.warmup, self.steps, self.peak, **self.settings)


def steps_per_epoch(examples: int, batch: int) -> int:
    """Whole batches in one pass; the remainder differs from epoch to epoch, as the order does.

    The published run has 52,002 examples in batches of 256: 203 steps an epoch, 609 in all.
    """
    return max(1, examples // batch)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, examples: int) -> npt.NDArray[np.int64]:
    """The order of the examples in an epoch; cached, because a plan asks for every step."""
    return np.random.default_rng([seed, epoch]).permutation(examples)


def schedule(flags: ScheduleFlags, examples: int, world_size: int) -> Schedule:
    """The schedule of a run over `examples` examples on `world_size` devices."""
    batch = flags.per_device_train_batch_size * flags.gradient_accumulation_steps * world_size
    per_epoch = steps_per_epoch(examples, batch)
    steps = flags.max_steps
    if steps < 0:
        steps = math.ceil(flags.num_train_epochs * per_epoch)
    share = flags.warmup_steps if flags.warmup_steps < 1 else 0.0
    warmup = int(flags.warmup_steps) or math.ceil((share or flags.warmup_ratio) * steps)
    shape = flags.lr_scheduler_type
    return Schedule(
        examples=examples,
        batch=batch,
        steps=steps,
        warmup=0 if shape in WITHOUT_WARMUP else warmup,
        seed=flags.seed,
        peak=flags.learning_rate,
        shape=shape,
        settings=flags.schedule_settings,
    )
