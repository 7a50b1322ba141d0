"""The two rings of a diversity plot as plain arcs: verbs inside, their direct objects outside.

An arc's angle is proportional to its count. A verb's arc spans all its instructions; its four
commonest objects take their shares of it, and the pale remainder is all its other objects.
Nothing is rescaled to fill the circle.
"""

import colorsys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from alpaca.dataset.verbs import Asked

VERBS = 20
OBJECTS = 4


@dataclass(frozen=True)
class Arc:
    """A piece of a ring, from `start` to `end` (turns, clockwise from the top)."""

    ring: int
    verb: str
    object: str
    count: int
    start: float
    end: float
    color: str

    @property
    def label(self) -> str:
        """The text on the arc; empty on the remainder."""
        return self.verb if self.ring == 0 else self.object


def pairs(asked: Sequence[Asked]) -> Counter[Asked]:
    """How often each verb and object were found together."""
    return Counter(item for item in asked if item.verb and item.object)


def arcs(counts: Counter[Asked], verbs: int = VERBS, objects: int = OBJECTS) -> list[Arc]:
    """The commonest verbs by count, each followed by its objects; ties are alphabetical."""
    totals: Counter[str] = Counter()
    for item, count in counts.items():
        totals[item.verb] += count
    shown = _commonest(totals, verbs)
    turn = sum(count for _, count in shown) or 1
    found, at = [], 0
    for place, (verb, total) in enumerate(shown):
        hue = place / len(shown)
        inner, outer = _color(hue, 0.64, 0.6), _color(hue, 0.78, 0.6)
        found.append(Arc(0, verb, "", total, at / turn, (at + total) / turn, inner))
        mine = Counter({item.object: n for item, n in counts.items() if item.verb == verb})
        rows = [(name, n, outer) for name, n in _commonest(mine, objects)]
        rest = total - sum(n for _, n, _ in rows)
        if rest:
            rows.append(("", rest, _color(hue, 0.95, 0.4)))
        for name, count, color in rows:
            found.append(Arc(1, verb, name, count, at / turn, (at + count) / turn, color))
            at += count
    return found


def _commonest(counts: Counter[str], most: int) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]


def _color(hue: float, light: float, saturation: float) -> str:
    red, green, blue = colorsys.hls_to_rgb(hue, light, saturation)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
