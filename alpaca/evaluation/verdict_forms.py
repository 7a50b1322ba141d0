"""A verdict as text: a table and sentences for terminal and page, JSON, and a page with a picture.

The page is one file that loads nothing. All that comes from files is escaped.
"""

import json
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alpaca import atomic
from alpaca.evaluation.agreement import position_bias
from alpaca.evaluation.verdicts import Row, Verdict

COLUMNS = ("pairs", "wins", "ties", "losses", "win rate", "95% interval", "p")


def cells(row: Row) -> list[str]:
    """A row's texts under COLUMNS."""
    rate = row.rate
    return [
        labelled(row),
        *(f"{count:,}" for count in (rate.wins, rate.ties, rate.losses)),
        f"{rate.rate:.1f}%",
        f"{rate.low:.1f}% to {rate.high:.1f}%",
        f"{rate.p_value:.2g}",
    ]


def labelled(row: Row) -> str:
    """Which pairs a row is about."""
    return "all" if row.group == "all" else plain(f"{row.group}: {row.label}")


def title(verdict: Verdict) -> str:
    """Whose wins are counted, against whom."""
    first, second = map(plain, verdict.names)
    return f"{second} against {first}"


def sentences(verdict: Verdict) -> list[str]:
    """What is beside the table."""
    second, judges = plain(verdict.names[1]), len(verdict.judges)
    found = [f"Wins are {second}'s; a tie is half a win. p: exact sign test, without ties."]
    if verdict.identical:
        found.append(f"Ties without a vote, as both answers are identical: {verdict.identical:,}.")
    if judges > 1:
        found.append(f"A pair counts for the answer that most of its {judges} judges prefer.")
        found.append(f"Agreement of all judges: Krippendorff's alpha {number(verdict.alpha)}.")
    for one, other, count, kappa in verdict.kappas:
        names = f"{plain(one)} and {plain(other)}"
        found.append(f"{names}, {count:,} pairs: Cohen's kappa {number(kappa)}.")
    bias = position_bias(*verdict.sides)
    if bias is not None:
        left, wins = verdict.sides[0], sum(verdict.sides)
        found.append(
            f"The answer shown first won {left:,} of {wins:,} times (without ties): "
            f"{bias.share:.1f}%, {bias.low:.1f}% to {bias.high:.1f}%, p {bias.p_value:.2g}."
        )
    return [*found, *verdict.lines]


def shown(verdict: Verdict) -> dict[str, Any]:
    """The report for the page of `compare`."""
    rows = [cells(row) for row in verdict.rows]
    lines = sentences(verdict)
    return {"title": title(verdict), "columns": COLUMNS, "rows": rows, "lines": lines}


def tell(verdict: Verdict, html: Path | None, figures: Path | None) -> None:
    """Print the report; write it as a page and as JSON where files are named."""
    Console(highlight=False).print(table(verdict))
    for line in sentences(verdict):
        print(line)
    for path, written in ((html, page), (figures, as_json)):
        if path is not None:
            atomic.write_text(path, written(verdict))


def table(verdict: Verdict) -> Table:
    """The report for a terminal."""
    made = Table(title=Text(title(verdict)), title_justify="left")
    for column in COLUMNS:
        made.add_column(column, justify="left" if column == COLUMNS[0] else "right")
    for before, row in zip([None, *verdict.rows], verdict.rows, strict=False):
        if before is not None and before.group != row.group:
            made.add_section()
        made.add_row(*map(Text, cells(row)))
    return made


