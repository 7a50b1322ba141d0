"""A training run, read from its output folder while it trains: for the terminal and the page.

`train.py` appends a JSON line to log.jsonl per step and per evaluation, and replaces the file when
it resumes from a checkpoint. Only what was appended is read, unless the file is another one. No
torch, and nothing is locked or written: a run does not notice who watches it.
"""

import json
import os
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from alpaca import passport

LOG = "log.jsonl"
LOCK = ".train.lock"  # exists while a run writes to its folder; a killed one leaves it behind
CHECKPOINT = "checkpoint-"
CHECKPOINT_RECORDS = ("run.json", passport.NAME)  # the second with --save_only_model
KEPT = ("loss", "eval_loss", "lr", "tokens_per_second", "grad_norm", "memory", "step_seconds")
POINTS = 500  # of a series in a summary
SAMPLES = 20  # newest sample answers that are kept
RECENT = 50  # lines whose mean step time predicts the time left
TAIL = 256  # bytes before the offset, by which the file is recognized

Point = tuple[int, float]  # step, value


class Run:
    """What an output folder tells of its run, as of the last `refresh`; not thread-safe.

    series: for each key of `KEPT`, its (step, value) points in the order of steps; held-out losses
    are `eval_loss`, `memory` is in bytes, `step_seconds` in seconds.
    step: of the newest line, 0 before the first. total_steps: None while no file holds it.
    updated: when the log was last written, in Unix seconds; None where there is no log.
    finished: the model and its log are complete. started: since when a run has the folder locked,
    in Unix seconds; None where none has.
    damaged: how many lines of the log could not be read.
    samples: newest last, {"step": N, "prompt": TEXT, "answer": TEXT}.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is an --output_dir; it need not exist yet."""
        self.folder = folder
        self.finished = False
        self.started: float | None = None
        self.total_steps: int | None = None
        self._forget()

    def _forget(self) -> None:
        """Begin to read the log from its start."""
        self.step = 0
        self.updated: float | None = None
        self.damaged = 0
        self.series: dict[str, list[Point]] = {name: [] for name in KEPT}
        self.samples: deque[dict[str, Any]] = deque(maxlen=SAMPLES)
        self._logged_total: int | None = None
        self._inode: int | None = None
        self._offset = 0  # bytes of whole lines read so far
        self._tail = b""

    def refresh(self) -> None:
        """Read what was appended since the last call; all of it, where the log was replaced.

        A last line without its end is left for a later call. A missing folder or log is no error.

        Raises:
            PermissionError: the log may not be read.
        """
        # First the passport, which is written last: then no line is missing from a finished run.
        record = _read(self.folder / passport.NAME)
        self.finished = "result" in record and LOG in _part(record, "beside")
        self.started = _modified(self.folder / LOCK)
        try:
            with open(self.folder / LOG, "rb") as file:
                self._read_appended(file)
        except (FileNotFoundError, NotADirectoryError):
            self._forget()
        self.total_steps = _steps(record) if self.finished else self._known_total()
        if self.finished and self.total_steps is not None:
            # The last line may be earlier (--logging_steps), the last step too (early stopping).
            self.step = _ran(record) or self.total_steps

    def _read_appended(self, file: BinaryIO) -> None:
        status = os.fstat(file.fileno())
        if status.st_ino != self._inode or not self._continues(file):
            self._forget()
        self._inode, self.updated = status.st_ino, status.st_mtime
        file.seek(self._offset)
        whole, end, _ = file.read().rpartition(b"\n")
        self._offset += len(whole + end)
        self._tail = (self._tail + whole + end)[-TAIL:]
        for line in whole.splitlines():
            self._add(line)

    def _continues(self, file: BinaryIO) -> bool:
        """Whether the file still holds, before the offset, what was read there."""
        file.seek(self._offset - len(self._tail))
        return file.read(len(self._tail)) == self._tail

    def _add(self, line: bytes) -> None:
        entry = _entry(line)
        if entry is None:
            self.damaged += 1
            return
        self.step = entry["step"]
        if _is_count(entry.get("total_steps")):
            self._logged_total = entry["total_steps"]
        for name, points in self.series.items():
            if _is_number(entry.get(name)):
                while points and points[-1][0] >= self.step:
                    points.pop()
                points.append((self.step, entry[name]))
        for sample in entry.get("samples") or ():
            texts = {name: str(sample.get(name, "")) for name in ("prompt", "answer")}
            self.samples.append({"step": self.step, **texts})

    def _known_total(self) -> int | None:
        """The steps of an unfinished run: as its log says, else as its newest checkpoint does."""
        total = self._logged_total
        if total is None:
            total = next(filter(None, map(_checkpoint_steps, _checkpoints(self.folder))), None)
        # a checkpoint of before the run was made longer
        return None if total is not None and total < self.step else total

    @property
    def seconds_left(self) -> float | None:
        """How long the remaining steps take at the pace of the last ones; None if unknown.

        Evaluations, checkpoints and the export come on top.
        """
        recent = self.series["step_seconds"][-RECENT:]
        if self.finished:
            return 0.0
        if self.total_steps is None or not recent:
            return None
        return (self.total_steps - self.step) * statistics.fmean(value for _, value in recent)

    @property
    def line_seconds(self) -> float | None:
        """How much time usually passes between two lines of steps; None before the second."""
        recent = self.series["step_seconds"][-RECENT:]
        if len(recent) < 2:
            return None
        steps = (recent[-1][0] - recent[0][0]) / (len(recent) - 1)
        return steps * statistics.median(value for _, value in recent)

    def summary(self) -> dict[str, Any]:
        """The answer of `GET /page/run`, JSON values; each series has at most `POINTS` points."""
        shown = {name: [list(point) for point in thinned(self.series[name])] for name in KEPT}
        return {
            "folder": self.folder.resolve().name,
            "step": self.step,
            "total_steps": self.total_steps,
            "loss": shown["loss"],
            "eval_loss": shown["eval_loss"],
            "learning_rate": shown["lr"],
            "tokens_per_second": shown["tokens_per_second"],
            "seconds_left": self.seconds_left,
            "finished": self.finished,
            "updated": self.updated,
            "samples": list(self.samples),
        }


