"""Read Alpaca-format examples (`Record`) from a data file, and report keys that are not read.

A data set with any mistake is refused as a whole, with a list of the mistakes. Training on only the
part that parses is how shifted fields get into models unnoticed. An output of "" is not a mistake:
the published data set has some, and the recipe trains on them (on the EOS alone).
"""

import difflib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from alpaca.datafile import FIELDS, MAX_LISTED, DuplicateKeys, Spelled, audit_command, read_raw
from alpaca.errors import UserError

MAX_KEYS = 12  # listed in a notice

# Other data sets' names for the three fields, as `letters` returns them; likelier names first.
OTHER_NAMES = {
    "instruction": ("prompt", "question", "query", "request", "task", "human", "user"),
    "input": ("context",),
    "output": (
        "response", "completion", "answer", "target", "reply", "chosen", "assistant", "gpt", "bot"),
}  # fmt: skip
# Keys (as `letters` returns them) with content that is missing from the three fields. Empty values
# do not count.
ASKED_ABOUT = (
    "context", "passage", "paragraph", "document", "article", "background", "evidence",
    "knowledge", "facts", "schema", "table", "code", "question", "query", "prompt", "inputtext",
    "instructioncontext", "ctx", "sourcetext", "sentence",
)  # fmt: skip
CHANGES_MEANING = {
    "history": "earlier turns, which the template has no place for",
    "chathistory": "earlier turns, which the template has no place for",
    "previou": "earlier turns, which the template has no place for",
    "previousturn": "earlier turns, which the template has no place for",
    "prevturn": "earlier turns, which the template has no place for",
    "systeminstruction": "a system prompt, which the template has no place for",
    "imagepath": "a picture, which a text model cannot see",
    "conversation": "earlier turns, which the template has no place for",
    "message": "earlier turns, which the template has no place for",
    "dialog": "earlier turns, which the template has no place for",
    "dialogue": "earlier turns, which the template has no place for",
    "system": "a system prompt, which the template has no place for",
    "systemprompt": "a system prompt, which the template has no place for",
    "systemmessage": "a system prompt, which the template has no place for",
    "persona": "a system prompt, which the template has no place for",
    "chosen": "a preferred answer: one of a pair",
    "rejected": "a rejected answer: one of a pair",
    "image": "a picture, which a text model cannot see",
    "video": "a video, which a text model cannot see",
    "audio": "a sound, which a text model cannot hear",
    "tool": "functions to call, which the template has no place for",
    "function": "functions to call, which the template has no place for",
    "toolcall": "functions to call, which the template has no place for",
    "functioncall": "functions to call, which the template has no place for",
}
# Keys that judge a record, and the values that mean it should not be trained on.
VERDICTS = (
    "label", "ktotag", "accepted", "correct", "iscorrect", "valid", "isvalid", "keep", "train",
    "weight",
)  # fmt: skip
REJECTS = (
    "0",
    "false",
    "no",
    "bad",
    "wrong",
    "incorrect",
    "rejected",
    "reject",
    "undesirable",
    "invalid",
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One example: instruction, optional input text, answer; input and output may be ""."""

    instruction: str
    input: str = ""
    output: str


def to_stderr(notice: str) -> None:
    """Print a notice to stderr: the default for notices."""
    print(notice, file=sys.stderr)


def read_records(path: Path, notice: Callable[[str], None] = to_stderr) -> list[Record]:
    """Read a data set: a JSON list, or JSONL with one object per line; UTF-8, a BOM is allowed.

    An input of null or NaN means no input. Numbers and booleans are read as text, as written in the
    file. `notice` is called with a message about those, and about the keys that are not read.

    Raises:
        UserError: as `read_raw`; or there are no records, the records have another form, keys that
            are not read change what a record means, or some records are invalid (all are counted,
            and the first 50 problems listed).
    """
    items = read_raw(path)
    if not items:
        raise UserError(f"{path} holds no records.", "Give it at least one example.")
    _check_form(path, items)
    _check_keys(path, items)
    _check_fields(path, items)
    for text in notices(items):
        notice(f"{path}: {text}")
    return [Record(**texts(item)) for item in items]


# ---- one record


def texts(item: dict[str, Any]) -> dict[str, str]:
    """The three fields of an item as text; "" for a missing or non-text value."""
    return {name: text_of(item.get(name)) or "" for name in FIELDS}


def text_of(value: Any) -> str | None:
    """A text, or a number or boolean as written in the file; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, Spelled):
        return value.text
    if isinstance(value, bool | int):
        return json.dumps(value)
    return None


