"""The run log: the progress bar, `log.jsonl`, and what is printed before and after a run.

Only rank 0 writes.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch.distributed as dist
from tqdm import tqdm

from alpaca import atomic
from alpaca.passport import json_numbers
from alpaca.recipe.progress import Progress
from alpaca.training.trackers import Tracker

if TYPE_CHECKING:
    pass


EXPORT_TOLERANCE = 0.01  # nats of held-out loss


class RunLog:
    """The log and the progress bar of a run; a resumed run continues from its checkpoint's step."""

    def __init__(self, folder: Path, steps: int, done: int, tracker: Tracker | None = None) -> None:
        """`done` of `steps` steps are already done; log lines of later steps are dropped."""
        self.main = dist.get_rank() == 0
        self.tracker = tracker
        self.path = folder / "log.jsonl"
        self.bar = tqdm(total=steps, initial=done, desc="train", unit="step", disable=not self.main)
        if self.main:
            earlier = self.path.read_text().splitlines() if done and self.path.exists() else []
            kept = [line for line in earlier if _is_until(line, done)]
            atomic.write_text(self.path, "".join(f"{line}\n" for line in kept))

    def __enter__(self) -> Self:
        """Return the log itself; leaving the context closes the bar, also after an error."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Close the bar and the tracker."""
        self.bar.close()
        if self.tracker:
            self.tracker.close()

    def step(self, line: dict[str, Any], *, write: bool) -> None:
        """Show a step in the bar; with `write`, append its line to the log."""
        if write:
            self.write(line)
        self.bar.set_postfix(
            loss=f"{line['loss']:.4f}",
            tok_s=f"{line['tokens_per_second']:.0f}",
            mfu=f"{line['mfu']:.0%}",
            refresh=False,
        )
        self.bar.update()

    def warn(self, message: str) -> None:
        """Print a warning without breaking the progress bar."""
        self.say(f"warning: {message}")

    def say(self, message: str) -> None:
        """Print a message without breaking the progress bar."""
        if self.main:
            tqdm.write(f"train: {message}")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line to the log, and send it to the tracker."""
        if self.main:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(json_numbers(line)) + "\n")
        if self.tracker:
            self.tracker.log(line)


def _is_until(line: str, step: int) -> bool:
    """Whether a log line is of `step` or earlier; a line cut short by a full disk is not."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except ValueError:
        return False


def summary(result: Progress, ranks: int, folder: Path) -> str:
    """What a finished run did, as a table."""
    padded, computed = result.padded_tokens, result.tokens
    as_padded = result.step_seconds * padded / max(1, computed)
    saved = f"{padded - computed:,}, {1 - computed / max(1, padded):.0%} of the padded recipe"
    a_step = result.step_seconds / max(1, result.steps)
    rows = [
        ("steps", f"{result.steps} on {ranks} rank(s)"),
        ("time", f"{clock(result.seconds)}, {a_step:.2f} s per step"),
        ("loss", f"{result.loss:.4f} at the last step"),
        ("tokens computed", f"{computed:,}"),
        ("tokens saved", f"{saved}; {result.prefix_tokens_saved:,} by sharing the template"),
        ("the padded recipe", f"{padded:,} tokens: about {clock(as_padded)} at this speed"),
        (
            "utilisation",
            f"{result.mfu:.0%} of the device's peak (on a CPU: its measured matrix products)",
        ),
        ("memory", f"{result.memory / 1e9:.2f} GB at the peak, on the rank with the most"),
        ("model", str(folder)),
    ]
    if result.eval_loss_before is not None and result.eval_loss_after is not None:
        losses = f"{result.eval_loss_before:.4f} before, {result.eval_loss_after:.4f} after"
        if result.eval_loss_exported is not None:
            losses += f", {result.eval_loss_exported:.4f} in the exported folder"
        rows.insert(3, ("held-out loss", losses))
    if result.stopped is not None:
        rows.insert(1, ("stopped early", result.stopped))
    if result.exported_step not in (None, result.steps):
        best = f"step {result.exported_step}, whose held-out loss of {result.eval_loss_best:.4f} "
        rows.append(("exported", f"{best}was the lowest"))
    return "\n".join(["train: done", *(f"    {name:<18} {value}" for name, value in rows)])


def changed_by_export(result: Progress, export: dict[str, str]) -> str | None:
    """A warning if the held-out loss of the exported folder differs from the trainer's."""
    trained, exported = result.eval_loss_of_exported_step, result.eval_loss_exported
    if trained is None or exported is None or abs(exported - trained) <= EXPORT_TOLERANCE:
        return None
    return (
        f"train: warning: the held-out loss of the exported folder is {exported:.4f}, the "
        f"trainer's {trained:.4f}: the weights were rounded to {export['dtype']} "
        f"({export['rounding']}); the same command with --overwrite_output_dir --export_dtype fp32 "
        "trains again and exports them as they are; with --keep_last_checkpoint True it would only "
        "export"
    )


def clock(seconds: float) -> str:
    """A duration for people: 38 s, 12 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def draw(folder: Path) -> None:
    """Draw the log's losses as `loss.png` and `loss.svg` in the output folder."""
    # Imported here because it takes a second and is needed only once, at the end.
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (
        ("loss", "training, one step", "-"),
        ("eval_loss", "held out", "o-"),
    ):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    pairs = any("rewards/margins" in line for line in lines)
    unit = "DPO loss per pair" if pairs else "loss per answer token (nats)"
    axes.set(xlabel="optimizer step", ylabel=unit, title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    for name in ("loss.png", "loss.svg"):
        figure.savefig(folder / name, dpi=120)
