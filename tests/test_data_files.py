"""What a data file may be other than a list or JSONL: each is named, and the remedy works on it."""

import contextlib
import gzip
import io
import json
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca.cli import main
from alpaca.datafile import read_any
from alpaca.errors import UserError
from alpaca.records import Record, read_records

ONE = {"instruction": "Say one.", "input": "", "output": "one"}
TWO = {"instruction": "Say two, twice.", "input": "", "output": "two\ntwo"}
BOTH = [Record(**ONE), Record(**TWO)]
SMALL = json.dumps([ONE, TWO])


def write(folder: Path, content: str | bytes, name: str = "mine.json") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_records(path)
    return str(caught.value)


def shell(message: str, folder: Path) -> Path:
    """Run the command in a message's last line, and return the file that it makes."""
    command = message.splitlines()[-1].strip()
    before = {*folder.iterdir()}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-ec", command], cwd=folder, check=True, env={"PATH": path})
    [made] = {*folder.iterdir()} - before
    return made


# ---- JSON in the wrong shape


def pretty(value: object) -> str:
    return json.dumps(value, indent=2)


SHAPES = {
    "trailing comma": (f"[{json.dumps(ONE)},\n{json.dumps(TWO)},\n]", "a comma after the last"),
    "comma in a record": (SMALL.replace("}", ",}"), "a comma after the last"),
    "two lists": (f"[{json.dumps(ONE)}]\n[{json.dumps(TWO)}]", "2 lists one after another"),
    "pretty objects": (f"{pretty(ONE)}\n{pretty(TWO)}\n", "2 objects one after another"),
    "objects with commas": (f"{pretty(ONE)},\n{pretty(TWO)}", "2 objects one after another"),
    "lines with commas": (
        f"{json.dumps(ONE)},\n{json.dumps(TWO)},\n", "2 objects one after another"),
    "objects without a line end": (json.dumps(ONE) + json.dumps(TWO), "2 objects one after"),
    "wrapped": (pretty({"version": "1.0", "data": [ONE, TWO]}), "under the key 'data'"),
    "wrapped in a line": (json.dumps({"train": [ONE, TWO]}), "under the key 'train'"),
    "viewer": (json.dumps({"features": [], "rows": [{"row_idx": 0, "row": ONE}, {"row": TWO}]}),
               "under the key 'row'"),
    "columns": (
        json.dumps({name: {"0": ONE[name], "1": TWO[name]} for name in ONE}), "of columns"),
    "columns of lists": (json.dumps({name: [ONE[name], TWO[name]] for name in ONE}), "of columns"),
    "by index": (json.dumps({"0": ONE, "1": TWO}), "a record under each key"),
    "lists in a list": (json.dumps([[ONE], [TWO]]), "a list of lists"),
    "encoded twice": (json.dumps(SMALL), "encoded twice"),
    "lines encoded twice": (
        "\n".join(json.dumps(json.dumps(item)) for item in (ONE, TWO)), "encoded twice"),
    "Python": (repr([ONE, TWO]), "Python's spelling"),
    "lines of Python": (f"{ONE!r}\n{TWO!r}", "Python's spelling"),
    "raw line ends": (SMALL.replace("\\n", "\n"), "line breaks inside texts"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_json_in_another_shape_is_named_once_and_the_proposed_command_writes_it_as_a_list(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, shape = SHAPES[name]
    monkeypatch.chdir(tmp_path)
    message = refusal(write(tmp_path, text).relative_to(tmp_path))
    assert shape in message
    assert len(message.splitlines()) == 3
    words = shlex.split(message.splitlines()[-1])
    with pytest.raises(SystemExit) as ended:
        main(words[3:])
    assert not ended.value.code
    assert shape in capsys.readouterr().out  # the audit says it, too
    assert read_records(Path("clean.json")) == BOTH


def test_one_pretty_printed_record_is_read_by_the_audit(tmp_path: Path) -> None:
    path = write(tmp_path, pretty(ONE))
    assert "one object spread over several lines" in refusal(path)
    assert read_any(path)[0] == [ONE]


def test_one_of_several_lists_is_taken_by_name(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, json.dumps({"train": [ONE, TWO], "test": [ONE]})))
    assert "several lists of records: train (2), test (1)" in message
    made = shell(message, tmp_path)
    assert (made.name, read_records(made)) == ("mine.train.json", BOTH)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SMALL[:-10], "where the file ends.\n  The download may have been cut off."),
        (SMALL[:-1], "The download may have been cut off"),
        (SMALL.replace('"output"', "output"), "near '"),
        (pretty(ONE)[:-20] + "\n" + pretty(TWO), "line(s) are not JSON:\n    line 1: "),
    ],
)
def test_broken_json_says_where(text: str, expected: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path, text))
    assert expected in message
    assert len(message.splitlines()) < 5