def faults(item: Any) -> list[str]:
    """Why an item is not a record, one reason per field; empty if it is one."""
    if not isinstance(item, dict):
        return [f"is {_kind(item)}, not an object"]
    if isinstance(item, DuplicateKeys):
        return [f"{item.duplicate}: occurs more than once"]
    return [f"{name}: {why}" for name in FIELDS if (why := _fault(name, item))]


def _fault(name: str, item: dict[str, Any]) -> str | None:
    value = item.get(name)
    if name == "input" and _is_nothing(value):
        return None
    if name not in item:
        return "is missing"
    text = text_of(value)
    if text is None:
        return f"is {_kind(value)}, not text"
    if re.search("[\ud800-\udfff]", text):
        return "holds half of a surrogate pair, which is not text"
    if not text.strip() and name == "instruction":
        return "is empty"
    if text and not text.strip() and name == "output":
        return "is empty except for white space"
    return None


def _is_nothing(value: Any) -> bool:
    """Whether a value is None or NaN, which is how pandas writes an empty cell."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return "null" if value is None else json.dumps(value) if isinstance(value, float) else "a text"


def unread(item: Any) -> dict[str, str]:
    """The keys of an item that are not read but change what it means, each with the reason."""
    if not isinstance(item, dict):
        return {}
    found = {key: _meaning(key, item) for key in item if key not in FIELDS}
    return {key: why for key, why in found.items() if why}


def _meaning(key: str, item: dict[str, Any]) -> str | None:
    """Why a key that is not read changes its record's meaning; None if it does not."""
    value, name = item[key], letters(key)
    if name in VERDICTS:
        verdict = (text_of(value) or "").strip().lower()
        rejects = verdict in REJECTS or (isinstance(value, int | float) and value <= 0)
        if not rejects or verdict == texts(item)["output"].strip().lower():  # a class label
            return None
        return f"{_shown(value)}, which seems to reject the record (if not: --drop {key})"
    if (
        _is_nothing(value)
        or value in ("", [], {})
        or (isinstance(value, str) and not value.strip())
    ):
        return None
    text = text_of(value)
    fields = texts(item)
    field = similar(key)
    if field:
        return None if text == fields[field] else f"looks like {field}"
    for field, others in OTHER_NAMES.items():
        if name in others and not fields[field] and field != "input":
            return f"looks like {field}, which is missing or empty"
    if name in CHANGES_MEANING:
        return CHANGES_MEANING[name]
    if name in ASKED_ABOUT and not _contained(text, fields):
        return "a text that the instruction may be about"
    return None


@lru_cache(maxsize=10_000)
def letters(key: str) -> str:
    """A key in lower case, without punctuation, digits and a plural s."""
    return re.sub(r"[\W\d_]+", "", key.lower()).removesuffix("s")


@lru_cache(maxsize=10_000)
def similar(key: str) -> str | None:
    """The field whose name a key resembles: `Input`, `outputs`, `output_1`, `intruction`."""
    name = letters(key)
    for field in FIELDS:
        close = difflib.SequenceMatcher(None, name, field).ratio() >= 0.8
        if name == field or (abs(len(name) - len(field)) <= 1 and close):
            return field
    return None


def _contained(text: str | None, fields: dict[str, str]) -> bool:
    """Whether the record already contains a text: in a field, or as a prompt built from them.

    A text in the answer (such as its code) also counts: given as input, it would only be copied.
    """
    if text is None:
        return False
    plain = " ".join(text.split())
    asked = [" ".join(fields[name].split()) for name in ("instruction", "input")]
    answer = " ".join(fields["output"].split())
    return any(plain in part for part in (*asked, answer)) or all(part in plain for part in asked)


