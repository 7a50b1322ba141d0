"""AlpacaEval annotation files: read, checked, written back with every key."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alpaca.errors import UserError
from alpaca.evaluation.annotations import Annotation, by_generator, read, write

ENTRY: dict[str, Any] = {
    "instruction": "Name a river.",
    "output_1": "The Nile",
    "generator_1": "baseline",
    "dataset": "own",
    "output_2": "L'Amazone é largo",
    "generator_2": "model",
    "annotator": "judge",
    "preference": 1.25,
}


def saved(folder: Path, content: Any) -> Path:
    path = folder / "annotations.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def told(folder: Path, content: Any) -> str:
    path = saved(folder, content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in caught.value.happened
    assert "generator_1" in caught.value.remedy
    return caught.value.happened.removeprefix(str(path))


def test_what_is_read_is_written_back_with_unknown_keys(tmp_path: Path) -> None:
    more = {"price_per_example": 0.001, "raw_completion": {"logprobs": [1, None]}, "datasplit": "x"}
    entries = [ENTRY | more, ENTRY | {"preference": None, "output_2": ""}]
    found = read(saved(tmp_path, entries))
    assert found[0].extra == more
    assert found[0].preference == 1.25
    write(tmp_path / "copy.json", found)
    assert json.loads((tmp_path / "copy.json").read_text()) == entries
    assert read(tmp_path / "copy.json") == found


def test_zero_is_a_tie_and_null_no_verdict(tmp_path: Path) -> None:
    values = [0, 0.0, 1, 2, 1.5, None, 1.999]
    found = read(saved(tmp_path, [ENTRY | {"preference": value} for value in values]))
    assert [one.preference for one in found] == [1.5, 1.5, 1.0, 2.0, 1.5, None, 1.999]


def test_an_absent_dataset_stays_absent_and_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    entry = {key: value for key, value in ENTRY.items() if key != "dataset"}
    path = saved(tmp_path, "\ufeff" + json.dumps([entry]))
    found = read(path)
    assert found[0].dataset is None
    write(path, found)
    assert json.loads(path.read_text()) == [entry]
    assert read(saved(tmp_path, "[]")) == []


def test_any_text_survives(tmp_path: Path) -> None:
    texts = ["café 😀 ไทย", "half a pair: \ud83d", 'tab\tquote"\\ud83d line\n\u2028']
    kept = [Annotation(text, "a", "b", text, "m", "j", 2.0) for text in texts]
    write(tmp_path / "a.json", kept)
    assert read(tmp_path / "a.json") == kept
    assert "café 😀 ไทย" in (tmp_path / "a.json").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preference": 3}, "entry 1 has a preference of 3, outside 1 to 2"),
        ({"preference": 0.5}, "entry 1 has a preference of 0.5, outside"),
        ({"preference": -1}, "entry 1 has a preference of -1, outside"),
        ({"preference": float("nan")}, "entry 1 has a preference of nan, outside"),
        ({"preference": float("inf")}, "entry 1 has a preference of inf, outside"),
        ({"preference": 10**400}, "entry 1 has a preference of 1000"),
        ({"preference": "2"}, "entry 1 has a text as preference, not a number"),
        ({"preference": True}, "entry 1 has a true or false as preference"),
        ({"output_2": None}, "entry 1 has a null as output_2, not a text"),
        ({"dataset": 3}, "entry 1 has a number as dataset"),
    ],
)
def test_a_wrong_value_is_refused_with_its_entry(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    assert message in told(tmp_path, [ENTRY, ENTRY | change])


def test_a_wrong_file_is_refused(tmp_path: Path) -> None:
    assert "is not JSON" in told(tmp_path, "[{")
    assert "is not JSON" in told(tmp_path, "")
    assert "one JSON object, not a list" in told(tmp_path, ENTRY)
    assert "one JSON null, not a list" in told(tmp_path, "null")
    assert "entry 0 is a text, not an object" in told(tmp_path, ["x"])
    assert "entry 0 lacks output_1, annotator, preference" in told(
        tmp_path,
        [{k: ENTRY[k] for k in ENTRY if k not in ("output_1", "annotator", "preference")}],
    )
    (tmp_path / "latin").write_bytes(b'[{"instruction": "\xe9"}]')
    for path, message in (
        (tmp_path / "latin", "not UTF-8"),
        (tmp_path / "absent", "no annotation file"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(UserError, match=message):
            read(path)


def test_nothing_is_written_if_an_entry_is_wrong(tmp_path: Path) -> None:
    good = Annotation("i", "a", "b", "c", "m", "j", 1.0)
    path = tmp_path / "annotations.json"
    write(path, [good])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"entry 1 has a preference of 2\.5"):
        write(path, [good, replace(good, preference=2.5)])
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["annotations.json"]


def test_generators_and_judges_are_not_mixed_unless_asked() -> None:
    one = Annotation("i", "a", "base", "c", "m1", "judge 1", 1.0)
    pair, judge = replace(one, generator_2="m2"), replace(one, annotator="judge 2")
    assert by_generator([one, one]) == {("base", "m1"): [one, one]}
    assert by_generator([]) == {}
    with pytest.raises(UserError, match="2 annotators \\(judge 1, judge 2\\)"):
        by_generator([one, judge])
    with pytest.raises(UserError, match="base against m1, base against m2"):
        by_generator([one, pair])
    with pytest.raises(UserError, match="annotators"):
        by_generator([one, pair, judge], several_pairs=True)
    groups = by_generator([one, pair, judge], several_pairs=True, several_judges=True)
    assert groups == {("base", "m1"): [one, judge], ("base", "m2"): [pair]}


def test_a_long_list_of_names_is_shortened() -> None:
    many = [Annotation("i", "a", "b", "c", "m", f"judge {number}", 1.0) for number in range(9)]
    with pytest.raises(UserError, match="judge 4 and 4 more"):
        by_generator(many)
