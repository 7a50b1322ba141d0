"""The page of `score`: one file with its plots and every answer, which opens anywhere.

Intervals are drawn as SVG, a row a measure and a mark a model. No script is needed to read it.
"""

from collections.abc import Mapping, Sequence
from html import escape

from alpaca.dataset.charts import STYLE
from alpaca.evaluation.measures import MEASURES, Measure, Scores, perplexity
from alpaca.evaluation.outputs import Output
from alpaca.evaluation.statistics import Interval
from alpaca.evaluation.suites import Task

COLORS = ("#1b6ca8", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#be123c")
WIDTH, LEFT, ROW = 760, 190, 18
PAGE_STYLE = """
body { overflow-wrap: anywhere; } .wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .2rem .7rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr + tr { border-top: 1px solid #ddd; }
.key i { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
.answers { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem;
  margin: 0; }
svg.intervals { display: block; width: 100%; max-width: 60rem; }
svg.intervals text { font-size: 12px; }
details { border-top: 1px solid #ddd; padding: .4rem 0; } summary { cursor: pointer; }
.good { color: #15803d; } .bad { color: #b91c1c; }
"""


def page(models: Sequence[Scores], tasks: Mapping[str, Task]) -> str:
    """The whole document."""
    title = "Scores of " + ", ".join(model.generator for model in models)
    shown = [name for name in MEASURES if any(model.values[name] for model in models)]
    key = "".join(
        f'<i style="background:{color}"></i>{escape(model.generator)}'
        for model, color in zip(models, _colors(models), strict=True)
    )
    plots = "".join(_plot(models, name, MEASURES[name]) for name in shown)
    answers = "".join(_task(given, tasks.get(key)) for key, given in _by_task(models).items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}{PAGE_STYLE}</style></head><body>\n"
        f'<main><h1>{escape(title)}</h1>\n<p class="key">{key}</p>\n{plots}\n'
        "<p>Bars are 95% intervals, from resampling the tasks.</p>\n"
        f"<h2>By kind of task</h2>{_kinds(models)}\n"
        f"<h2>Answers</h2>{answers}\n</main></body></html>\n"
    )


def _colors(models: Sequence[Scores]) -> list[str]:
    return [COLORS[number % len(COLORS)] for number in range(len(models))]


Given = list[tuple[Scores, Output]]  # the answers to one task, with whose they are


def _by_task(models: Sequence[Scores]) -> dict[str, Given]:
    """The answers to each task, by its key, in the order of the files."""
    found: dict[str, Given] = {}
    for model in models:
        for one in model.outputs:
            found.setdefault(one.task.key, []).append((model, one))
    return found


def _plot(models: Sequence[Scores], name: str, kind: Measure) -> str:
    """One measure: a mark and a bar a model, on a scale of its own."""
    found = [model.interval(name) for model in models]
    known = [one for one in found if one is not None]
    low, high = (0.0, 1.0) if kind.share else _range(known)
    better = {1: "more is better", -1: "less is better", 0: ""}[kind.better]
    height = ROW * len(models) + 34
    rows = "".join(
        _bar(one, 16 + ROW * place, color, low, high, kind, model.generator)
        for place, (one, color, model) in enumerate(
            zip(found, _colors(models), models, strict=True)
        )
        if one is not None
    )
    ends = [f"{end:.0%}" if kind.share else f"{end:.3g}" for end in (low, high)]
    return (
        f'<svg class="intervals" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(kind.title)}">'
        f'<text x="0" y="{height / 2 - 6:.0f}">{escape(kind.title)}</text>'
        f'<text x="0" y="{height / 2 + 9:.0f}" fill="#666">{better}</text>'
        f'<path d="M{LEFT} {height - 16}H{WIDTH - 60}" stroke="#999"/>{rows}'
        f'<text x="{LEFT}" y="{height - 3}">{ends[0]}</text>'
        f'<text x="{WIDTH - 60}" y="{height - 3}" text-anchor="end">{ends[1]}</text></svg>'
    )


