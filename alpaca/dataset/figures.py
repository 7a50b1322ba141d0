"""The figures of one data set's diversity, and its plot for print, drawn by matplotlib."""

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alpaca.dataset.novelty import Index, words
from alpaca.dataset.rings import Arc, arcs, pairs
from alpaca.dataset.verbs import Asked

WINDOW = 100  # words: a type/token ratio is comparable only over texts of one length
RADII = (0.28, 0.66, 1.0)  # hole, border between the rings, outside


@dataclass(frozen=True)
class Diversity:
    """One data set's figures; `neighbours` are the ROUGE-L of a sample to its nearest others."""

    name: str
    instructions: list[str]
    asked: list[Asked]
    neighbours: list[float]

    @property
    def with_verb(self) -> int:
        """Instructions whose parse has a root verb."""
        return sum(bool(item.verb) for item in self.asked)

    @property
    def with_object(self) -> int:
        """Instructions whose parse has a root verb and its direct object: those in the rings."""
        return sum(bool(item.verb and item.object) for item in self.asked)

    @property
    def types_per_token(self) -> list[float]:
        """Distinct words divided by words, for each run of 100 words in file order."""
        tokens = [word for text in self.instructions for word in words(text)]
        starts = range(0, len(tokens) - WINDOW + 1, WINDOW)
        return [len(set(tokens[start : start + WINDOW])) / WINDOW for start in starts]

    def arcs(self) -> list[Arc]:
        """The rings of this data set."""
        return arcs(pairs(self.asked))

    def summary(self) -> list[str]:
        """The figures as text, one line each."""
        count = len(self.instructions)
        tokens = [word for text in self.instructions for word in words(text)]
        ratios, near = self.types_per_token, self.neighbours
        lines = [
            f"{count:,} instructions; {self.with_verb:,} ({self.with_verb / count:.1%}) parse to a "
            f"root verb, {self.with_object:,} ({self.with_object / count:.1%}) to a verb and its "
            f"direct object; {len(pairs(self.asked)):,} distinct pairs",
            f"{len(tokens):,} words, {len(set(tokens)):,} different",
        ]
        if ratios:
            lines.append(f"type/token ratio of {WINDOW} words: mean {np.mean(ratios):.3f}")
        if near:
            share = float(np.mean(np.asarray(near) >= 0.7))
            lines.append(
                f"ROUGE-L to the nearest other instruction, {len(near):,} sampled: "
                f"median {np.median(near):.3f}, {share:.1%} at 0.7 or above"
            )
        return lines


def nearest_scores(instructions: Sequence[str], sample: int, seed: int = 0) -> list[float]:
    """ROUGE-L of `sample` instructions, drawn by `seed`, to the nearest other one."""
    if len(instructions) < 2 or not sample:
        return []
    index = Index(instructions)
    count = min(sample, len(instructions))
    drawn = random.Random(seed).sample(range(len(instructions)), count)
    nearest = []
    for number in sorted(drawn):
        scores = index.scores(instructions[number])
        scores[number] = 0.0
        nearest.append(float(scores.max()))
    return nearest


def picture(sets: Sequence[Diversity], form: str) -> bytes:
    """The sunbursts side by side, as png (300 dpi) or svg."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 * len(sets), 8.4))
    FigureCanvasAgg(figure)  # needs no window system
    for place, data in enumerate(sets, start=1):
        axes = figure.add_subplot(1, len(sets), place)
        axes.set_aspect("equal")
        axes.set_axis_off()
        axes.set_xlim(-1.02, 1.02)
        axes.set_ylim(-1.02, 1.02)
        axes.set_title(
            f"{data.name}: root verb and direct object of {data.with_object:,} "
            f"of {len(data.asked):,} instructions"
        )
        for arc in data.arcs():
            _draw(axes, arc)
    figure.tight_layout()
    written = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "alpaca", "svg.fonttype": "none"}):
        # No date and fixed ids: the same data gives the same bytes.
        figure.savefig(written, format=form, dpi=300, metadata=_no_date(form))
    return written.getvalue()


def _no_date(form: str) -> dict[str, Any]:
    return {"Date": None} if form == "svg" else {}


def _draw(axes: Any, arc: Arc) -> None:
    from matplotlib.patches import Wedge

    inner, outer = RADII[arc.ring : arc.ring + 2]
    first, last = 90 - 360 * arc.end, 90 - 360 * arc.start  # matplotlib turns the other way
    axes.add_patch(
        Wedge((0, 0), outer, first, last, width=outer - inner, color=arc.color, ec="white", lw=0.7)
    )
    if (arc.end - arc.start) * 360 < 1.6 or not arc.label:
        return
    middle = (first + last) / 2
    angle, radius = np.deg2rad(middle), (inner + outer) / 2
    flipped = 90 < middle % 360 < 270
    axes.text(
        radius * np.cos(angle),
        radius * np.sin(angle),
        arc.label,
        ha="center",
        va="center",
        rotation=middle + 180 if flipped else middle,
        fontsize=9 if arc.ring == 0 else 7.5,
    )