def test_numbers_without_end_and_deep_nesting_are_sentences_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = json.dumps([ONE]).replace("}", ', "id": ' + "9" * 5000 + "}")
    nested = json.dumps([ONE]).replace("}", ', "id": ' + "[" * 150 + "]" * 150 + "}")
    for text, expected in (
        (long, "line 1: a number of 5,000 digits"),
        ("{}\n" + long[1:-1], "line 2: a number of 5,000 digits"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 100 deep"),
        (nested, "nested more than 100 deep"),
        (f'{{"instruction": {"[" * 100_000}', "nested more than 100 deep"),
    ):
        path = write(tmp_path, text)
        assert expected in refusal(path)
        for command in (["audit"], ["diversity", "-o", "x.svg"]):
            with pytest.raises(SystemExit) as ended:
                main([command[0], str(path), *command[1:]])
            assert ended.value.code == 2
            assert expected in capsys.readouterr().err


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["instruction", "input", "output", "data", "a"]), inner)
    ),
    max_leaves=12,
)


@given(json_values, st.booleans(), st.text(alphabet='[]{},:"\n a1', max_size=6))
def test_any_json_is_read_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, value: object, indent: bool, more: str
) -> None:
    path = write(
        tmp_path_factory.mktemp("any"), json.dumps(value, indent=1 if indent else None) + more
    )
    with contextlib.suppress(UserError):
        assert read_records(path, lambda notice: None)


# ---- other kinds of file


def zipped(**files: str) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), text)
    return made.getvalue()


def compressed(program: str) -> bytes:
    return subprocess.run([program, "-c"], input=SMALL.encode(), capture_output=True).stdout


def table(separator: str) -> str:
    said = '"Say two, twice."' if separator == "," else "Say two, twice."
    rows = [[*ONE], [*ONE.values()], [said, "", '"two\ntwo"']]
    return "".join(separator.join(row) + "\n" for row in rows)


