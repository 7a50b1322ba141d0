"""`python -m alpaca audit DATA`: what is wrong with an instruction data set, record by record.

It never edits the file. `--write-clean FILE` writes a copy without the records that have one of
the chosen findings, with keys renamed or dropped as asked, and next to it `FILE`'s
`.left_out.jsonl`, which lists the records left out with their reasons.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alpaca import atomic, pairs
from alpaca.datafile import read_any
from alpaca.dataset import report
from alpaca.dataset.findings import MEANINGS, NEAR, Audit
from alpaca.errors import UserError
from alpaca.records import text_of

PAIRS = (
    "these are preference pairs, for train.py --loss dpo: of each, the chosen answer is examined, "
    "as its output"
)


def parser() -> argparse.ArgumentParser:
    """The command line of `audit`."""
    made = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0].partition(": ")[2],
        epilog="checks: " + ", ".join(MEANINGS),
    )
    add = made.add_argument
    add("data", type=Path, help="Alpaca-format JSON or JSONL")
    add(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="folder with tokenizer.json, to count tokens",
    )
    add("--max_length", type=int, default=512, help="tokens of an example kept in training")
    add(
        "--near",
        type=float,
        default=NEAR,
        help="ROUGE-L from which two records are near-duplicates",
    )
    add("--json", action="store_true", help="print the report as JSON")
    add("--html", type=Path, metavar="FILE", help="write the report as one HTML page with plots")
    add("--write-clean", "--write_clean", type=Path, metavar="FILE", help="write a cleaned copy")
    add(
        "--rename", type=_pairs, default={}, metavar="OLD=NEW,...", help="read OLD keys as NEW ones"
    )
    add("--drop", type=_names, default=[], metavar="KEY,...", help="remove these keys")
    add(
        "--leave_out",
        type=_checks,
        default=list(MEANINGS),
        metavar="CHECK,...",
        help="checks whose records are left out of the cleaned copy (default: all)",
    )
    return made


def run(arguments: argparse.Namespace) -> None:
    """Audit, print the report, and write the files that the flags name."""
    if not 0.5 <= arguments.near <= 1:
        raise UserError(f"--near is {arguments.near}.", "Give a number from 0.5 to 1.")
    name, clean = str(arguments.data), arguments.write_clean
    if clean and clean.resolve() == arguments.data.resolve():
        raise UserError(
            "--write-clean would overwrite the data set itself.", "Choose another file."
        )
    items, shape = read_any(arguments.data)
    if not items:
        raise UserError(f"{name} holds no records.", "Give it at least one example.")
    items = _changed(items, arguments.rename, arguments.drop)
    try:
        from alpaca.dataset.examine import examine
    except ImportError as error:
        raise UserError(f"{error.name} is missing.", "pip install -e '.[data]'") from None
    read, faults = _as_records(items)
    audit = examine(read, arguments.tokenizer, arguments.max_length, arguments.near, faults)
    wrong = f"the file is JSON in the wrong shape: {shape}; training refuses it"
    audit.notices[:0] = [wrong] * bool(shape) + [PAIRS] * (faults is not None)
    if arguments.json:
        print(json.dumps(report.as_json(audit, name)))
    else:
        print(report.as_text(audit, read, name))
    if arguments.html:
        atomic.write_text(arguments.html, report.as_html(audit, read, name))
    if clean:
        left_out = _left_out(audit, arguments.leave_out)
        _write_clean(clean, items, left_out, as_lines=arguments.data.suffix == ".jsonl")
        if not arguments.json:
            print(f"\n{clean}: {len(items) - len(left_out):,} records; {len(left_out):,} left out")


def _as_records(items: list[Any]) -> tuple[list[Any], list[str | None] | None]:
    """The items to examine; of preference pairs, also why each is none."""
    if not pairs.are_pairs(items):
        return items, None
    both = [pairs.examined(item) for item in items]
    return [item for item, _ in both], [fault for _, fault in both]


def _changed(items: list[Any], rename: dict[str, str], drop: Sequence[str]) -> list[Any]:
    """The items with keys renamed and dropped; refuses to replace one text by another."""
    both = [
        index
        for index, item in enumerate(items)
        if isinstance(item, dict)
        for old, new in rename.items()
        if old in item and (text_of(item.get(new)) or "").strip() and new not in rename
    ]
    if both:
        listed = ", ".join(f"{old}={new}" for old, new in rename.items())
        raise UserError(
            f"--rename {listed}: {len(both):,} record(s) have both keys (first: {both[0]}).",
            "Leave the pair out of --rename, or --drop one of the keys in a copy first.",
        )
    return [
        {
            rename.get(key, key): value
            for key, value in sorted(item.items(), key=lambda pair: pair[0] in rename)
            if key not in drop
        }
        if type(item) is dict
        else item
        for item in items
    ]


def _left_out(audit: Audit, checks: Sequence[str]) -> dict[int, list[str]]:
    """Index -> reasons, of each record with one of the chosen findings."""
    reasons: dict[int, list[str]] = defaultdict(list)
    for finding in audit.findings:
        if finding.check in checks:
            reasons[finding.index].append(f"{finding.check}: {finding.detail}")
    return dict(sorted(reasons.items()))


def _write_clean(
    path: Path, items: list[Any], left_out: dict[int, list[str]], *, as_lines: bool
) -> None:
    remaining = [item for index, item in enumerate(items) if index not in left_out]
    if not remaining:
        raise UserError("No record would be left.", "Choose fewer checks with --leave_out.")
    listed = [
        {"index": index, "reasons": reasons, "record": items[index]}
        for index, reasons in left_out.items()
    ]
    atomic.write_text(path.with_name(f"{path.stem}.left_out.jsonl"), _lines(listed))
    remaining = [_without_nan(item) for item in remaining]
    text = _lines(remaining) if as_lines else _dump(remaining, indent=4) + "\n"
    atomic.write_text(path, text)


def _without_nan(item: Any) -> Any:
    """A record with null for NaN, which is not valid JSON and which other programs refuse."""
    if not isinstance(item, dict):
        return item
    return {key: None if value != value else value for key, value in item.items()}


def _lines(items: list[Any]) -> str:
    return "".join(_dump(item) + "\n" for item in items)


def _dump(value: Any, indent: int | None = None) -> str:
    """Readable JSON; ASCII escapes where it holds a lone surrogate, which UTF-8 cannot encode."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return json.dumps(value, indent=indent) if re.search("[\ud800-\udfff]", text) else text


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _pairs(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in _names(text)]
    if not all(old and new for old, _, new in pairs):
        raise argparse.ArgumentTypeError("is not OLD=NEW,...")
    if len({new for _, _, new in pairs}) < len(pairs):
        raise argparse.ArgumentTypeError("gives two keys the same name")
    return {old: new for old, _, new in pairs}


def _checks(text: str) -> list[str]:
    names = [name.strip() for name in _names(text) if name.strip()]
    unknown = [name for name in names if name not in MEANINGS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown check: {', '.join(unknown)}")
    return names
