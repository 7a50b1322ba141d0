"""Reading data sets: what is accepted, and that every mistake is named."""

import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca.cli import main
from alpaca.errors import UserError
from alpaca.records import Record, read_records

GOOD = {"instruction": "Say hi.", "input": "", "output": "hi"}
filled = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
records = st.builds(
    Record,
    instruction=filled,
    input=st.text(st.characters(exclude_categories=["Cs"])),
    output=st.just("") | filled,
)


def write(folder: Path, content: str | bytes, name: str = "data.json") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@given(st.lists(records, min_size=1, max_size=5))
def test_json_and_jsonl_read_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, items: list[Record]
) -> None:
    folder = tmp_path_factory.mktemp("data")
    dumped = [item.model_dump() for item in items]
    whole = write(folder, json.dumps(dumped, ensure_ascii=False))
    lines = write(folder, "\n".join(json.dumps(d, ensure_ascii=False) for d in dumped), "d.jsonl")
    assert read_records(whole) == read_records(lines) == items


def test_byte_order_mark_and_missing_input_are_tolerated(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + json.dumps([{"instruction": "Hi", "output": "ho"}]).encode()
    assert read_records(write(tmp_path, content)) == [Record(instruction="Hi", output="ho")]


def test_the_command_that_an_error_shows_leaves_out_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = [{**GOOD, "instruction": " "}, {**GOOD, "output": "\n"}, {**GOOD, "output": None}, GOOD]
    write(tmp_path, json.dumps(bad), "mine.json")
    with pytest.raises(UserError) as caught:
        read_records(Path("mine.json"))
    words = shlex.split(str(caught.value).splitlines()[-1])
    assert words[:3] == ["python", "-m", "alpaca"]
    with pytest.raises(SystemExit) as ended:
        main(words[3:])
    assert not ended.value.code
    assert read_records(Path("clean.json")) == [Record(**GOOD)]


def test_every_bad_record_is_named_with_index_field_and_reason(tmp_path: Path) -> None:
    bad = [
        GOOD,
        {"instruction": "No output"},
        {**GOOD, "output": "  "},
        {**GOOD, "input": None},
        {**GOOD, "instruction": 7},
        "text",
        {**GOOD, "output": "\ud800"},
    ]
    with pytest.raises(UserError) as caught:
        read_records(write(tmp_path, json.dumps(bad)))
    message = str(caught.value)
    assert "6 problem(s) in 7 records" in message
    for expected in (
        "record 1: output: Field required",
        "record 2: output: is empty",
        "record 3: input: Input should be a valid string",
        "record 4: instruction: Input should be a valid string",
        "record 5: record: Input should be",
        "record 6: output: holds half of a surrogate pair",
    ):
        assert expected in message
    assert "record 0" not in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", "holds no records"),
        ("", "holds no records"),
        ('[{"instruction": "a"', "not valid JSON"),
        ('{"instruction": "a"\n{"b": 1}', "line 1"),
        (b"\xff\xfe[]", "not UTF-8"),
    ],
)
def test_unusable_files_are_explained(tmp_path: Path, content: str | bytes, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        read_records(write(tmp_path, content))


def test_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data file .*\n.*data/seed_tasks\.jsonl"):
        read_records(tmp_path / "none.json")


def test_unicode_line_separators_do_not_split_a_jsonl_record(tmp_path: Path) -> None:
    record = {**GOOD, "output": "one\u2028two\x85three"}
    path = write(tmp_path, json.dumps(record, ensure_ascii=False))
    assert read_records(path)[0].output == record["output"]
