"""`python -m alpaca audit`: every planted defect at its index, and nothing on sound records."""

import contextlib
import io
import json
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import LCSseq

from alpaca.cli import main
from alpaca.dataset.findings import FIELDS, MEANINGS
from alpaca.dataset.near import WORD, near_duplicates

SEEDS = Path(__file__).resolve().parent.parent / "data" / "seed_tasks.jsonl"
SURROGATE = "\ud83d"

# (checks that must find it, what is changed in a sound record)
PLANTED: list[tuple[set[str], Any]] = [
    ({"invalid"}, "just a string"),
    ({"invalid"}, {"output": None}),
    ({"invalid"}, {"output": ["seven"]}),
    ({"invalid"}, {"output": " \n"}),
    ({"unread_key"}, {"context": "The river was high that year."}),
    ({"unread_key"}, {"label": False}),
    ({"invalid"}, {"instruction": SURROGATE}),
    ({"empty_instruction"}, {"instruction": " \n"}),
    ({"empty_output"}, {"output": ""}),
    ({"placeholder"}, {"output": "<nooutput>"}),
    ({"placeholder"}, {"output": "N/A"}),
    ({"placeholder"}, {"output": "..."}),
    ({"placeholder"}, {"output": "Dear [Your Name], thank you for coming."}),
    ({"placeholder"}, {"input": "<noinput>"}),
    ({"placeholder"}, {"output": "I am {{name}}, an assistant developed by {{author}}."}),
    ({"placeholder"}, {"output": "I was built by AUTHOR, and my name is NAME."}),
    ({"placeholder"}, {"output": "Dear [NAME], the parcel is on its way."}),
    ({"thinking"}, {"output": "<think>\nThey ask for seven.\n</think>\nSeven."}),
    ({"thinking"}, {"output": "They ask for seven.\n</think>\n\nSeven."}),
    ({"refusal"}, {"output": "I'm sorry, but I can't help with that."}),
    ({"refusal"}, {"output": "As an AI language model, I have no favourite."}),
    ({"refusal"}, {"output": "I’m unable to browse the internet."}),
    ({"leaked_template"}, {"output": "Seven.\n\n### Instruction:\nName a river."}),
    ({"leaked_template"}, {"output": "Seven.<|im_end|>"}),
    ({"leaked_template"}, {"input": "[INST] count the words [/INST] please"}),
    ({"encoding"}, {"output": "The caf\ufffd is open."}),
    ({"encoding"}, {"output": "The cafÃ© is open, itâ€™s small."}),
    ({"encoding"}, {"output": "Seven\x00 rivers."}),
    ({"missing_input"}, {"instruction": "Rewrite the following sentence in the past tense"}),
    ({"missing_input"}, {"instruction": "Who speaks in the paragraph below and why?"}),
    ({"repeated_text"}, {"output": "COPY instruction"}),
    ({"repeated_text"}, {"input": "COPY instruction"}),
    ({"merged_fields"}, {"instruction": "Count the words.\nInput: one two three"}),
    ({"merged_fields"}, {"output": "Output: seven"}),
    ({"language"}, {"instruction": "Écris une lettre polie à ton voisin pour l'inviter à dîner."}),
    ({"exact_duplicate"}, "REPEAT exactly"),
    ({"near_duplicate"}, "REPEAT nearly"),
]


def seeds() -> list[dict[str, str]]:
    return [{field: task[field] for field in FIELDS} for task in lines(SEEDS)]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def planted() -> tuple[list[Any], dict[int, set[str]]]:
    """The seed tasks with one defect at every sixth place, and what must be found where."""
    records: list[Any] = seeds()
    expected = {}
    for number, (checks, change) in enumerate(PLANTED):
        at = 6 * number + 3
        expected[at] = checks
        sound = records[at]
        if change == "REPEAT exactly":
            records[at] = records[0] | {"output": "Something else."}
        elif change == "REPEAT nearly":
            records[1] = sound | {"instruction": "List ten ways to save water in a small flat, now"}
            records[at] = sound | {
                "instruction": "List ten ways to save water in a large flat, now"
            }
            records[1]["input"] = records[at]["input"] = ""
        elif isinstance(change, str):
            records[at] = change
        else:
            copied = {
                key: sound["instruction"] if str(value).startswith("COPY") else value
                for key, value in change.items()
            }
            records[at] = sound | {"input": ""} | copied
    return records, expected


def audit(data: Path, *flags: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(data), *map(str, flags)])
    return int(ended.value.code or 0)


