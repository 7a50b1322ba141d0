"""What a training run has done so far: counted step by step, stored in its checkpoints."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Totals and latest figures of a run.

    Losses are means over target tokens; held-out losses are None without held-out data.
    `eval_loss_exported` is the loss of the exported folder, whose weights are rounded to its type.
    `padded_tokens`: what the padded recipe would have computed for the same steps.
    `prefix_tokens_saved`: what packs without a shared prefix would have computed more.
    `step_seconds`: the part of `seconds` spent in steps. `mfu`: the mean over `step_seconds`.
    `memory`: the highest peak of any rank, in bytes (on the GPU where there is one).
    """

    steps: int = 0
    loss: float = math.nan
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
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
