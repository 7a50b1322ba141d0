"""Alpaca-format examples: one `Record`, read from JSON or JSONL.

A data set with mistakes is refused whole, with every mistake listed: training on the part that
happens to parse is how shifted fields end up in models unnoticed. An output of "" is no mistake:
the published data set has some, and the recipe trains on them (on the EOS alone).
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from alpaca.errors import UserError

MAX_LISTED = 50


class Record(BaseModel):
    """One example: what is asked, the text it is asked about, the answer; the last two may be "".

    Other keys (`id`, `kind`, `text` ...) are common in such files and are not read.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    instruction: str
    input: str = ""
    output: str

    @field_validator("instruction")
    @classmethod
    def _asks(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("is empty")
        return text

    @field_validator("output")
    @classmethod
    def _not_blank(cls, text: str) -> str:
        if text and not text.strip():
            raise ValueError("is empty but for white space")
        return text

    @field_validator("instruction", "input", "output")
    @classmethod
    def _encodable(cls, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("holds half of a surrogate pair, which is not text") from error
        return text


def read_records(path: Path) -> list[Record]:
    """Read a data set: a JSON list, or JSONL with one object a line; UTF-8, a BOM is tolerated.

    Raises:
        UserError: no such file, not UTF-8, not JSON, no records, or bad records: all of them are
            counted, and the first 50 are listed with index, field and reason.
    """
    raw = read_raw(path)
    records, problems = [], []
    for index, item in enumerate(raw):
        try:
            records.append(Record.model_validate(item))
        except ValidationError as error:
            problems += [f"record {index}: {problem}" for problem in _reasons(error)]
    if problems:
        listed = "\n    ".join(problems[:MAX_LISTED])
        more = len(problems) - MAX_LISTED
        listed += f"\n    ... and {more} more" if more > 0 else ""
        raise UserError(
            f"{path}: {len(problems)} problem(s) in {len(raw)} records:\n    {listed}",
            'Each record is {"instruction": str, "input": str, "output": str}; '
            "indices count from 0. Mend the records named, or write a copy without them:\n    "
            f"python -m alpaca audit {path} --leave_out invalid,empty_instruction,empty_output "
            f"--write-clean {path.with_stem('clean').name}",
        )
    if not records:
        raise UserError(f"{path} holds no records.", "Give it at least one example.")
    return records


def _reasons(error: ValidationError) -> list[str]:
    return [
        f"{'.'.join(str(part) for part in detail['loc']) or 'record'}: "
        f"{detail['msg'].removeprefix('Value error, ')}"
        for detail in error.errors()
    ]


def read_raw(path: Path) -> list[Any]:
    """The items of a JSON list or JSONL file as they stand, whatever they are.

    Raises:
        UserError: no such file, not UTF-8, or not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"There is no data file {path}.",
            "Name an Alpaca-format JSON or JSONL file; data/seed_tasks.jsonl is one to try.",
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder.", "Name the JSON or JSONL file in it.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte {error.start} ({error.reason}).",
            "Convert it first, for example: iconv -f latin1 -t utf-8 OLD > NEW",
        ) from None
    if text.lstrip().startswith("["):
        return _parse_json(path, text)
    return _parse_jsonl(path, text)


def _parse_json(path: Path, text: str) -> list[Any]:
    try:
        value: list[Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}.",
            "Was it cut off while being downloaded?",
        ) from None
    return value


def _parse_jsonl(path: Path, text: str) -> list[Any]:
    items, problems = [], []
    # Only \n ends a line: str.splitlines would also split at U+2028 inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            items.append(json.loads(line))
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: {error.msg} at column {error.colno}")
    if problems:
        listed = "\n    ".join(problems[:MAX_LISTED])
        raise UserError(
            f"{path}: {len(problems)} line(s) are not JSON:\n    {listed}",
            "A data file is a JSON list of objects, or one object a line (JSONL).",
        )
    return items