READABLE = {
    "gzip": ("mine.json.gz", gzip.compress(SMALL.encode()), "compressed with gzip"),
    "gzip by another name": ("mine.json", gzip.compress(SMALL.encode()), "compressed with gzip"),
    "zstd": ("mine.jsonl.zst", compressed("zstd"), "compressed with zstd"),
    "xz": ("mine.json.xz", compressed("xz"), "compressed with xz"),
    "bzip2": ("mine.json.bz2", compressed("bzip2"), "compressed with bzip2"),
    "zip": ("mine.zip", zipped(a_txt="no", data__a_json=SMALL), "a zip archive"),
    "UTF-16": ("mine.json", SMALL.encode("utf-16"), "text in UTF-16"),
    "UTF-16 without mark": ("mine.json", SMALL.encode("utf-16-le"), "text in UTF-16"),
    "UTF-16, the other way": ("mine.json", SMALL.encode("utf-16-be"), "text in UTF-16"),
    "UTF-32": ("mine.json", SMALL.encode("utf-32"), "text in UTF-32"),
    "CSV": ("mine.csv", table(",").encode(), "comma-separated values (CSV)"),
    "CSV with a mark": ("mine.csv", b"\xef\xbb\xbf" + table(",").encode(), "values (CSV)"),
    "semicolons": ("mine file.csv", table(";").encode(), "comma-separated values (CSV)"),
    "tabs": ("mine.tsv", table("\t").encode(), "comma-separated values (CSV)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", READABLE)
def test_other_kinds_of_file_are_told_by_their_content_and_the_command_makes_json(
    kind: str, tmp_path: Path
) -> None:
    name, content, what = READABLE[kind]
    message = refusal(write(tmp_path, content, name))
    assert f"{name} is " in message
    assert what in message
    assert read_records(shell(message, tmp_path)) == BOTH


@pytest.mark.parametrize(
    ("content", "what", "remedy"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
         "a Git LFS pointer", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "an HTML or XML page", "/resolve/"),
        (b"PAR1\x15\x04\x15\xff", "a Parquet table", "pandas.read_parquet(sys.argv[1])"),
        (b"ARROW1\x00\x00", "an Arrow table", "pandas.read_feather(sys.argv[1])"),
        (zipped(xl__workbook_xml="x"), "an Excel workbook", "pip install pandas openpyxl"),
        (zipped(a_txt="x"), "a zip archive of a.txt", "contains no JSON"),
        (b"PK\x03\x04abc", "a truncated zip archive", "again"),
        (b"SQLite format 3\x00abc", "an SQLite database", "sqlite3 -json"),
        (b"\x00" * 4096, "zero bytes only", "again"),
        (b"%PDF-1.4", "a binary file", "JSON"),
        (b"404: Not Found", "begins with '404: Not Found'", "JSON"),
        (b"- instruction: Say one.", "is not JSON", "JSON"),
    ],
)  # fmt: skip
def test_what_cannot_be_data_as_it_is_says_what_it_is(
    content: bytes, what: str, remedy: str, tmp_path: Path
) -> None:
    message = refusal(write(tmp_path, content, "data.json"))
    assert what in message
    assert remedy in message.splitlines()[-1] + message.splitlines()[1]


# ---- text that is not UTF-8

CHINESE, FRENCH = "请把下面的句子翻译成英文。", "Où est l’été ? À côté d’un cœur."


@pytest.mark.parametrize(
    ("said", "encoding", "proposed"),
    [
        (CHINESE, "gb18030", "GB18030"),
        (CHINESE, "gbk", "GB18030"),
        (FRENCH, "cp1252", "CP1252"),
        ("Grüße aus Köln, wo die Bäume blühen.", "latin1", "CP1252"),  # the same bytes in both
        ("Een el\x81 groot", "latin1", "LATIN1"),  # a byte that CP1252 does not have
    ],
)
def test_the_likeliest_encoding_is_proposed_with_a_line_of_each(
    said: str, encoding: str, proposed: str, tmp_path: Path
) -> None:
    item = {"instruction": said, "input": "", "output": "yes"}
    text = json.dumps([ONE, item], ensure_ascii=False, indent=1)
    message = refusal(write(tmp_path, text.encode(encoding)))
    assert "in line 8. Decoded as\n" in message
    lines = [line for line in message.splitlines() if line.startswith("    ")]
    shown = dict(line.split(None, 1) for line in lines)
    assert said[:20].replace("\x81", "?") in shown[proposed]
    assert f"{proposed} is the most likely" in message
    made = shell(message, tmp_path)
    assert read_records(made)[1].instruction == said


def test_a_few_wrong_bytes_and_a_cut_character_are_no_other_encoding(tmp_path: Path) -> None:
    whole = json.dumps([{"instruction": CHINESE, "output": "x"}], ensure_ascii=False).encode()
    message = refusal(write(tmp_path, whole.replace("翻".encode(), b"\xff")))
    assert "UTF-8 except for 1 byte(s), the first in line 1" in message
    message = refusal(write(tmp_path, whole[: whole.index("句".encode()) + 2]))
    assert "ends in the middle of a character" in message