def _range(known: Sequence[Interval]) -> tuple[float, float]:
    low, high = min(one.low for one in known), max(one.high for one in known)
    room = (high - low) * 0.1 or abs(high) * 0.1 or 1.0
    return max(0.0, low - room), high + room


def _bar(
    one: Interval, y: float, color: str, low: float, high: float, kind: Measure, name: str
) -> str:
    def at(value: float) -> float:
        return LEFT + (WIDTH - 60 - LEFT) * (value - low) / (high - low)

    value = f"{one.mean:.1%}" if kind.share else f"{one.mean:.{kind.digits}f}"
    return (
        f"<g><title>{escape(name)}: {value}</title>"
        f'<path d="M{at(one.low):.1f} {y}H{at(one.high):.1f}" stroke="{color}" stroke-width="5" '
        f'opacity=".45"/><circle cx="{at(one.mean):.1f}" cy="{y}" r="4.5" fill="{color}"/>'
        f'<text x="{WIDTH - 50}" y="{y + 4}">{value}</text></g>'
    )


def _kinds(models: Sequence[Scores]) -> str:
    """Loss, perplexity and passed tasks of each kind."""
    losses = [model.by_kind("loss") for model in models]
    passed = [_passed(model) for model in models]
    kinds = sorted({one.task.kind for model in models for one in model.outputs})
    head = "".join(
        f"<th>{escape(model.generator)}: loss</th><th>perplexity</th><th>passed</th>"
        for model in models
    )
    rows = ""
    for kind in kinds:
        cells = "".join(
            (
                f"<td>{loss[kind]:.3f}</td><td>{perplexity(loss[kind]):.2f}</td>"
                if kind in loss
                else "<td></td><td></td>"
            )
            + (f"<td>{done[kind][0]} of {done[kind][1]}</td>" if kind in done else "<td></td>")
            for loss, done in zip(losses, passed, strict=True)
        )
        rows += f"<tr><td>{escape(kind or '(none)')}</td>{cells}</tr>"
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="By kind of task"><table>'
        f"<tr><th>kind</th>{head}</tr>{rows}</table></div>"
    )


def _passed(model: Scores) -> dict[str, tuple[int, int]]:
    """Per kind, how many of the tasks with a check or a right answer were passed."""
    found: dict[str, tuple[int, int]] = {}
    for one in model.outputs:
        passed = _pass(model, one.task.key)
        if passed is not None:
            done, total = found.get(one.task.kind, (0, 0))
            found[one.task.kind] = done + passed, total + 1
    return found


def _pass(model: Scores, key: str) -> bool | None:
    """Whether a task was passed; None where nothing can be checked."""
    found = [model.values[name][key] for name in ("match", "checks") if key in model.values[name]]
    return all(found) if found else None


def _task(given: Given, task: Task | None) -> str:
    """One task: what was asked, every answer to it, and the reference."""
    task = task or given[0][1].task
    answers = "".join(
        f"<section><h3>{escape(model.generator)} {_verdict(model, one)}</h3>"
        f"<pre>{escape(one.output)}</pre></section>"
        for model, one in given
    )
    good = f"<section><h3>reference</h3><pre>{escape(task.reference or '')}</pre></section>"
    marks = " ".join(_verdict(model, one) for model, one in given)
    asked = escape(task.instruction[:160])
    rest = f"<pre>{escape(task.input)}</pre>" if task.input else ""
    return (
        f"<details><summary>{marks} {asked}</summary><p>{escape(task.instruction)}</p>{rest}"
        f'<div class="answers">{answers}{good if task.reference else ""}</div></details>'
    )


def _verdict(model: Scores, one: Output) -> str:
    """Passed, failed, or nothing where nothing can be checked."""
    passed = _pass(model, one.task.key)
    if passed is None:
        return ""
    return '<b class="good">passed</b>' if passed else '<b class="bad">failed</b>'
