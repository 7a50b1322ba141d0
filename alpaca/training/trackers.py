"""`--report_to`: sends the log's lines to TensorBoard, Weights & Biases or Trackio as well.

`log.jsonl` is always written. Only rank 0 reports. A library is imported only if it is used.
"""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = "alpaca"
SAMPLES = "eval/samples"
COLUMNS = ["prompt", "answer"]


class Tracker:
    """Sends log lines to one library."""

    def __init__(
        self,
        log: Callable[[dict[str, float], int], object],
        show: Callable[[list[dict[str, str]], int], object],
        close: Callable[[], object],
    ) -> None:
        """`log(numbers, step)`, `show(samples, step)` and `close()` call the library.

        A sample is a `prompt` and its `answer`.
        """
        self._log = log
        self._show = show
        self.close = close

    def log(self, line: dict[str, Any]) -> None:
        """Report the numbers and the sample answers of one line of the log."""
        numbers = {
            name.replace("eval_", "eval/") if name.startswith("eval_") else f"train/{name}": value
            for name, value in line.items()
            if name not in ("step", "total_steps") and isinstance(value, int | float)
        }
        if numbers:
            self._log(numbers, line["step"])
        if "samples" in line:
            self._show(line["samples"], line["step"])


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

    def show(samples: list[dict[str, str]], step: int) -> None:
        for number, sample in enumerate(samples, start=1):
            text = "\n\n".join(_indented(sample[name]) for name in COLUMNS)
            writer.add_text(f"{SAMPLES}/{number}", text, step)

    return Tracker(log, show, writer.close)


def _indented(text: str) -> str:
    """As a code block of Markdown, which shows the text as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _wandb(folder: Path, name: str, settings: dict[str, Any]) -> Tracker:
    import wandb

    run = wandb.init(
        project=PROJECT, name=name, id=name, dir=folder, config=settings, resume="allow"
    )

    def show(samples: list[dict[str, str]], step: int) -> None:
        run.log({SAMPLES: wandb.Table(columns=COLUMNS, data=_rows(samples))}, step=step)

    return Tracker(lambda numbers, step: run.log(numbers, step=step), show, run.finish)


def _trackio(folder: Path, name: str, settings: dict[str, Any]) -> Tracker:
    import trackio

    trackio.init(project=PROJECT, name=name, config=settings, resume="allow")

    def show(samples: list[dict[str, str]], step: int) -> None:
        trackio.log({SAMPLES: trackio.Table(columns=COLUMNS, data=_rows(samples))}, step=step)

    return Tracker(lambda numbers, step: trackio.log(numbers, step=step), show, trackio.finish)


def _rows(samples: list[dict[str, str]]) -> list[list[str]]:
    return [[sample[name] for name in COLUMNS] for sample in samples]
