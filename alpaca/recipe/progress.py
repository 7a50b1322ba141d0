"""What a training run has done so far: counted step by step, stored in its checkpoints."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Totals and latest figures of a run.

    Losses are means over target tokens, or over preference pairs; held-out losses are None without
    held-out data.
    `eval_loss_best` is the lowest at an evaluation after the first step, `best_step` its step, and
    `evaluations_since_best` counts those after it. `exported_step`: the step whose weights were
    exported. `eval_loss_exported` is the loss of the exported folder, whose weights are rounded to
    its type. `stopped`: why early stopping ended the run; None if it did not.
    `padded_tokens`: what the padded recipe would have computed for the same steps.
    `prefix_tokens_saved`: what packs without a shared prefix would have computed more.
    `step_seconds`: the part of `seconds` spent in steps. `mfu`: the mean over `step_seconds`.
    `memory`: the highest peak of any rank, in bytes (on the GPU where there is one).
    """

    steps: int = 0
    loss: float = math.nan
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    eval_loss_best: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    stopped: str | None = None
    exported_step: int | None = None
    eval_loss_exported: float | None = None
    seconds: float = 0.0
    step_seconds: float = 0.0
    tokens: int = 0
    padded_tokens: int = 0
    prefix_tokens_saved: int = 0
    mfu: float = 0.0
    memory: int = 0

    def after(self, line: dict[str, Any], seconds: float) -> "Progress":
        """Add the step that a log line describes; `seconds`: duration of the run so far."""
        spent = self.step_seconds + line["step_seconds"]
        worked = self.mfu * self.step_seconds + line["mfu"] * line["step_seconds"]
        summed = ("tokens", "padded_tokens", "prefix_tokens_saved")
        return dataclasses.replace(
            self,
            steps=line["step"],
            loss=line["loss"],
            seconds=seconds,
            step_seconds=spent,
            mfu=worked / spent,
            memory=max(self.memory, line["memory"]),
            **{name: getattr(self, name) + line[name] for name in summed},
        )

    def evaluated(self, loss: float) -> "Progress":
        """Add an evaluation; the one before the first step is only for comparison."""
        if not self.steps:
            return dataclasses.replace(self, eval_loss_before=loss)
        after = dataclasses.replace(self, eval_loss_after=loss)
        if loss < (math.inf if self.eval_loss_best is None else self.eval_loss_best):
            return dataclasses.replace(
                after, eval_loss_best=loss, best_step=self.steps, evaluations_since_best=0
            )
        since = self.evaluations_since_best + 1
        return dataclasses.replace(after, evaluations_since_best=since)

    def without_best(self) -> "Progress":
        """Count anew which held-out loss is the lowest."""
        return dataclasses.replace(
            self, eval_loss_best=None, best_step=None, evaluations_since_best=0, stopped=None
        )

    def without_evaluations(self) -> "Progress":
        """Forget the held-out losses, which were of other examples."""
        forgotten = dataclasses.replace(self, eval_loss_before=None, eval_loss_after=None)
        return forgotten.without_best()

    def lacks_lower_loss(self, patience: int) -> str | None:
        """Why early stopping ends a run now, `patience` evaluations being enough; else None."""
        if not patience or self.evaluations_since_best < patience:
            return None
        lowest = "finite"
        if self.eval_loss_best is not None:
            lowest = f"below the {self.eval_loss_best:.4f} of step {self.best_step}"
        return (
            f"no held-out loss of the last {self.evaluations_since_best} evaluation(s) was {lowest}"
        )

    @property
    def eval_loss_of_exported_step(self) -> float | None:
        """The trainer's own held-out loss of the weights that were exported."""
        of_best = self.exported_step is not None and self.exported_step == self.best_step
        return self.eval_loss_best if of_best else self.eval_loss_after
