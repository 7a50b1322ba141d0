"""Read and write verdicts in AlpacaEval's format: a JSON list, one object for each comparison.

A preference is 1 (output_1, the baseline's, is better) to 2 (output_2 is better), 1.5 a tie, null
no verdict; 0, an old spelling of 1.5, is read as 1.5. Keys that are not read here (price, raw
completion and others) are kept and written back. Source of the format: tatsu-lab/alpaca_eval.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpaca import atomic
from alpaca.errors import UserError

TEXTS = ("instruction", "output_1", "generator_1", "output_2", "generator_2", "annotator")
FIELDS = (*TEXTS[:3], "dataset", *TEXTS[3:], "preference")  # in AlpacaEval's order
SHOWN = 5  # names listed in an error
REMEDY = (
    "AlpacaEval's format is a JSON list of objects with the keys " + ", ".join(FIELDS) + ".\n"
    "  preference is 1 (output_1 is better) to 2 (output_2 is better), 1.5 (a tie) or null."
)


@dataclass(frozen=True)
class Annotation:
    """One verdict. generator_1 is the baseline; `extra` holds the keys that are not read here."""

    instruction: str
    output_1: str
    generator_1: str
    output_2: str
    generator_2: str
    annotator: str
    preference: float | None
    dataset: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> list[Annotation]:
    """The annotations of a file, in its order; an empty list is allowed.

    Raises:
        UserError: the file is missing, is not a JSON list, or an entry (counted from 0) is wrong.
    """
    items = _items(path)
    for number, item in enumerate(items):
        fault = _fault(item)
        if fault:
            raise UserError(f"{path}: entry {number} {fault}.", REMEDY)
    return [_annotation(item) for item in items]


def write(path: Path, annotations: Iterable[Annotation]) -> None:
    """Write the file atomically, in UTF-8.

    Raises:
        UserError: a value that `read` would refuse; nothing is written.
    """
    items = [_entry(one) for one in annotations]
    for number, item in enumerate(items):
        fault = _fault(item)
        if fault:
            raise UserError(f"{path} is not written: entry {number} {fault}.", REMEDY)
    text = json.dumps(items, indent=2, ensure_ascii=False) + "\n"
    # Half of a surrogate pair, as some models answer, has no UTF-8: it stays a JSON escape.
    text = re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)
    atomic.write_text(path, text)


def by_generator(
    annotations: Sequence[Annotation], *, several_pairs: bool = False, several_judges: bool = False
) -> dict[tuple[str, str], list[Annotation]]:
    """The annotations of each pair (generator_1, generator_2), in order of first appearance.

    Verdicts of different judges are not comparable, so they are mixed only when asked for.

    Raises:
        UserError: several annotators or several pairs, and the matching argument is not set.
    """
    judges = sorted({one.annotator for one in annotations})
    if len(judges) > 1 and not several_judges:
        raise UserError(
            f"The verdicts are by {len(judges)} annotators ({_listed(judges)}).",
            "Verdicts of different judges cannot be mixed: give one file for each annotator.",
        )
    groups: dict[tuple[str, str], list[Annotation]] = {}
    for one in annotations:
        groups.setdefault((one.generator_1, one.generator_2), []).append(one)
    if len(groups) > 1 and not several_pairs:
        pairs = _listed([f"{first} against {second}" for first, second in groups])
        raise UserError(
            f"The verdicts compare {len(groups)} pairs of generators ({pairs}).",
            "Give one file for each pair. If one pair is meant, write its names the same way.",
        )
    return groups


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# ---- one entry


def _items(path: Path) -> list[Any]:
    try:
        items = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"There is no annotation file {path}.", REMEDY) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder.", "Give the annotations.json in it.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}).", REMEDY) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}.", REMEDY) from None
    if not isinstance(items, list):
        raise UserError(f"{path} holds one JSON {_kind(items)}, not a list.", REMEDY)
    return items


def _kind(value: Any) -> str:
    names = {dict: "object", str: "text", bool: "true or false", type(None): "null", list: "list"}
    return names.get(type(value), "number")


def _fault(item: Any) -> str:
    """What is wrong with an entry, as the end of a sentence; "" if nothing is."""
    if not isinstance(item, dict):
        return f"is a {_kind(item)}, not an object"
    missing = [key for key in (*TEXTS, "preference") if key not in item]
    if missing:
        return f"lacks {', '.join(missing)}"
    for key in TEXTS:
        if not isinstance(item[key], str):
            return f"has a {_kind(item[key])} as {key}, not a text"
    if not isinstance(item.get("dataset"), str | None):
        return f"has a {_kind(item['dataset'])} as dataset, not a text"
    return _wrong_preference(item["preference"])


def _wrong_preference(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"has a {_kind(value)} as preference, not a number"
    if value != 0 and not 1 <= value <= 2:
        return f"has a preference of {str(value)[:20]}, outside 1 to 2"
    return ""


def _annotation(item: dict[str, Any]) -> Annotation:
    extra = {key: value for key, value in item.items() if key not in FIELDS}
    preference = item["preference"]
    if preference is not None:
        preference = float(preference) or 1.5
    texts = {key: item[key] for key in TEXTS}
    return Annotation(**texts, preference=preference, dataset=item.get("dataset"), extra=extra)


def _entry(one: Annotation) -> dict[str, Any]:
    known = {key: getattr(one, key) for key in FIELDS}
    if one.dataset is None:
        del known["dataset"]
    return known | {key: value for key, value in one.extra.items() if key not in FIELDS}