def thinned(points: Sequence[Point], limit: int = POINTS) -> list[Point]:
    """At most `limit` (at least 4) of the points: first, last, and the extremes in between.

    The points in between are divided into equal parts; of each, the least and the greatest stay.
    """
    if len(points) <= limit:
        return list(points)
    inner, parts = points[1:-1], limit // 2 - 1
    kept = [points[0]]
    for number in range(parts):
        part = inner[len(inner) * number // parts : len(inner) * (number + 1) // parts]
        kept += sorted({min(part, key=_value), max(part, key=_value)})
    return [*kept, points[-1]]


def _value(point: Point) -> float:
    return point[1]


def _entry(line: bytes) -> dict[str, Any] | None:
    """What a line of the log says; None if it is damaged."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not _is_count(entry.get("step")):
        return None
    samples = entry.get("samples") or []
    fine = isinstance(samples, list) and all(isinstance(sample, dict) for sample in samples)
    return entry if fine else None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number; the log holds null for NaN."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _checkpoints(folder: Path) -> list[Path]:
    """The folders that are named as checkpoints are, newest first."""
    found = {path: path.name.removeprefix(CHECKPOINT) for path in folder.glob(f"{CHECKPOINT}*")}
    named = [path for path, step in found.items() if step.isdecimal()]
    return sorted(named, key=lambda path: int(found[path]), reverse=True)


def _checkpoint_steps(checkpoint: Path) -> int | None:
    """Of how many steps the run is that wrote a checkpoint; None if it does not say."""
    records = (_read(checkpoint / name) for name in CHECKPOINT_RECORDS)
    return next(filter(None, map(_steps, records)), None)


def _steps(record: dict[str, Any]) -> int | None:
    """The steps of the run that a checkpoint or passport is of."""
    steps = _part(record, "run").get("steps")
    return steps if _is_count(steps) else None


def _ran(record: dict[str, Any]) -> int | None:
    """After how many steps the finished run ended that a passport is of."""
    steps = _part(record, "result").get("steps")
    return steps if _is_count(steps) else None


def _part(record: dict[str, Any], name: str) -> dict[str, Any]:
    part = record.get(name)
    return part if isinstance(part, dict) else {}


def _modified(path: Path) -> float | None:
    """When a file was last written, in Unix seconds; None where there is none."""
    try:
        return path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, or where it is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
