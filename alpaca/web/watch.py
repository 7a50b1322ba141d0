"""`python -m alpaca watch DIR`: a training run in the terminal, live, from the log that it writes.

It reads files only, so it can be started, ended and started again at any time, also on another
machine that sees the folder. Without a terminal, or with --once, it prints one summary.
"""

import argparse
import io
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from alpaca.errors import UserError
from alpaca.prompt import NO_INPUT, PREFIXES
from alpaca.web.runs import LOG, Point, Run, thinned

PERIOD = 1.0  # seconds between two looks at the folder
LATE = 5  # times the usual time between two lines, after which the view warns
LATE_SECONDS = 10.0  # and never earlier than this
LABEL = 9  # columns left of the plot
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of a braille character
RESPONSE = NO_INPUT.rpartition("{instruction}")[2]


def parser() -> argparse.ArgumentParser:
    """The command line of `watch`."""
    made = argparse.ArgumentParser(
        description="Show a training run while it trains: progress, losses, speed, sample answers.",
        epilog="It ends when the run has finished; Ctrl-C ends it earlier, and not the run.",
    )
    made.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("alpaca_out"),
        metavar="DIR",
        help="the run's --output_dir (%(default)s)",
    )
    made.add_argument(
        "--once",
        action="store_true",
        help="print one summary and end, as where the output is no terminal",
    )
    return made