def named(key: str) -> str:
    """A printable form of a key: surrogates and line ends escaped, long keys truncated."""
    plain = key if key.isprintable() and key.strip() == key and key else json.dumps(key)
    return plain if len(plain) <= 40 else f"{plain[:37]}..."


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 20 else f"{text[:20]}..."


# ---- all records


def notices(items: Sequence[Any]) -> list[str]:
    """Messages about values that are read as text and keys that are not read, with counts."""
    records = [item for item in items if isinstance(item, dict)]
    found = []
    spelled = Counter(
        name
        for item in records
        for name in FIELDS
        if not isinstance(item.get(name), str) and text_of(item.get(name)) is not None
    )
    if spelled:
        counts = ", ".join(f"{name} ({count:,})" for name, count in spelled.items())
        found.append(f"numbers and booleans are read as text: {counts}")
    keys = Counter(key for item in records for key in item if key not in FIELDS)
    if keys:
        shown = [f"{named(key)} ({count:,})" for key, count in keys.most_common(MAX_KEYS)]
        more = len(keys) - len(shown)
        shown += [f"and {more:,} more"] if more else []
        found.append(f"of {len(items):,} records, keys that are not read: {', '.join(shown)}")
    return found


def _check_form(path: Path, items: list[Any]) -> None:
    """Raise UserError if most records have another form, and name that form."""
    lists = [
        index
        for index, item in enumerate(items)
        if isinstance(item, dict) and isinstance(item.get("output"), list)
    ]
    if lists:
        raise UserError(
            f"{path}: {len(lists):,} of {len(items):,} records (first: {lists[0]}) have a list "
            "as output: several answers, or a preferred and a rejected one.",
            "A record has one answer: keep one of them as output, as text."
            + _leaving_out(path, items, "invalid,empty_instruction"),
        )
    strange = [
        item
        for item in items
        if not isinstance(item, dict) or "instruction" not in item or "output" not in item
    ]
    if len(strange) * 2 <= len(items):
        return
    objects = [item for item in strange if isinstance(item, dict)]
    if len(objects) * 2 <= len(strange):
        raise UserError(
            f"{path}: {len(strange):,} of {len(items):,} records are not objects, for example "
            f"{_shown(strange[0])}.",
            'Each record is {"instruction": text, "input": text, "output": text}.',
        )
    counts = Counter(key for item in objects for key in item)
    common = {key for key, count in counts.items() if count * 2 > len(objects)} or {*counts}
    form, remedy = _form(path, common)
    keys = ", ".join(f"{named(key)} ({count:,})" for key, count in counts.most_common(MAX_KEYS))
    raise UserError(
        f"{path}: {len(strange):,} of {len(items):,} records have no instruction or no output. "
        f"Their keys, with counts: {keys}. That is the form of {form}.",
        remedy,
    )


def _form(path: Path, common: set[str]) -> tuple[str, str]:
    """The name of the records' form, judged by their keys, and the remedy."""
    by_letters = {letters(key): key for key in common}
    for name in ("conversation", "message", "dialog", "dialogue"):
        if name in by_letters:
            return f"conversations (under {by_letters[name]!r})", (
                "Write one record for each question and its answer; docs/data.md has a program "
                "for it."
            )
    renamed = {}
    for field, others in OTHER_NAMES.items():
        like = [key for key in sorted(common) if similar(key) == field]
        other = [by_letters[name] for name in others if name in by_letters]
        if field not in common and (like or other):
            renamed[field] = (like or other)[0]
    missing = {"instruction", "output"} - {*common, *renamed}
    if not missing:
        pairs = [f"{old}={new}" for new, old in renamed.items()]
        flags = ["--rename", ",".join(pairs), "--leave_out", "invalid,empty_instruction"]
        if "rejected" in by_letters:
            flags += ["--drop", by_letters["rejected"]]
        form = (
            "preference pairs"
            if "rejected" in by_letters
            else f"{'/'.join(renamed.values())} records"
        )
        remedy = f"Read {', '.join(pairs)}:\n    {audit_command(path, *flags)}"
        if "rejected" in by_letters:
            remedy = f"train.py --loss dpo learns which answer is preferred. Or: {remedy}"
        return form, remedy
    if "text" in by_letters:
        return "whole texts (under 'text')", (
            "Split each into what is asked (instruction) and the answer (output): training must "
            "know where the answer begins."
        )
    return f"another data set, without {' and '.join(sorted(missing))}", (
        'Each record is {"instruction": text, "input": text, "output": text}. For a key with '
        "another name: python -m alpaca audit --rename OLD=NEW"
    )


