"""The interactive diversity plot: one HTML file that contains its data, its SVG and its script.

The arcs are drawn here as SVG. The script (page.js) only shows an arc's count on hover and its
examples on click, so the page works offline, can be printed, and is readable without JavaScript.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from alpaca.dataset.charts import STYLE, histogram
from alpaca.dataset.figures import RADII, WINDOW, Diversity
from alpaca.dataset.rings import Arc

SIZE = 380  # radius of the plot in SVG units
EXAMPLES = 12  # shown for each arc

PAGE_STYLE = """
.sets { display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: 2rem; }
.sunburst { width: 100%; max-width: 52rem; } .sunburst path { stroke: #fff; cursor: pointer; }
.sunburst path:hover, .sunburst path:focus, .sunburst path.chosen { stroke: #222; stroke-width: 2;
  outline: none; }
.sunburst text { font-size: 12px; pointer-events: none; text-anchor: middle;
  dominant-baseline: central; } .sunburst .objects { font-size: 10.5px; }
.hole { font-size: 15px !important; } .hole tspan { fill: #555; }
.examples { min-height: 12rem; } .examples li { overflow-wrap: anywhere; }
"""


def page(sets: Sequence[Diversity], model: str) -> str:
    """One page, with the sets side by side; `model` is the parser's name and version."""
    style = STYLE + PAGE_STYLE
    if len(sets) > 1:
        style += "body { max-width: 110rem; }"
    titles = " and ".join(data.name for data in sets)
    shown = "".join(_set(number, data) for number, data in enumerate(sets))
    examples = json.dumps([_examples(data) for data in sets], ensure_ascii=False)
    examples = examples.replace("<", "\\u003c")  # no text of a data set can end the script element
    script = files("alpaca.dataset").joinpath("page.js").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Diversity of {escape(titles)}</title><style>{style}</style></head><body>\n"
        f'<h1>Root verbs and their direct objects</h1>\n<div class="sets">{shown}</div>\n'
        f"<p>Inner ring: the 20 commonest root verbs. Outer ring: the 4 commonest direct objects "
        f"of each; pale: all its other objects. Parsed with {escape(model)}.</p>\n"
        f'<script type="application/json" id="examples">{examples}</script>'
        f"\n<script>{script}</script>\n</body></html>\n"
    )


def _set(number: int, data: Diversity) -> str:
    rings = data.arcs()
    facts = "".join(f"<li>{escape(line)}</li>" for line in data.summary())
    plots = histogram("ROUGE-L to the nearest instruction", data.neighbours, mark=0.7)
    plots += histogram(f"type/token ratio of {WINDOW} words", data.types_per_token)
    drawn = "".join(_path(place, arc, data.with_object) for place, arc in enumerate(rings))
    labels = "".join(_label(arc) for arc in rings)
    box = f"{-SIZE - 2} {-SIZE - 2} {2 * SIZE + 4} {2 * SIZE + 4}"
    return (
        f'<section data-set="{number}"><h2>{escape(data.name)}</h2>'
        f'<svg class="sunburst" viewBox="{box}" role="img">{drawn}{labels}'
        '<text class="hole" y="-10"></text><text class="hole" y="12"><tspan></tspan></text></svg>'
        '<div class="examples"><p>Point at a piece for its count; click it for examples.</p></div>'
        f"<ul>{facts}</ul>{plots}</section>"
    )


def _path(place: int, arc: Arc, total: int) -> str:
    inner, outer = (SIZE * radius for radius in RADII[arc.ring : arc.ring + 2])
    share = arc.count / total
    name = arc.verb if arc.ring == 0 else f"{arc.verb} {arc.object or '(other objects)'}"
    return (
        f'<path d="{_outline(arc.start, arc.end, inner, outer)}" fill="{arc.color}" tabindex="0" '
        f'data-arc="{place}" data-name="{escape(name)}" data-count="{arc.count:,} ({share:.1%})">'
        f"<title>{escape(name)}: {arc.count:,}</title></path>"
    )


def _outline(start: float, end: float, inner: float, outer: float) -> str:
    """An SVG path around a piece of a ring; a full circle stays slightly open, or SVG omits it."""
    end = min(end, start + 0.99999)
    large = int(end - start > 0.5)
    corners = [
        _point(turn, radius)
        for turn, radius in ((start, outer), (end, outer), (end, inner), (start, inner))
    ]
    a, b, c, d = (f"{x:.2f} {y:.2f}" for x, y in corners)
    return (
        f"M{a}A{outer:.2f} {outer:.2f} 0 {large} 1 {b}L{c}A{inner:.2f} {inner:.2f} 0 {large} 0 {d}Z"
    )


def _point(turn: float, radius: float) -> tuple[float, float]:
    angle = 2 * math.pi * turn
    return radius * math.sin(angle), -radius * math.cos(angle)


def _label(arc: Arc) -> str:
    inner, outer = (SIZE * radius for radius in RADII[arc.ring : arc.ring + 2])
    if (arc.end - arc.start) * math.pi * (inner + outer) < 11 or not arc.label:
        return ""
    middle = (arc.start + arc.end) / 2
    x, y = _point(middle, (inner + outer) / 2)
    turned = 360 * middle - 90 + (180 if middle > 0.5 else 0)
    ring = "verbs" if arc.ring == 0 else "objects"
    return (
        f'<text class="{ring}" transform="translate({x:.1f} {y:.1f}) rotate({turned:.1f})">'
        f"{escape(arc.label)}</text>"
    )


def _examples(data: Diversity) -> list[list[str]]:
    """For each arc, the first instructions that belong to it."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for text, item in zip(data.instructions, data.asked, strict=True):
        if item.verb and item.object:
            found[item.verb, item.object].append(text)
            found[item.verb, ""].append(text)
    rings = data.arcs()
    named = {(arc.verb, arc.object) for arc in rings if arc.ring == 1 and arc.object}
    other = {
        verb: [
            text
            for (v, name), texts in found.items()
            if v == verb and name and (v, name) not in named
            for text in texts
        ]
        for verb in {arc.verb for arc in rings}
    }
    return [
        (other[arc.verb] if arc.ring == 1 and not arc.object else found[arc.verb, arc.object])[
            :EXAMPLES
        ]
        for arc in rings
    ]