def run(arguments: argparse.Namespace) -> None:
    """Show the run until it has finished or Ctrl-C; with --once, print its summary.

    Raises:
        UserError: with --once or without a terminal, there is no log.
    """
    watched = Run(arguments.folder)
    console = Console(highlight=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if arguments.once or not sys.stdout.isatty() or console.is_dumb_terminal:
        watched.refresh()
        if watched.updated is None:
            raise UserError(
                f"There is no {watched.folder / LOG}.",
                "Name the --output_dir of a run; train.py writes the log when the model is loaded.",
            )
    else:
        _follow(watched, console)
    if watched.updated is not None:
        print(plain(watched, time.time()))


def _follow(watched: Run, console: Console) -> None:
    """Show the run on the terminal's second screen until it has finished, Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the screen is restored then, too
    with (
        suppress(KeyboardInterrupt),
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            watched.refresh()
            live.update(View(watched, time.time()), refresh=True)
            if watched.finished:
                return
            time.sleep(PERIOD)


class View:
    """The run as it is drawn: fitted to the size that the terminal has at that moment."""

    def __init__(self, watched: Run, now: float) -> None:
        """`now`: Unix seconds."""
        self.run, self.now = watched, now

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Header, plot, figures and the newest answers, as far as there is height."""
        watched = self.run
        message, style = status(watched, self.now)
        rows, told = figures(watched), list(answers(watched))
        yield _columns(Text(shown(str(watched.folder)), style="bold"), Text(progress(watched)))
        if watched.total_steps:
            yield ProgressBar(watched.total_steps, watched.step)
            yield Segment.line()
        yield Text(message, style=style)
        lines = -(-len(message) // options.max_width) + 5 + len(rows) + min(8, 3 * len(told))
        height = min(16, (options.height or console.height) - lines)
        if height >= 3 and watched.series["loss"]:
            yield Text()
            yield from plot(watched, options.max_width, height, ascii_only=options.ascii_only)
        yield Text()
        table = Table.grid(padding=(0, 2))
        for name, value in rows:
            table.add_row(Text(name, style="dim"), Text(value))
        yield table
        for head, prompt, answer in told:
            yield Text()
            yield Text(f"{head}: {prompt}", style="dim", no_wrap=True, overflow="ellipsis")
            yield Text(answer)


def plain(watched: Run, now: float) -> str:
    """The run in a few lines of text; `now`: Unix seconds."""
    lines = [f"{shown(str(watched.folder))}: {progress(watched)}", f"  {status(watched, now)[0]}"]
    lines += [f"  {name:<15} {value}" for name, value in figures(watched)]
    for head, prompt, answer in answers(watched):
        lines += [f"  {head}: {prompt}", f"    {answer}"]
    return "\n".join(lines)


def progress(watched: Run) -> str:
    """Which step of how many."""
    total = watched.total_steps
    of_total = f" of {total:,} ({watched.step / total:.0%})" if total else ""
    return f"step {watched.step:,}{of_total}"


def status(watched: Run, now: float) -> tuple[str, str]:
    """What the run does at present, as a sentence and its style."""
    if watched.updated is None:
        return f"Waiting for {LOG}: train.py writes it when the model is loaded.", "yellow"
    if watched.finished:
        return "Finished: the model is in this folder.", "green"
    age = max(0.0, now - watched.updated)
    ago, usual = clock(age), watched.line_seconds
    if watched.started is None:
        return (
            f"Stopped, last line {ago} ago: no run is writing to this folder. The same train.py "
            "command resumes from the newest checkpoint.",
            "yellow",
        )
    if watched.updated < watched.started:
        waited = clock(max(0.0, now - watched.started))
        return (
            f"A run started {waited} ago and loads its model; this is the log before it.",
            "yellow",
        )
    if watched.step == watched.total_steps:
        return f"All steps are done, last line {ago} ago: the model is being written.", "green"
    if usual is not None and age > max(LATE * usual, LATE_SECONDS):
        return (
            f"WARNING: no line for {ago}, usually one every {usual:.2g} s. An evaluation or a "
            "checkpoint takes longer than a step; otherwise look at the output of train.py.",
            "bold red",
        )
    speed, left = watched.series["tokens_per_second"][-1:], watched.seconds_left
    parts = [f"Training at {value:,.0f} tokens/s" for _, value in speed] or ["Training"]
    parts += [] if left is None else [f"about {clock(left)} left"]
    return ", ".join([*parts, f"last line {ago} ago."]), ""


def figures(watched: Run) -> list[tuple[str, str]]:
    """Name and value of the newest figures; those without a value are left out."""
    forms = (
        ("loss", "loss", 1, "{:.4f}"),
        ("held-out loss", "eval_loss", 1, "{:.4f}"),
        ("learning rate", "lr", 1, "{:.3g}"),
        ("gradient norm", "grad_norm", 1, "{:.3g}"),
        ("memory", "memory", 1e-9, "{:.2f} GB at the peak, on the rank with the most"),
    )
    rows = []
    for name, key, scale, form in forms:
        if points := watched.series[key]:
            course = _course(points) if key.endswith("loss") else ""
            rows.append((name, form.format(points[-1][1] * scale) + course))
    if not watched.total_steps and watched.step:
        rows.append(("steps in all", "not in the log, and no checkpoint holds them yet"))
    if watched.damaged:
        rows.append(("damaged lines", f"{watched.damaged:,} of the log, left out here"))
    return rows


def _course(points: Sequence[Point]) -> str:
    """Where a curve's last point is, and from where it came, to append to its value."""
    (first, start), (last, _), least = points[0], points[-1], min(points, key=lambda p: p[1])
    text = f" at step {last:,}"
    if len(points) > 1:
        text += f"; {start:.4f} at step {first:,}, least {least[1]:.4f} at {least[0]:,}"
    return text


def answers(watched: Run) -> Iterable[tuple[str, str, str]]:
    """Heading, prompt without its template, and answer, of each sample of the newest step."""
    for sample in watched.samples:
        if sample["step"] == watched.samples[-1]["step"]:
            prompt = sample["prompt"].removesuffix(RESPONSE)
            for prefix in PREFIXES:
                prompt = prompt.removeprefix(prefix)
            yield f"answer at step {sample['step']:,}", shown(prompt), shown(sample["answer"])


def plot(watched: Run, width: int, height: int, *, ascii_only: bool) -> RenderResult:
    """The training loss as a curve, held-out losses as `o`: `height` rows of `width` columns."""
    curve, marks = thinned(watched.series["loss"]), watched.series["eval_loss"]
    ends = [*curve[:1], *curve[-1:], *marks[:1], *marks[-1:]]
    first, last = min(step for step, _ in ends), max(step for step, _ in ends)
    values = [value for _, value in (*curve, *marks)]
    low, high = min(values), max(values)
    columns, rows = max(10, width - LABEL), height - 1

    def place(point: Point, wide: int, tall: int) -> tuple[int, int]:
        """Column and row of a point on a grid, from the upper left."""
        right = (point[0] - first) / max(1, last - first)
        down = (high - point[1]) / (high - low) if high > low else 0.5
        return round(right * (wide - 1)), round(down * (tall - 1))

    bits = [[0] * columns for _ in range(rows)]
    for x, y in joined([place(point, 2 * columns, 4 * rows) for point in curve]):
        bits[y // 4][x // 2] |= DOTS[y % 4][x % 2]
    held_out = {place(point, columns, rows) for point in marks}
    for y, row in enumerate(bits):
        label = f"{high if y == 0 else low:{LABEL - 2}.4g}" if y in (0, rows - 1) else ""
        text = Text(f"{label:{LABEL}}", no_wrap=True)
        for x, dots in enumerate(row):
            curved = "*" if ascii_only and dots else chr(0x2800 | dots) if dots else " "
            marked = (x, y) in held_out
            text.append("o" if marked else curved, "bold yellow" if marked else "cyan")
        yield text
    yield _columns(Text(f"{'':{LABEL}}step {first:,}"), Text(f"{last:,}"))


def joined(dots: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """The dots of a line through all of `dots`, each (x, y)."""
    yield from dots[:1]
    for (x, y), (to_x, to_y) in pairwise(dots):
        count = max(abs(to_x - x), abs(to_y - y))
        for part in range(1, count + 1):
            yield x + round((to_x - x) * part / count), y + round((to_y - y) * part / count)


def _columns(left: Text, right: Text) -> Table:
    """One line: `left` is shortened if it must be, `right` is at the right edge."""
    left.no_wrap, left.overflow = True, "ellipsis"
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(ratio=1)
    table.add_column(justify="right", no_wrap=True)
    table.add_row(left, right)
    return table


def shown(text: str) -> str:
    """A text in one line, without what could control the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def clock(seconds: float) -> str:
    """A duration for people: 38 s, 12 min 5 s, 3 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
