"""Bar charts as SVG text, so that a report is one file that opens anywhere.

They need no script and no external stylesheet. Hovering over a bar shows its figures (an SVG
<title>).
"""

from collections.abc import Sequence
from html import escape
from itertools import pairwise

import numpy as np

WIDTH, HEIGHT, MARGIN = 520, 150, 34


def histogram(title: str, values: Sequence[float], *, mark: float | None = None) -> str:
    """Values in about 30 equal bins; the last holds the top percent; a line is drawn at `mark`."""
    array = np.asarray(values, dtype=float)
    if not len(array):
        return ""
    whole = bool(np.all(array == np.round(array)))
    top = float(max(np.quantile(array, 0.99), mark or 0, array.min() + (1 if whole else 0.01)))
    width = (top - array.min()) / 30
    if whole:
        width = max(1.0, float(np.ceil(width)))
    edges = array.min() + width * np.arange(int(np.ceil((top - array.min()) / width)) + 1)
    counts, _ = np.histogram(np.minimum(array, edges[-1]), edges)
    labels = [_range(low, high, whole) for low, high in pairwise(edges)]
    labels[-1] = f"{_number(edges[-2], whole)} and more"
    place = None if mark is None else (mark - edges[0]) / (edges[-1] - edges[0])
    ends = (_number(edges[0], whole), _number(edges[-1], whole))
    median = f"median {_number(float(np.median(array)), whole)}, most {_number(array.max(), whole)}"
    return _columns(f"{title} ({median})", counts.tolist(), labels, ends, place)


def bars(rows: Sequence[tuple[str, int]]) -> str:
    """One horizontal bar per row; the largest count fills the width."""
    most = max((count for _, count in rows), default=1)
    drawn = []
    for number, (name, count) in enumerate(rows):
        y, length = number * 22, max(1, 300 * count / most)
        drawn.append(
            f'<text x="150" y="{y + 14}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="158" y="{y + 3}" width="{length:.1f}" height="15"/>'
            f'<text x="{length + 164:.1f}" y="{y + 14}">{count:,}</text>'
        )
    height = max(1, len(rows)) * 22
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img">{"".join(drawn)}</svg>'


def _columns(
    title: str, counts: list[int], labels: list[str], ends: tuple[str, str], mark: float | None
) -> str:
    most, step = max(counts), (WIDTH - 2 * MARGIN) / len(counts)
    drawn = [f'<text x="{MARGIN}" y="14">{escape(title)}</text>']
    for number, (count, label) in enumerate(zip(counts, labels, strict=True)):
        height = (HEIGHT - 44) * count / most
        drawn.append(
            f'<rect x="{MARGIN + number * step:.1f}" y="{HEIGHT - 20 - height:.1f}" '
            f'width="{step * 0.9:.1f}" height="{height:.1f}"><title>{escape(label)}: {count:,}'
            "</title></rect>"
        )
    if mark is not None:
        x = MARGIN + mark * (WIDTH - 2 * MARGIN)
        drawn.append(f'<path class="mark" d="M{x:.1f} 22V{HEIGHT - 20}"/>')
    drawn.append(
        f'<text x="{MARGIN}" y="{HEIGHT - 5}">{ends[0]}</text>'
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 5}" text-anchor="end">{ends[1]}</text>'
    )
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(drawn)}</svg>'


def _number(value: float, whole: bool) -> str:
    return f"{value:,.0f}" if whole else f"{value:.2f}"


def _range(low: float, high: float, whole: bool) -> str:
    if whole and high - low <= 1:
        return _number(low, True)
    return f"{_number(low, whole)} to {_number(high - 1 if whole else high, whole)}"


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto;
  max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }
.chart { width: 100%; max-width: 34rem; font-size: 12px; } .chart text { fill: #444; }
.chart rect { fill: #3b6ea5; } .chart rect:hover { fill: #d1622b; }
.chart .mark { stroke: #d1622b; stroke-dasharray: 4 3; fill: none; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top;
  padding: 0.25rem 0.7rem 0.25rem 0; border-bottom: 1px solid #e4e4e4; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
blockquote { margin: 0.3rem 0 0.8rem; padding-left: 0.8rem; border-left: 3px solid #d8d8d8;
  white-space: pre-wrap; overflow-wrap: anywhere; color: #444; }
summary { cursor: pointer; color: #3b6ea5; } .indices { color: #666; overflow-wrap: anywhere; }
"""