def _check_keys(path: Path, items: list[Any]) -> None:
    """Raise UserError if keys that are not read change what records mean."""
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], int] = {}
    for index, item in enumerate(items):
        for pair in unread(item).items():
            counts[pair] += 1
            first.setdefault(pair, index)
    if not counts:
        return
    listed = [
        f"{named(key)} ({count:,} of {len(items):,} records, first record {first[key, why]}): {why}"
        for (key, why), count in counts.most_common(MAX_LISTED)
    ]
    renamed, dropped = _remedies(items, {key for key, _ in counts})
    remedy = "Read or drop each key, or leave its records out."
    flags, how = [], []
    if renamed:
        flags += ["--rename", ",".join(f"{old}={new}" for old, new in renamed.items())]
        how.append("reads " + ", ".join(f"{old} as {new}" for old, new in renamed.items()))
    if dropped:
        flags += ["--drop", ",".join(dropped)]
        how.append("drops " + ", ".join(dropped))
    checks = "unread_key,invalid,empty_instruction"
    if flags:
        command = audit_command(path, *flags, "--leave_out", checks)
        remedy += f"\n  A copy that {' and '.join(how)}:\n    {command}"
    remedy += _leaving_out(path, items, checks)
    if verdicts := sorted({key for key, _ in counts if letters(key) in VERDICTS}):
        command = audit_command(path, "--drop", ",".join(verdicts))
        remedy += f"\n  If {' and '.join(verdicts)} is a class, not a verdict:\n    {command}"
    raise UserError(
        f"{path}: keys that are not read change what records mean:\n    " + "\n    ".join(listed),
        remedy,
    )


def _remedies(items: list[Any], keys: set[str]) -> tuple[dict[str, str], list[str]]:
    """Keys to read as a field that is empty in all records with that key, and keys to drop."""
    renamed: dict[str, str] = {}
    dropped = []
    for key in sorted(keys):
        name = letters(key)
        other = next((field for field, names in OTHER_NAMES.items() if name in names), None)
        about = "input" if name in ASKED_ABOUT else None
        holders = [item for item in items if key in unread(item)]
        free = [
            field
            for field in dict.fromkeys((similar(key), other, about))
            if field and not any(texts(item)[field].strip() for item in holders)
        ]
        if free and free[0] not in renamed.values() and not re.search("[,=]", key):
            renamed[key] = free[0]
        elif name not in VERDICTS:
            dropped.append(key)
    return renamed, dropped


def _check_fields(path: Path, items: list[Any]) -> None:
    problems = [
        f"record {index}: {why}" for index, item in enumerate(items) for why in faults(item)
    ]
    if not problems:
        return
    listed = "\n    ".join(problems[:MAX_LISTED])
    more = len(problems) - MAX_LISTED
    listed += f"\n    ... and {more:,} more" if more > 0 else ""
    raise UserError(
        f"{path}: {len(problems):,} problem(s) in {len(items):,} records:\n    {listed}",
        'Each record is {"instruction": text, "input": text, "output": text}; '
        "indices count from 0. Fix the records named."
        + _leaving_out(path, items, "invalid,empty_instruction"),
    )


def _leaving_out(path: Path, items: list[Any], checks: str) -> str:
    """The command that writes a copy without the faulty records; empty if none would be left."""
    if all(faults(item) or ("unread_key" in checks and unread(item)) for item in items):
        return ""
    return f"\n  A copy without those records:\n    {audit_command(path, '--leave_out', checks)}"