def as_json(verdict: Verdict) -> str:
    """The figures as JSON, rates in percent; null for an agreement that is not defined."""
    bias = position_bias(*verdict.sides)
    whole = {
        "generator_1": verdict.names[0],
        "generator_2": verdict.names[1],
        "judges": verdict.judges,
        "votes": verdict.votes,
        "pairs": verdict.pairs,
        "identical": verdict.identical,
        "rows": [{"group": r.group, "label": r.label, **vars(r.rate)} for r in verdict.rows],
        "krippendorff_alpha": verdict.alpha,
        "cohen_kappa": [
            {"judges": [one, other], "pairs": count, "kappa": kappa}
            for one, other, count, kappa in verdict.kappas
        ],
        "left_wins": verdict.sides[0],
        "right_wins": verdict.sides[1],
        "position_bias": vars(bias) if bias else None,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def number(value: float | None) -> str:
    """An agreement, or that there is none to be had."""
    return "not defined (all votes alike, or none on one pair)" if value is None else f"{value:.2f}"


def plain(text: str) -> str:
    """A text in one line, without what could control a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# ---- the page

STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --text: #1c1f22;
  --line: #80868c; --win: #0f5c8c; --tie: #b9c0c6; --loss: #c9762f; --dot: #1c1f22; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --text: #e6e8ea;
  --line: #7d858d; --win: #3f93c4; --tie: #5a636b; --loss: #c9762f; --dot: #fff; } }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: var(--page);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: 1.5rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .75rem; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; font-weight: 400; }
thead th { font-weight: 600; }
svg { width: 100%; height: auto; } svg text { fill: var(--text); font-size: 13px; }
.win { fill: var(--win); } .tie { fill: var(--tie); } .loss { fill: var(--loss); }
.half { stroke: var(--line); stroke-dasharray: 4 3; }
.halo { stroke: var(--page); stroke-width: 6; stroke-linecap: round; }
.interval { stroke: var(--dot); stroke-width: 2; } .dot { fill: var(--dot); stroke: var(--page); }
"""
LABELS, BAR, STEP = 190, 500, 30  # of the picture, in its own units


def page(verdict: Verdict) -> str:
    """The report as an HTML document."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in COLUMNS)
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>\n"
        for label, *rest in map(cells, verdict.rows)
    )
    said = "".join(f"<p>{escape(line)}</p>\n" for line in sentences(verdict))
    name = escape(title(verdict))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{name}</h1>
{picture(verdict)}
<p>Bars: wins, ties, losses. Dot and line: win rate with its 95% interval. Dashed: 50%.</p>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody>
</table>
{said}</main>
</body>
</html>
"""


def picture(verdict: Verdict) -> str:
    """A bar of wins, ties and losses for each row, and the interval of the win rate on it."""
    tall = STEP * len(verdict.rows) + 10
    bars = "\n".join(_bar(row, STEP * nth + 5) for nth, row in enumerate(verdict.rows))
    half = LABELS + BAR / 2
    return (
        f'<svg viewBox="0 0 {LABELS + BAR + 10} {tall}" role="img" aria-label="Win rates">\n'
        f'{bars}\n<line class="half" x1="{half}" x2="{half}" y1="0" y2="{tall}"/>\n</svg>'
    )


def _bar(row: Row, top: int) -> str:
    """One row of the picture."""
    rate, x, made = row.rate, float(LABELS), []
    label = labelled(row)
    short = label if len(label) <= 24 else f"{label[:23]}…"
    made.append(f'<text x="0" y="{top + 15}">{escape(short)}</text>')
    for name, count in (("win", rate.wins), ("tie", rate.ties), ("loss", rate.losses)):
        wide = BAR * count / rate.total
        made.append(f'<rect class="{name}" x="{x:.1f}" y="{top}" width="{wide:.1f}" height="20"/>')
        x += wide
    low, high, dot = (LABELS + BAR * one / 100 for one in (rate.low, rate.high, rate.rate))
    y = top + 10
    for name in ("halo", "interval"):
        made.append(f'<line class="{name}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>')
    made.append(f'<circle class="dot" cx="{dot:.1f}" cy="{y}" r="4"/>')
    told = f"{label}: {rate.wins} wins, {rate.ties} ties, {rate.losses} losses, {rate.rate:.1f}%"
    return f"<g><title>{escape(told)}</title>{''.join(made)}</g>"