def write(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    return write(tmp_path / "flawed.json", planted()[0])


def test_every_planted_defect_is_found_where_it_is(
    flawed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit(flawed, "--json") == 0
    found: dict[int, set[str]] = {}
    for finding in json.loads(capsys.readouterr().out)["findings"]:
        found.setdefault(finding["index"], set()).add(finding["check"])
    assert found == planted()[1]
    token_checks = {"truncated", "eos_cut"}
    assert {check for checks in found.values() for check in checks} == {*MEANINGS} - token_checks


SOUND = [
    {"instruction": "Write a Jinja page.", "output": "```html\n<h1>{{ title }}</h1>\n```"},
    {"instruction": "Greet the user in Vue.", "output": "<p>Hello, {{ name }}!</p>"},
    {"instruction": "Shorten: Dear {{name}}, thank you.", "output": "Thanks, {{name}}."},
    {"instruction": "Show an SQL table.", "output": "CREATE TABLE people (NAME TEXT, AUTHOR TEXT)"},
    {"instruction": "Typeset the fraction.", "output": r"\frac{{a+1}}{{b}}"},
    {"instruction": "What does <think> mark in a reply?", "output": "<think> opens a thought."},
    {"instruction": "Count the labels.", "output": "Two", "id": 1, "label": "positive"},
]


def test_answers_that_are_about_such_marks_are_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit(write(tmp_path / "sound.json", SOUND), "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["findings"] == []
    assert report["notices"] == ["of 7 records, keys that are not read: id (1), label (1)"]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from([SURROGATE, "9" * 400, "<think>", "{{name}}", "\x00", "1e400", 10**300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
keys = st.sampled_from(["instruction", "input", "output", "context", "label", SURROGATE, "a\nb"])


@settings(max_examples=15)
@given(items=st.lists(st.dictionaries(keys, values) | values, min_size=1, max_size=30))
def test_the_audit_of_anything_ends_in_a_report_or_a_sentence(
    items: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    data = write(folder / "d.json", items)
    extra = ["--html", folder / "r.html", "--write-clean", folder / "c.json"]
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")):
        code = audit(data, *extra, "--leave_out", "language")
    assert code in (0, 2)
    if code == 0:
        assert (folder / "r.html").read_text(encoding="utf-8").endswith("</html>\n")
        assert json.loads((folder / "c.json").read_text(encoding="utf-8"))


def test_nothing_is_found_on_the_seed_tasks(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    audit(SEEDS, "--json", "--tokenizer", str(tiny_model), "--max_length", "2000")
    report = json.loads(capsys.readouterr().out)
    assert report["findings"] == []
    assert report["records"] == 240
    assert report["lengths"]["tokens"]["median"] > 50
    audit(SEEDS)
    assert "no findings" in capsys.readouterr().out


def test_what_would_be_cut_is_found_to_the_token(
    tmp_path: Path, tiny_model: Path, bpe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from alpaca.records import Record
    from alpaca.tokens import Codec

    base = {"instruction": "Count upwards for a while.", "output": "one"}
    length = len(Codec(bpe).examples([Record(**base)], 10_000)[0].ids)
    data = write(tmp_path / "long.json", [base])
    found = {}
    for limit in (length + 1, length, length - 1, length - 2):
        audit(data, "--json", "--tokenizer", str(tiny_model), "--max_length", str(limit))
        found[limit - length] = json.loads(capsys.readouterr().out)["counts"]
    both = {"truncated": 1, "eos_cut": 1}
    assert found == {1: {}, 0: {}, -1: {"eos_cut": 1}, -2: both}


def test_the_clean_copy_lacks_the_chosen_findings_and_nothing_else(
    flawed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, (records, expected) = flawed.read_bytes(), planted()
    clean = tmp_path / "clean.json"
    audit(flawed, "--write-clean", str(clean), "--leave_out", "refusal,invalid")
    gone = {index for index, checks in expected.items() if checks & {"refusal", "invalid"}}
    left = [record for index, record in enumerate(records) if index not in gone]
    assert json.loads(clean.read_text()) == left
    listed = lines(tmp_path / "clean.left_out.jsonl")
    assert {item["index"] for item in listed} == gone
    assert all(item["reasons"] and item["record"] == records[item["index"]] for item in listed)
    audit(flawed, "--write-clean", str(clean))
    capsys.readouterr()
    audit(clean, "--json")
    assert json.loads(capsys.readouterr().out)["findings"] == []
    assert flawed.read_bytes() == before


def test_jsonl_stays_jsonl_with_all_its_keys(tmp_path: Path) -> None:
    clean = tmp_path / "clean.jsonl"
    audit(SEEDS, "--write-clean", str(clean))
    assert lines(clean) == lines(SEEDS)


class Page(HTMLParser):
    """Collects what a page would load from elsewhere, and counts its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.loads += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href")]


def test_the_html_report_is_one_file_with_plots_and_escaped_examples(tmp_path: Path) -> None:
    records, _ = planted()
    records[0]["output"] = "<script>alert(1)</script> ### Response:\n<script>"
    records[0]["output"] += "\n### Response: x"
    html = tmp_path / "report.html"
    audit(write(tmp_path / "d.json", records), "--html", str(html))
    text = html.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.loads == []
    assert "script" not in page.counts
    assert page.counts["svg"] == 5
    assert page.counts["rect"] > 50
    assert "leaked_template" in text


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "d.json", seeds())
    assert audit(data, "--write-clean", str(data)) == 2
    assert "the data set itself" in capsys.readouterr().err
    assert audit(data, "--near", "0.1") == 2
    assert audit(tmp_path / "none.json") == 2
    assert audit(write(tmp_path / "e.json", []), "--json") == 2
    assert audit(data, "--leave_out", "nonsense") == 2
    assert "unknown check: nonsense" in capsys.readouterr().err


words = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=14).map(" ".join)


@given(st.lists(words, max_size=12), st.sampled_from([0.5, 0.7, 0.9, 1.0]))
def test_near_duplicates_are_those_of_a_plain_comparison_of_all(
    texts: list[str], threshold: float
) -> None:
    expected: dict[int, float] = {}
    for index, text in enumerate(texts):
        mine = WORD.findall(text)
        scores = [
            2 * LCSseq.similarity(mine, theirs) / (len(mine) + len(theirs))
            for other in range(index)
            if other not in expected
            for theirs in [WORD.findall(texts[other])]
        ]
        if scores and max(scores) >= threshold - 1e-12:
            expected[index] = max(scores)
    found = {near.index: near.score for near in near_duplicates(texts, set(), threshold)}
    assert found == expected


def test_near_duplicates_hold_on_longer_texts() -> None:
    rng = random.Random(3)
    base = [" ".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=40)) for _ in range(30)]
    changed = [" ".join(["x", *text.split()[2:]]) for text in base]
    found = list(near_duplicates(base + changed, set()))
    assert [(near.index, near.other) for near in found] == [(30 + n, n) for n in range(30)]
