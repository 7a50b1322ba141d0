"""`python -m alpaca diversity`: right verbs, a plot that answers the pointer, equal files."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from marked_verbs import MARKED

from alpaca.cli import main
from alpaca.dataset import verbs
from alpaca.dataset.figures import Diversity, nearest_scores
from alpaca.dataset.page import page
from alpaca.dataset.rings import arcs, pairs
from alpaca.dataset.verbs import Asked, find_model, parse_all, request_of

SEEDS = Path(__file__).resolve().parent.parent / "data" / "seed_tasks.jsonl"
TEXTS = [text for text, _, _ in MARKED]


def diversity(data: Path, *flags: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["diversity", str(data), *map(str, flags)])
    return int(ended.value.code or 0)


@pytest.fixture(scope="session")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "marked.json"
    path.write_text(json.dumps([{"instruction": text, "output": "x"} for text in TEXTS]))
    return path


@pytest.fixture(scope="session")
def parsed() -> list[Asked]:
    return parse_all(TEXTS, find_model())


def test_nine_in_ten_verbs_and_objects_are_those_marked_by_hand(parsed: list[Asked]) -> None:
    marks = [Asked(verb, noun) for _, verb, noun in MARKED]
    assert len(marks) == 60
    right = sum(found == mark for found, mark in zip(parsed, marks, strict=True))
    assert right >= 54, [pair for pair in zip(parsed, marks, strict=True) if pair[0] != pair[1]]


def test_two_processes_find_what_one_finds(parsed: list[Asked]) -> None:
    many = TEXTS * 9  # more than one batch
    done: list[int] = []
    assert parse_all(many, find_model(), done.append, processes=2) == parsed * 9
    assert sum(done) == len(many)
    assert len(done) == 2


def test_what_is_quoted_or_follows_is_not_the_request() -> None:
    assert request_of('Edit this sentence: "The cat is scared."') == "Edit this sentence"
    assert request_of("Rewrite “I have seen it all before” politely.") == "Rewrite this politely."
    assert request_of("\nRe-write the text.\nIt was late: nobody came.") == "Rewrite the text."
    assert request_of('Explain "force majeure" simply.') == 'Explain "force majeure" simply.'
    assert request_of("") == ""


def test_strange_instructions_do_not_stop_the_parse() -> None:
    strange = ["", "?", "***", "ไทย", "a" * 5000, '"', "...", "🙂 🙂", "List", "\x00"]
    assert len(parse_all(strange, find_model())) == len(strange)


pair = st.builds(Asked, st.sampled_from("abcdefg"), st.sampled_from(["", "x", "y", "z", "u", "v"]))


@given(st.lists(pair, max_size=80))
def test_rings_share_the_circle_by_count(asked: list[Asked]) -> None:
    counts = pairs(asked)
    found = arcs(counts, verbs=5, objects=2)
    inner = [arc for arc in found if arc.ring == 0]
    outer = [arc for arc in found if arc.ring == 1]
    assert len(inner) == min(5, len({item.verb for item in counts}))
    assert sum(arc.count for arc in inner) == sum(arc.count for arc in outer)
    total = sum(arc.count for arc in inner)
    for ring in (inner, outer):
        at = 0.0
        for arc in ring:
            assert arc.start == pytest.approx(at)
            assert arc.end - arc.start == pytest.approx(arc.count / total)
            at = arc.end
        assert not ring or at == pytest.approx(1)
    for arc in outer:
        if arc.object:
            assert arc.count == counts[Asked(arc.verb, arc.object)]
    assert [arc.count for arc in inner] == sorted((arc.count for arc in inner), reverse=True)


def test_the_table_holds_every_instruction_that_parses(
    marked: Path, parsed: list[Asked], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.csv"
    assert diversity(marked, "-o", tmp_path / "plot.svg", "--csv", table) == 0
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    read = {Asked(row["verb"], row["object"]): int(row["count"]) for row in rows}
    assert read == dict(Counter(item for item in parsed if item.verb))
    said = capsys.readouterr().out
    assert "60 instructions" in said
    assert find_model() in said


@pytest.mark.parametrize(("form", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_pictures_are_the_same_bytes_again(
    form: str, magic: bytes, marked: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        diversity(marked, "--compare", SEEDS, "-o", tmp_path / f"{name}.{form}")
    first = (tmp_path / f"a.{form}").read_bytes()
    assert first.startswith(magic)
    assert first == (tmp_path / f"b.{form}").read_bytes()


def test_mistakes_are_named(
    marked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert diversity(marked, "-o", tmp_path / "plot.pdf") == 2
    assert ".html, .png, .svg" in capsys.readouterr().err
    assert diversity(marked, "-o", tmp_path / "a.svg", "--spacy_model", "en_core_web_xl") == 2
    assert "python -m spacy download en_core_web_xl" in capsys.readouterr().err
    empty = tmp_path / "empty.json"
    empty.write_text('[{"output": "x"}]')
    assert diversity(empty, "-o", tmp_path / "a.svg") == 2
    assert not list(tmp_path.glob("*.svg"))


def test_nearest_scores_leave_the_instruction_itself_out() -> None:
    texts = ["sort the list", "sort the list", "name a river now", "sort a list"]
    assert nearest_scores(texts, 10) == [1, 1, pytest.approx(2 / 7), pytest.approx(2 / 3)]
    assert nearest_scores(texts, 2) == nearest_scores(texts, 2)
    assert nearest_scores(["alone"], 5) == []


def test_a_data_set_cannot_end_the_script_or_add_elements() -> None:
    evil = "</script><script>alert(1)</script><img src=x>"
    data = Diversity(evil, [evil], [Asked("<b>", "<i>")], [])
    text = page([data], "model")
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img" not in text
    assert "<b>" not in text


def test_the_plot_answers_the_pointer_and_loads_nothing(
    browser: Any, marked: Path, parsed: list[Asked], tmp_path: Path
) -> None:
    html = tmp_path / "plot.html"
    diversity(marked, "--compare", SEEDS, "-o", html)
    shown = browser.new_page(viewport={"width": 1500, "height": 1300})
    asked_for, errors = [], []
    shown.on("request", lambda request: asked_for.append(request.url))
    shown.on("pageerror", lambda error: errors.append(str(error)))
    shown.goto(html.as_uri())
    left = shown.locator("section").first
    rings = arcs(pairs(parsed))
    assert left.locator("path[data-arc]").count() == len(rings)
    verb = rings[0].verb
    arc = left.locator('path[data-arc="0"]')
    arc.hover()
    assert left.locator(".hole").first.text_content() == verb
    assert left.locator(".hole").last.text_content().startswith(f"{rings[0].count} (")
    arc.click()
    items = left.locator(".examples li")
    expected = [
        t for t, found in zip(TEXTS, parsed, strict=True) if found.verb == verb and found.object
    ]
    assert len(expected) == rings[0].count > 1
    assert items.all_text_contents() == expected
    assert not shown.locator("section").last.locator(".examples li").count()
    screenshot = shown.screenshot(path=tmp_path / "plot.png")
    assert len(screenshot) > 50_000  # a blank page is a tenth of that
    assert asked_for == [html.as_uri()]
    assert errors == []
    shown.close()


def test_the_model_found_is_an_installed_one() -> None:
    import spacy

    assert find_model() in spacy.util.get_installed_models()
    assert verbs.model_version(find_model()).split()[1][0].isdigit()
