"""Read the items of a data file: a JSON list or JSONL in UTF-8. Anything else is named and refused.

Compressed files, tables and web pages are recognized by their first bytes. A line that is not UTF-8
is shown in the likely encodings. JSON of another shape is described. Each refusal gives the command
that converts the file. For the audit, `read_any` also reads shapes that hold complete records.
"""

import ast
import csv
import json
import re
import shlex
import warnings
import zipfile
from pathlib import Path
from typing import Any

from alpaca.errors import UserError

FIELDS = ("instruction", "input", "output")
MAX_LISTED = 50
MAX_DIGITS = 4300  # of an integer: Python's own limit for converting text
MAX_DEPTH = 100  # of nested lists and objects in one record
MAX_LITERAL = 20 << 20  # characters parsed as Python literals, which takes much memory


class Spelled(float):
    """A float that remembers how the file writes it: 1.10 stays 1.10 as text."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> "Spelled":
        """Parse `text` as a number."""
        made = super().__new__(cls, text)
        made.text = text
        return made


class DuplicateKeys(dict[str, Any]):
    """A JSON object with a key more than once (`duplicate`); json alone keeps the last value."""

    duplicate = ""


class _TooLongError(Exception):
    """An integer with more than `MAX_DIGITS` digits."""


def audit_command(path: Path, *flags: str) -> str:
    """The command that writes a copy of a data set; `flags` select what it drops or changes."""
    clean = f"clean{path.suffix}"
    clean = f"clean_2{path.suffix}" if clean == path.name else clean
    words = ["python", "-m", "alpaca", "audit", str(path), *flags, "--write-clean", clean]
    return " ".join(map(shlex.quote, words))


def read_raw(path: Path) -> list[Any]:
    """The items of a JSON list or JSONL file; the items are not checked.

    Raises:
        UserError: the file is missing, of another kind or encoding, or JSON of another shape.
    """
    items, shape = read_any(path)
    if shape:
        raise UserError(
            f"{path} is JSON in the wrong shape: {shape}.",
            "A data set is one list of objects, or one object per line (JSONL). "
            f"To convert it:\n    {audit_command(path, '--leave_out', 'invalid')}",
        )
    return items


def read_any(path: Path) -> tuple[list[Any], str]:
    """The items, and a description of the file's shape: "" for a JSON list or JSONL.

    Raises:
        UserError: as `read_raw`, but not for shapes that can be read.
    """
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"There is no data file {path}.",
            "Give an Alpaca-format JSON or JSONL file, for example data/seed_tasks.jsonl.",
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder.", "Give the JSON or JSONL file in it.") from None
    _check_kind(path, raw)
    text = _decode(path, raw)
    try:
        items, shape = _parse(path, text)
    except _TooLongError:
        found = re.search(rf"\d{{{MAX_DIGITS + 1},}}", text)
        where = text.count("\n", 0, found.start()) + 1 if found else 1
        digits = len(found[0]) if found else MAX_DIGITS + 1
        raise UserError(
            f"{path}, line {where}: a number of {digits:,} digits.",
            "Write it as text, in quotes, or remove its key.",
        ) from None
    except RecursionError:
        raise _nested(path) from None
    if _too_deep(items):
        raise _nested(path)
    return items, shape


def _nested(path: Path) -> UserError:
    return UserError(
        f"{path}: lists or objects are nested more than {MAX_DEPTH} deep.",
        'Each record is {"instruction": text, "input": text, "output": text}.',
    )


# ---- kind of file, by its first bytes

TABLE = (
    'python -c "import pandas, sys; pandas.{reader}(sys.argv[1]).to_json(sys.argv[2], '
    "orient='records', lines=True, force_ascii=False)\" {old} {new}"
)
# first bytes: (description, suffix of the file to make, command that makes it)
MAGIC = {
    b"\x1f\x8b": ("compressed with gzip", "", "gzip -dc {old} > {new}"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "", "zstd -dc {old} > {new}"),
    b"\xfd7zXZ\x00": ("compressed with xz", "", "xz -dc {old} > {new}"),
    b"BZh": ("compressed with bzip2", "", "bzip2 -dc {old} > {new}"),
    b"PAR1": ("a Parquet table", ".jsonl", TABLE.replace("{reader}", "read_parquet")),
    b"ARROW1": ("an Arrow table", ".jsonl", TABLE.replace("{reader}", "read_feather")),
    b"SQLite format 3\x00": (
        "an SQLite database", ".json", "sqlite3 -json {old} 'SELECT * FROM table' > {new}"),
    b"\xff\xfe\x00\x00": ("text in UTF-32", ".json", "iconv -f UTF-32 -t UTF-8 {old} > {new}"),
    b"\x00\x00\xfe\xff": ("text in UTF-32", ".json", "iconv -f UTF-32 -t UTF-8 {old} > {new}"),
    b"\xff\xfe": ("text in UTF-16", ".json", "iconv -f UTF-16 -t UTF-8 {old} > {new}"),
    b"\xfe\xff": ("text in UTF-16", ".json", "iconv -f UTF-16 -t UTF-8 {old} > {new}"),
    b"[\x00": ("text in UTF-16", ".json", "iconv -f UTF-16LE -t UTF-8 {old} > {new}"),
    b"{\x00": ("text in UTF-16", ".json", "iconv -f UTF-16LE -t UTF-8 {old} > {new}"),
    b"\x00[": ("text in UTF-16", ".json", "iconv -f UTF-16BE -t UTF-8 {old} > {new}"),
    b"\x00{": ("text in UTF-16", ".json", "iconv -f UTF-16BE -t UTF-8 {old} > {new}"),
}  # fmt: skip
PANDAS = " (after `pip install pandas {0}`)"
PACKAGES = {"read_parquet": "pyarrow", "read_feather": "pyarrow", "read_excel": "openpyxl"}


def _check_kind(path: Path, raw: bytes) -> None:
    """Raise UserError if the first bytes are those of another kind of file."""
    for magic, (what, suffix, command) in MAGIC.items():
        if raw.startswith(magic):
            raise _other_kind(path, what, suffix, command)
    if raw.startswith(b"PK\x03\x04"):
        raise _zip(path)
    if raw.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(
            f"{path} is a Git LFS pointer: the data itself was not downloaded.",
            "In its repository: git lfs install && git lfs pull",
        )
    if re.match(rb"(?:\xef\xbb\xbf)?\s*<", raw):
        raise UserError(
            f"{path} is an HTML or XML page.",
            "Download the file, not the page that shows it: the address with /raw/ for /blob/ on "
            "GitHub, with /resolve/ for /blob/ on the Hugging Face hub.",
        )
    if raw and not raw.strip(b"\x00"):
        raise UserError(f"{path} holds zero bytes only.", "Copy or download it again.")
    if b"\x00" in raw[:1000] or raw.startswith((b"%PDF", b"\x89PNG", b"\x80\x02", b"\x80\x04")):
        raise UserError(
            f"{path} is a binary file: it begins with {raw[:12]!r}.",
            "A data set is a JSON list of objects, or one object per line (JSONL), in UTF-8.",
        )


def _other_kind(path: Path, what: str, suffix: str, command: str) -> UserError:
    reader = next((name for name in PACKAGES if name in command), None)
    needs = PANDAS.format(PACKAGES[reader]) if reader else ""
    return UserError(
        f"{path} is {what}.", f"Convert it to JSON{needs}:\n    {_filled(command, path, suffix)}"
    )


def _zip(path: Path) -> UserError:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return UserError(f"{path} is a truncated zip archive.", "Download it again.")
    if any(name.startswith("xl/") for name in names):
        command = TABLE.replace("{reader}", "read_excel")
        return _other_kind(path, "an Excel workbook (XLSX)", ".jsonl", command)
    inside = next((name for name in names if name.endswith((".json", ".jsonl"))), None)
    if inside is None:
        shown = ", ".join(names[:5])
        return UserError(
            f"{path} is a zip archive of {shown}.", "It contains no JSON or JSONL file."
        )
    command = f"unzip -p {{old}} {shlex.quote(inside)} > {{new}}"
    return _other_kind(path, "a zip archive", Path(inside).suffix, command)


def _filled(command: str, path: Path, suffix: str) -> str:
    """Fill the names of this file and of a new file, which does not exist yet, into a command."""
    new = path.with_suffix(suffix)
    if not new.suffix:
        new = path.with_suffix(".json")
    if new.exists():
        new = new.with_stem(f"{new.stem}.utf8" if "iconv" in command else f"{new.stem}.plain")
    named = {"{old}": shlex.quote(str(path)), "{new}": shlex.quote(str(new))}
    return re.sub(r"\{(?:old|new)\}", lambda found: named[found[0]], command)


# ---- text

LEGACY = ("GB18030", "CP1252", "LATIN1")


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, raw, error) from None


def _not_utf8(path: Path, raw: bytes, error: UnicodeDecodeError) -> UserError:
    """An error that shows the first non-UTF-8 line in common encodings and proposes one."""
    at, line = error.start, raw.count(b"\n", 0, error.start) + 1
    if error.end == len(raw) and error.reason == "unexpected end of data":
        return UserError(
            f"{path} ends in the middle of a character.",
            "It may have been cut off: download it again.",
        )
    lenient = raw.decode("utf-8-sig", "replace")
    wrong = lenient.count("\ufffd") - raw.count(b"\xef\xbf\xbd")
    right = sum(not letter.isascii() for letter in lenient) - lenient.count("\ufffd")
    if right > 10 * wrong:
        return UserError(
            f"{path} is UTF-8 except for {wrong} byte(s), the first in line {line}, byte {at}.",
            "Fix that line in an editor; it may come from a file in another encoding.",
        )
    read = {name: text for name in LEGACY if (text := _in(name, raw)) is not None}
    shown = [f"{name:<8}{_around(raw, at, name)}" for name in read]
    best = _likeliest(read)
    command = _filled(f"iconv -f {best} -t UTF-8 {{old}} > {{new}}", path, path.suffix)
    return UserError(
        f"{path} is not UTF-8: byte {at}, in line {line}. Decoded as\n    " + "\n    ".join(shown),
        f"{best} is the most likely; if none reads right, try others (`iconv -l`):\n    {command}",
    )


def _in(encoding: str, raw: bytes) -> str | None:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return None


def _likeliest(read: dict[str, str]) -> str:
    """GB18030 if the text decodes to common Chinese, else CP1252, or LATIN1 if CP1252 fails.

    In Western text, a non-ASCII byte usually stands alone. Read as GB18030 together with the ASCII
    byte after it, it becomes a rare character.
    """
    foreign = [letter for letter in read.get("GB18030", "") if not letter.isascii()]
    common = sum(_encodes(letter, "gb2312") for letter in foreign)
    if common > 0.8 * max(1, len(foreign)):
        return "GB18030"
    return "CP1252" if "CP1252" in read else "LATIN1"


def _encodes(letter: str, encoding: str) -> bool:
    try:
        letter.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _around(raw: bytes, at: int, encoding: str, width: int = 30) -> str:
    """The text around a byte, within its line."""
    start = raw.rfind(b"\n", 0, at) + 1
    end = raw.find(b"\n", at)
    before = raw[max(start, at - 4 * width) : at].decode(encoding, "replace")[-width:]
    after = raw[at : len(raw) if end < 0 else end].decode(encoding, "replace")[:width]
    return "".join(letter if letter.isprintable() else "?" for letter in before + after)


# ---- JSON


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    seen = [key for key, _ in pairs]
    repeated = DuplicateKeys(made)
    repeated.duplicate = next(key for key in seen if seen.count(key) > 1)
    return repeated


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _TooLongError
    return int(text)


def _decoder(*, strict: bool) -> json.JSONDecoder:
    return json.JSONDecoder(
        strict=strict, parse_float=Spelled, parse_int=_integer, object_pairs_hook=_object
    )


STRICT, LENIENT = _decoder(strict=True), _decoder(strict=False)
# a string, or a comma before a closing bracket
TRAILING = re.compile(r'("(?:[^"\\]|\\.)*+")|,(?=\s*[\]}])')
GAP = re.compile(r"[\s,]*")


def _parse(path: Path, text: str) -> tuple[list[Any], str]:
    """The items and the shape of a JSON text."""
    if not text.strip():
        return [], ""
    if text.lstrip()[0] not in '[{"':
        raise _not_json(path, text)
    whole = text.lstrip().startswith("[")
    failed: UserError
    try:
        items, shape = (STRICT.decode(text), "") if whole else (_lines(path, text), "")
    except json.JSONDecodeError as error:
        failed = _broken(path, text, error)
    except UserError as error:
        failed = error
    else:
        return _unwrapped(path, items, shape)
    values, shape = _values(text)
    if not values:
        raise failed
    if len(values) == 1 and isinstance(values[0], list):
        return _unwrapped(path, values[0], shape)
    if len(values) > 1:
        kind = next(
            (
                name
                for kind, name in ((list, "lists"), (dict, "objects"))
                if all(isinstance(value, kind) for value in values)
            ),
            "values",
        )
        several = f"{len(values)} {kind} one after another"
        several += ", not one per line" if kind == "objects" else ""
        shape = f"{several}; {shape}" if shape else several
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return _unwrapped(path, items, shape or "one object spread over several lines")


def _values(text: str) -> tuple[list[Any], str]:
    """The consecutive JSON values of a text, and what is unusual about it; empty if it has none."""
    cleaned = TRAILING.sub(lambda found: found[1] or "", text)
    comma = "a comma after the last record or field" if cleaned != text else ""
    for decoder, unusual in ((STRICT, ""), (LENIENT, "line breaks inside texts")):
        found: list[Any] = []
        try:
            at = _gap(cleaned, 0)
            while at < len(cleaned):
                value, end = decoder.raw_decode(cleaned, at)
                found.append(value)
                at = _gap(cleaned, end)
        except json.JSONDecodeError:
            continue
        return found, "; ".join(filter(None, (comma, unusual)))
    return _python_literal(text)


def _gap(text: str, at: int) -> int:
    found = GAP.match(text, at)
    assert found is not None
    return found.end()


def _python_literal(text: str) -> tuple[list[Any], str]:
    if len(text) > MAX_LITERAL:
        return [], ""
    for pieces in ([text], text.strip().split("\n")):
        try:
            with warnings.catch_warnings(action="ignore"):
                return [ast.literal_eval(piece.strip()) for piece in pieces], (
                    "Python's spelling, not JSON's"
                )
        except (ValueError, SyntaxError, TypeError, MemoryError):
            continue
    return [], ""


def _broken(path: Path, text: str, error: json.JSONDecodeError) -> UserError:
    message = f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
    if error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated"):
        return UserError(f"{message}, where the file ends.", "The download may have been cut off.")
    near = text[max(0, error.pos - 30) : error.pos + 30]
    return UserError(f"{message}, near {near!r}.", "Fix it there in an editor.")


def _lines(path: Path, text: str) -> list[Any]:
    items, problems = [], []
    # Only \n ends a line: str.splitlines would also split at U+2028 inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            items.append(STRICT.decode(line))
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: {error.msg} at column {error.colno}")
    if problems:
        shown = problems[:MAX_LISTED] if len(items) >= len(problems) else problems[:1]
        more = len(problems) - len(shown)
        listed = "\n    ".join([*shown, *([f"... and {more:,} more"] if more else [])])
        raise UserError(
            f"{path}: {len(problems)} line(s) are not JSON:\n    {listed}",
            "A data file is a JSON list of objects, or one object per line (JSONL).",
        )
    return items


def _not_json(path: Path, text: str) -> UserError:
    """The error for a CSV table, or for a text that is neither JSON nor CSV."""
    first = text.lstrip().split("\n", 1)[0]
    for delimiter in ",;\t|":
        header = [name.strip().lower() for name in next(csv.reader([first], delimiter=delimiter))]
        if len(header) > 1 and set(header) & COLUMNS:
            more = "" if delimiter == "," else f", delimiter={delimiter!r}"
            return _other_kind(
                path,
                "a table of comma-separated values (CSV)",
                ".jsonl",
                (
                    'python -c "import csv, json, sys; csv.field_size_limit(1 << 30); '
                    "rows = csv.DictReader(open(sys.argv[1], encoding='utf-8-sig', newline='')"
                    f"{more}); print(*map(json.dumps, rows), sep='\\n')\" {{old}} > {{new}}"
                ),
            )
    return UserError(
        f"{path} is not JSON: it begins with {first[:60]!r}.",
        "A data set is a JSON list of objects, or one object per line (JSONL).",
    )


ONE_LIST = (
    'python -c "import json, sys; json.dump(json.load(open(sys.argv[1], encoding='
    "'utf-8-sig'))[sys.argv[3]], open(sys.argv[2], 'w'))\" {old} {new}"
)
TURN = {"role", "from", "content"}  # keys of a conversation's turn
COLUMNS = {*FIELDS, "prompt", "question", "answer", "response", "completion", "text", "context"}


def _unwrapped(path: Path, items: list[Any], shape: str) -> tuple[list[Any], str]:
    """Extract records from an enclosing object, columns, rows, or strings of JSON."""
    if items and all(isinstance(item, str) and item.lstrip()[:1] in ("{", "[") for item in items):
        try:
            read = [STRICT.decode(item) for item in items]
        except json.JSONDecodeError:
            return items, shape
        flat = [item for value in read for item in (value if isinstance(value, list) else [value])]
        return _unwrapped(path, flat, "each record is a text that holds JSON (encoded twice)")
    if len(items) > 1 and all(isinstance(item, list) for item in items):
        flat = [item for inner in items for item in inner]
        if flat and all(isinstance(item, dict) for item in flat):
            return flat, shape or "a list of lists"
    if items and all(
        isinstance(item, dict) and isinstance(item.get("row"), dict) for item in items
    ):
        return [item["row"] for item in items], "each record is under the key 'row'"
    if len(items) == 1 and isinstance(items[0], dict) and not isinstance(items[0], DuplicateKeys):
        return _inside(path, items[0]) or (items, shape)
    return items, shape


def _inside(path: Path, whole: dict[str, Any]) -> tuple[list[Any], str] | None:
    """The records inside one object; None if the object is itself a record."""
    columns = {*whole} & COLUMNS
    values = list(whole.values())
    if columns and all(isinstance(value, dict) for value in values):
        rows = {row: None for value in values for row in value}
        return [
            {name: value[row] for name, value in whole.items() if row in value} for row in rows
        ], "an object of columns, not of records"
    if columns and all(isinstance(value, list) and not _are_turns(value) for value in values):
        if len({len(value) for value in values}) == 1:
            records = [dict(zip(whole, row, strict=True)) for row in zip(*values, strict=True)]
            return records, "an object of columns, not of records"
        return None
    if any(isinstance(whole.get(name), str) for name in COLUMNS):
        return None
    lists = {
        name: value
        for name, value in whole.items()
        if isinstance(value, list)
        and value
        and all(isinstance(item, dict) for item in value)
        and not _are_turns(value)
    }
    if len(lists) == 1:
        [(name, inside)] = lists.items()
        inside, shape = _unwrapped(path, inside, "")
        return inside, shape or f"the records are inside an object, under the key {name!r}"
    if lists:
        counts = ", ".join(f"{name} ({len(value):,})" for name, value in lists.items())
        first = next(iter(lists))
        what = f"an object with several lists of records: {counts}"
        raise _other_kind(path, what, f".{first}.json", f"{ONE_LIST} {shlex.quote(first)}")
    if len(values) > 1 and all(isinstance(value, dict) and {*value} & COLUMNS for value in values):
        return values, "an object with a record under each key"
    return None


def _are_turns(value: list[Any]) -> bool:
    """Whether a list holds the turns of one conversation."""
    return bool(value) and isinstance(value[0], dict) and bool({*value[0]} & TURN)


def _too_deep(items: list[Any]) -> bool:
    level = [item for item in items if isinstance(item, dict | list)]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
