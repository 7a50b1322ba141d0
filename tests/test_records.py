"""Reading data sets: what is accepted, and that every mistake is named."""

import json
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_runs import ROOT, train
from transformers import PreTrainedTokenizerBase

from alpaca.cli import main
from alpaca.errors import UserError
from alpaca.recipe.corpus import open_corpus
from alpaca.records import Record, named, read_records
from alpaca.tokens import Codec

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
    dumped = [asdict(item) for item in items]
    whole = write(folder, json.dumps(dumped, ensure_ascii=False))
    lines = write(folder, "\n".join(json.dumps(d, ensure_ascii=False) for d in dumped), "d.jsonl")
    assert read_records(whole) == read_records(lines) == items


def test_byte_order_mark_and_missing_input_are_tolerated(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + json.dumps([{"instruction": "Hi", "output": "ho"}]).encode()
    assert read_records(write(tmp_path, content)) == [Record(instruction="Hi", output="ho")]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_records(path)
    return str(caught.value)


def proposed(message: str) -> list[list[str]]:
    """The arguments of every `python -m alpaca` command that a message proposes."""
    commands = [shlex.split(line) for line in message.splitlines() if "python -m alpaca" in line]
    return [words[3:] for words in commands]


def run(words: list[str]) -> list[Record]:
    """Run an audit as proposed, here, and read the copy that it writes."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code
    return read_records(Path(words[-1]))


BAD = [
    {**GOOD, "instruction": " "},
    {**GOOD, "output": "\n"},
    {**GOOD, "output": None},
    {**GOOD, "output": float("nan")},
    {**GOOD, "input": ["a"]},
    "text",
]


def test_the_cleaning_command_leaves_out_what_is_wrong_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sound = [GOOD, {**GOOD, "output": ""}, {**GOOD, "output": 5}, {**GOOD, "input": None}]
    write(tmp_path, json.dumps(BAD + sound), "my data.json")
    [command] = proposed(refusal(Path("my data.json")))
    assert run(command) == [
        Record(**GOOD),
        Record(**GOOD | {"output": ""}),
        Record(**GOOD | {"output": "5"}),
        Record(**GOOD),
    ]


def test_no_cleaning_is_proposed_that_would_leave_nothing(tmp_path: Path) -> None:
    assert not proposed(refusal(write(tmp_path, json.dumps(BAD[1:4]))))


def test_every_bad_record_is_named_with_index_field_and_reason(tmp_path: Path) -> None:
    bad = [
        GOOD,
        {"instruction": "No output"},
        {**GOOD, "output": "  "},
        {**GOOD, "input": {"a": 1}},
        {**GOOD, "instruction": None},
        "text",
        {**GOOD, "output": "\ud800"},
        {**GOOD, "output": float("inf")},
    ]
    message = refusal(write(tmp_path, json.dumps(bad)))
    assert "7 problem(s) in 8 records" in message
    for expected in (
        "record 1: output: is missing",
        "record 2: output: is empty",
        "record 3: input: is an object, not text",
        "record 4: instruction: is null, not text",
        "record 5: is a text, not an object",
        "record 6: output: holds half of a surrogate pair",
        "record 7: output: is Infinity, not text",
    ):
        assert expected in message
    assert "record 0" not in message


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    twice = '{"instruction": "Say hi.", "output": "hi", "output": "ho"}'
    message = refusal(write(tmp_path, f"[{json.dumps(GOOD)}, {twice}]"))
    assert "record 1: output: occurs more than once" in message


@pytest.mark.parametrize("nothing", ["null", "NaN", '""'])
def test_an_input_of_null_or_nan_is_trained_on_as_no_input(
    nothing: str, tmp_path: Path, bpe: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path, f'[{{"instruction": "Say one.", "input": {nothing}, "output": "one"}}]')
    codec = Codec(bpe)
    corpus = open_corpus(path, codec, tmp_path / "cache", 512)
    [expected] = codec.examples([Record(instruction="Say one.", output="one")], 512)
    assert corpus.example(0).tolist() == expected.ids
    assert (corpus.kinds.tolist(), corpus.notices) == ([0], ())


@pytest.mark.parametrize(
    ("spelled", "text"),
    [("5", "5"), ("true", "true"), ("false", "false"), ("1.10", "1.10"), ("-0.5e3", "-0.5e3"),
     ("0", "0"), ("12345678901234567890123", "12345678901234567890123")],
)  # fmt: skip
def test_numbers_and_booleans_are_text_as_the_file_spells_them_and_said_once(
    spelled: str, text: str, tmp_path: Path
) -> None:
    record = f'{{"instruction": "Add.", "input": {spelled}, "output": {spelled}}}'
    said: list[str] = []
    path = write(tmp_path, f"[{record}, {record}]")
    expected = Record(instruction="Add.", input=text, output=text)
    assert read_records(path, said.append) == [expected] * 2
    assert said == [f"{path}: numbers and booleans are read as text: input (2), output (2)"]


# ---- keys that are not read


HARMLESS = {
    "id": 7, "idx": "a1", "source": "books", "category": "qa", "url": "http://127.0.0.1/x",
    "score": 0.5, "model": "m", "text": "Below is ... Say hi. ... hi", "kind": "x",
    "instruction_id": 3, "output_tokens": 12, "language": "en",
    "history": [], "system": "", "context": None, "images": [], "label": True,
    "prompt": "Below is an instruction. ### Instruction: Say hi. ### Response:",
}  # fmt: skip


def test_keys_that_change_nothing_are_named_once_with_their_counts(tmp_path: Path) -> None:
    said: list[str] = []
    path = write(tmp_path, json.dumps([GOOD | HARMLESS, GOOD, GOOD | {"id": 8}]))
    assert read_records(path, said.append) == [Record(**GOOD)] * 3
    [notice] = said
    assert notice.startswith(f"{path}: of 3 records, keys that are not read: id (2), idx (1)")
    assert notice.endswith("and 6 more")


KEYS = {
    "context": ("context", "It rained.", {"input": "It rained."}),
    "capital": ("Input", "It rained.", {"input": "It rained."}),
    "spaced": (" input", "It rained.", {"input": "It rained."}),
    "misspelt": ("imput", "It rained.", {"input": "It rained."}),
    "plural": ("inputs", "It rained.", {"input": "It rained."}),
    "question": ("question", "When did it rain?", {"input": "When did it rain?"}),
    "history": ("history", [["Name one.", "Red."]], {}),
    "system": ("system", "One word.", {}),
    "system_prompt": ("system_prompt", "One word.", {}),
    "second output": ("output_2", "ho", {}),
    "rejected": ("rejected", "go away", {}),
    "images": ("images", ["a.png"], {}),
    "tools": ("tools", [{"name": "f"}], {}),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_key_that_changes_the_meaning_is_refused_and_the_remedies_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, value, read = KEYS[name]
    monkeypatch.chdir(tmp_path)
    record = {"instruction": "Say when.", "input": "", "output": "On Monday."}
    data = [record | {key: value}, record]
    message = refusal(write(tmp_path, json.dumps(data), "mine.json").relative_to(tmp_path))
    assert f"{named(key)} (1 of 2 records, first record 0): " in message
    first, second = proposed(message)
    assert run(first) == [Record(**record | read), Record(**record)]
    assert run(second) == [Record(**record)]


@pytest.mark.parametrize("verdict", [False, 0, -1, "false", "Rejected"])
@pytest.mark.parametrize("key", ["label", "kto_tag", "is_correct"])
def test_a_rejected_answer_is_not_trained_as_a_good_one(
    key: str, verdict: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bad, good = {**GOOD, "output": "Go away.", key: verdict}, {**GOOD, key: True}
    message = refusal(write(tmp_path, json.dumps([bad, good]), "d.json").relative_to(tmp_path))
    assert f"{key} (1 of 2 records, first record 0): " in message
    command, dropping = proposed(message)
    assert run(command) == [Record(**GOOD)]
    assert f"--drop {key}" in " ".join(dropping)


def test_a_label_that_is_the_answer_rejects_nothing(tmp_path: Path) -> None:
    item = {"instruction": "Is it wet?", "input": "", "output": "No", "label": "no"}
    assert read_records(write(tmp_path, json.dumps([item])))[0].output == "No"


def test_a_context_that_the_record_holds_already_is_no_loss(tmp_path: Path) -> None:
    item = {"instruction": "Who sang?", "input": "Ann  sang.", "output": "Ann"}
    given = item | {"context": "Ann sang.", "question": "Who sang?"}
    assert read_records(write(tmp_path, json.dumps([given]))) == [Record(**item)]


def test_a_key_is_never_read_over_another_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, json.dumps([{**GOOD, "input": "a", "context": "b"}]))
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(path), "--rename", "context=input"])
    assert ended.value.code == 2
    assert "1 record(s) have both keys (first: 0)" in capsys.readouterr().err


# ---- records of another form


FORMS: list[tuple[Any, str, Record | None]] = [
    ({"question": "Hi", "answer": "Hello"}, "question/answer records",
     Record(instruction="Hi", output="Hello")),
    ({"prompt": "Hi", "completion": "Hello"}, "prompt/completion records",
     Record(instruction="Hi", output="Hello")),
    ({"Instruction": "Hi", "Input": "x", "Output": "Hello"}, "Instruction/Input/Output records",
     Record(instruction="Hi", input="x", output="Hello")),
    ({"instruction": "Hi", "context": "x", "response": "Hello", "category": "qa"},
     "context/response records", Record(instruction="Hi", input="x", output="Hello")),
    ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, "preference pairs",
     Record(instruction="Hi", output="Hello")),
    ({"messages": [{"role": "user", "content": "Hi"}]}, "conversations (under 'messages')", None),
    ({"id": "x", "conversations": [{"from": "human", "value": "Hi"}]},
     "conversations (under 'conversations')", None),
    ({"text": "Below is ... ### Response: x"}, "whole texts (under 'text')", None),
    ({"title": "a", "body": "b"}, "another data set, without instruction and output", None),
    ({"instruction": "Pick.", "output": ["chosen", "rejected"]}, "have a list as output", None),
    ("just text", "are not objects", None),
]  # fmt: skip


@pytest.mark.parametrize(("record", "form", "read"), FORMS, ids=[form for _, form, _ in FORMS])
@pytest.mark.parametrize("count", [1, 60])
def test_records_of_another_form_get_one_message_that_names_it(
    record: Any,
    form: str,
    read: Record | None,
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "\n".join([json.dumps(record)] * count)
    message = refusal(write(tmp_path, lines, "d.jsonl").relative_to(tmp_path))
    assert form in message
    assert f"{count} of {count} records" in message
    assert len(message.splitlines()) <= 3
    if read is not None:
        [command] = proposed(message)
        assert run(command) == [read] * count


def test_a_few_records_of_another_form_are_listed_by_index(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, json.dumps([GOOD, GOOD, {"instruction": "Hi"}])))
    assert "record 2: output: is missing" in message


def test_the_documented_program_makes_records_of_conversations(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    program = page.partition("```python\n")[2].partition("```")[0]
    asked, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    chat = write(tmp_path, json.dumps({"messages": [asked, said]}), "a.jsonl")
    pairs = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    turns = [{"conversations": pairs}, {"conversations": pairs * 2}]
    share = write(tmp_path, json.dumps(turns), "b.json")
    for path in (chat, share):
        done = subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
        )
        made = write(tmp_path, done.stdout, "made.jsonl")
        assert read_records(made) == [Record(instruction="Hi", output="Hello")]
    assert done.stderr == "left out: human, gpt, human, gpt\n"


def test_training_refuses_what_changes_the_meaning_and_says_what_it_does_not_read(
    tmp_path: Path, tiny_model: Path
) -> None:
    flags = [
        "--model_name_or_path",
        str(tiny_model),
        "--output_dir",
        str(tmp_path / "out"),
        "--max_steps",
        "1",
        "--save_strategy",
        "no",
        "--per_device_train_batch_size",
        "1",
        "--gradient_accumulation_steps",
        "1",
    ]
    bad = write(tmp_path, json.dumps([{**GOOD, "label": False}, GOOD]), "bad.json")
    done = train(*flags, "--data_path", bad)
    assert done.returncode == 2
    assert "label (1 of 2 records" in done.stderr
    good = write(tmp_path, json.dumps([{**GOOD, "id": 1}, {**GOOD, "output": 5}]), "good.json")
    for _ in range(2):  # the second run finds the tokens, and says it all the same
        done = train(*flags, "--data_path", good, "--overwrite_output_dir")
        assert done.returncode == 0, done.stderr
        (tmp_path / "out" / "passport.json").unlink()
        assert "keys that are not read: id (1)" in done.stdout
        assert "numbers and booleans are read as text: output (1)" in done.stdout


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", "holds no records"),
        ("", "holds no records"),
        ('[{"instruction": "a"', "not valid JSON"),
        ('{"instruction": "a"\n{"b": 1}', "line 1"),
        (b"\xff\xfe[]", "UTF-16"),
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


def test_a_class_that_looks_like_a_verdict_is_told_how_to_be_dropped(tmp_path: Path) -> None:
    items = [
        {"instruction": "Which?", "input": "t", "output": name, "label": number}
        for number, name in enumerate(("negative", "positive"))
    ]
    path = write(tmp_path, json.dumps(items), "classes.json")
    with pytest.raises(UserError, match="If label is a class, not a verdict") as refused:
        read_records(path)
    assert "--drop label" in str(refused.value).rpartition("not a verdict")[2]


def test_a_text_that_the_answer_holds_is_not_asked_about(tmp_path: Path) -> None:
    items = [{"instruction": "Print 0.", "output": "Here:\nprint(0)", "code": "print(0)"}]
    path = write(tmp_path, json.dumps(items), "code.json")
    assert [record.input for record in read_records(path)] == [""]


@pytest.mark.parametrize(
    "key", ["chat_history", "previous_turns", "ctx", "input_text", "image_path"]
)
def test_other_spellings_of_what_changes_the_meaning_are_refused(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, json.dumps([{**GOOD, key: "It rained all of last week."}]), "one.json")
    with pytest.raises(UserError, match=key):
        read_records(path)
