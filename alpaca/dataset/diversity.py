"""`python -m alpaca diversity DATA -o plot.html|.png|.svg`: see what a data set asks for.

Root verb and direct object of each instruction as a sunburst, with the share of instructions that
parse, how varied the words are, and how near instructions are to each other. The parser's model
and version are named in the plot, so that it can be made again.
"""

import argparse
import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from alpaca import atomic
from alpaca.datafile import read_raw
from alpaca.errors import UserError

if TYPE_CHECKING:
    from alpaca.dataset.figures import Diversity

FORMS = (".html", ".png", ".svg")


def parser() -> argparse.ArgumentParser:
    """The command line of `diversity`."""
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    add = made.add_argument
    add("data", type=Path, help="Alpaca-format JSON or JSONL")
    add("-o", "--output", type=Path, required=True, help="plot: .html (interactive), .png or .svg")
    add("--compare", type=Path, metavar="OTHER", help="a second data set, shown next to it")
    add("--csv", type=Path, metavar="FILE", help="write every verb and object with its count")
    add(
        "--neighbours",
        type=int,
        default=2000,
        metavar="N",
        help="instructions sampled for the ROUGE-L distribution; 0 skips it",
    )
    add("--processes", type=int, help="parsing processes (default: one per core)")
    add("--spacy_model", metavar="NAME", help="English model (default: the small one installed)")
    return made


def run(arguments: argparse.Namespace) -> None:
    """Parse, draw, and print the figures."""
    form = arguments.output.suffix.lower()
    if form not in FORMS:
        raise UserError(
            f"--output {arguments.output} is not a plot file.",
            f"End its name in {', '.join(FORMS)}.",
        )
    paths = [path for path in (arguments.data, arguments.compare) if path]
    sets = [(path.stem, _instructions(path)) for path in paths]
    try:
        from alpaca.dataset import figures, page, verbs
    except ImportError as error:
        raise UserError(f"{error.name} is missing.", "pip install -e '.[data]'") from None
    model = _model(arguments.spacy_model)
    drawn = []
    for name, instructions in sets:
        with tqdm(total=len(instructions), unit=" instructions", desc=name) as bar:
            asked = verbs.parse_all(instructions, model, bar.update, arguments.processes)
        near = figures.nearest_scores(instructions, arguments.neighbours)
        drawn.append(figures.Diversity(name, instructions, asked, near))
    if form == ".html":
        text = page.page(drawn, verbs.model_version(model))
        atomic.write_text(arguments.output, text)
    else:
        atomic.write_bytes(arguments.output, figures.picture(drawn, form[1:]))
    if arguments.csv:
        atomic.write_text(arguments.csv, table(drawn))
    for data in drawn:
        print("\n  ".join([f"{data.name} ({verbs.model_version(model)}):", *data.summary()]))


def table(sets: "Sequence[Diversity]") -> str:
    """Every verb and object with its count, the most frequent first, as CSV."""
    written = io.StringIO()
    rows = csv.writer(written, lineterminator="\n")
    rows.writerow(["data", "verb", "object", "count"])
    for data in sets:
        counts = Counter(item for item in data.asked if item.verb)
        for item, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
            rows.writerow([*map(_cell, (data.name, item.verb, item.object)), count])
    return written.getvalue()


def _cell(text: str) -> str:
    """Text that a spreadsheet shows and does not run: a formula gets an apostrophe in front."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _model(name: str | None) -> str:
    try:
        from alpaca.dataset import verbs

        return verbs.find_model(name)
    except ImportError:
        raise UserError("spaCy is missing.", "pip install -e '.[data]'") from None


def _instructions(path: Path) -> list[str]:
    """Every instruction that is text; other faults of a record are reported by `audit`."""
    items = read_raw(path)
    texts = [item.get("instruction") for item in items if isinstance(item, dict)]
    found = [text for text in texts if isinstance(text, str) and text.strip()]
    if not found:
        raise UserError(f"{path} holds no instructions.", f"python -m alpaca audit {path}")
    return found
