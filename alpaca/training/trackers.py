"""`--report_to`: sends the log's lines to TensorBoard, Weights & Biases or Trackio as well.

`log.jsonl` is always written. Only rank 0 reports. A library is imported only if it is used.
"""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = "alpaca"


class Tracker:
    """Sends log lines to one library."""

    def __init__(
        self, log: Callable[[dict[str, float], int], object], close: Callable[[], object]
    ) -> None:
        """`log(numbers, step)` and `close()` are the library's own functions."""
        self._log = log
        self.close = close

    def log(self, line: dict[str, Any]) -> None:
        """Report the numbers of one line of the log."""
        numbers = {
            name.replace("eval_", "eval/") if name.startswith("eval_") else f"train/{name}": value
            for name, value in line.items()
            if name not in ("step", "total_steps") and isinstance(value, int | float)
        }
        self._log(numbers, line["step"])


def open_tracker(
    name: str, folder: Path, settings: dict[str, Any], *, resumed: bool
) -> Tracker | None:
    """Start to report a run whose output is in `folder`; None for "none".

    A resumed run keeps its name.
    """
    makers = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
    if name not in makers:
        return None
    name_file = folder / "run_name"
    if not (resumed and name_file.exists()):
        name_file.write_text(f"{folder.name}-{secrets.token_hex(4)}")
    return makers[name](folder, name_file.read_text(), settings)


def _tensorboard(folder: Path, name: str, settings: dict[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard" / name)
    writer.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings.items()))

    def log(numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    return Tracker(log, writer.close)


def _wandb(folder: Path, name: str, settings: dict[str, Any]) -> Tracker:
    import wandb

    run = wandb.init(
        project=PROJECT, name=name, id=name, dir=folder, config=settings, resume="allow"
    )
    return Tracker(lambda numbers, step: run.log(numbers, step=step), run.finish)


def _trackio(folder: Path, name: str, settings: dict[str, Any]) -> Tracker:
    import trackio

    trackio.init(project=PROJECT, name=name, config=settings, resume="allow")
    return Tracker(lambda numbers, step: trackio.log(numbers, step=step), trackio.finish)
