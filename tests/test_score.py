"""`score`: measures worked out by hand, in the table, as JSON and on a page."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alpaca.cli import main
from alpaca.errors import UserError
from alpaca.evaluation import checks, suites
from alpaca.evaluation import outputs as files
from alpaca.evaluation.measures import difference, measure, plain, repetition
from alpaca.evaluation.outputs import Output
from alpaca.evaluation.suites import Task, keyed

ROOT = Path(__file__).resolve().parent.parent
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
TOO_WIDE = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
SUITE: list[dict[str, Any]] = [
    {"instruction": "Capital of France?", "output": "Paris", "answers": ["Paris"], "kind": "fact"},
    {"instruction": "Half of ten?", "output": "5", "answers": ["5", "five"], "kind": "fact"},
    {"instruction": "Shout.", "output": "HEY", "kind": "form",
     "instruction_id_list": ["change_case:english_capital", "punctuation:no_comma"],
     "kwargs": [{}, {}]},
    {"instruction": "Tell me a story.", "output": "Once.", "kind": "open"},
]  # fmt: skip
# generator, then outputs and the sums of the references' losses, of 1, 1, 1 and 7 tokens
ANSWERS: dict[str, tuple[list[str], list[float]]] = {
    "base": (["**Paris**", "-5", "HEY, YOU", "word " * 9], [1.0, 2.0, 3.0, 7.0]),
    "tuned": (["The capital is Lyon.", "five", "HELLO THERE MY FRIEND", ""], [0.5, 1.0, 1.5, 3.5]),
}
TOKENS = [1, 1, 1, 7]


def written(path: Path, items: list[Any]) -> Path:
    path.write_text(json.dumps(items))
    return path


def entries(generator: str, name: str = "") -> list[dict[str, Any]]:
    texts, losses = ANSWERS[generator]
    return [
        {
            "instruction": task["instruction"], "input": "", "output": text, "dataset": "d",
            "generator": name or generator, "kind": task["kind"], "tokens": 9,
            "finish_reason": "length" if text.startswith("word") else "stop",
            "reference_loss": loss, "reference_tokens": count,
        }
        for task, text, loss, count in zip(SUITE, texts, losses, TOKENS, strict=True)
    ]  # fmt: skip


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    return written(tmp_path / "suite.json", SUITE)


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [written(tmp_path / f"{name}.json", entries(name)) for name in ANSWERS]


def score(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["score", *map(str, arguments)])
    return int(ended.value.code or 0)


def followed(task: Task, output: str) -> checks.Followed:
    found = checks.verified(task, output)
    assert found is not None
    return found


def checking(name: str, **kwargs: Any) -> Task:
    return Task(instruction="Do it.", checks=((name, kwargs),))


# ---- measures


@pytest.mark.parametrize(
    ("output", "answers", "right"),
    [
        ("Paris.", ["paris"], True),
        ("**Paris**", ["Paris"], True),
        (' "Paris" ', ["Paris"], True),
        ("“Paris”!", ["PARIS"], True),
        ("New\n York", ["new york"], True),
        ("-5", ["5"], False),
        ("-5", ["-5."], True),
        ("5%", ["5"], False),
        ("Paris, France", ["Paris"], False),
        ("", ["Paris"], False),
        ("", ["..."], False),
        ("...", ["..."], True),
        ("...", ["?"], False),
        ("(B)", ["B", "(B)"], True),
    ],
)
def test_an_answer_matches_without_case_quotes_emphasis_and_end(
    output: str, answers: list[str], right: bool
) -> None:
    assert checks.matches(output, answers) is right


def test_repeated_four_grams_are_counted() -> None:
    assert repetition(["a", "b", "c", "d"]) == 0
    assert repetition(["a", "b", "c"]) == 0
    assert repetition([]) == 0
    assert repetition(["word"] * 9) == pytest.approx(5 / 6)  # six, of which one is new
    assert repetition(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)


def test_plain_measures() -> None:
    def of(text: str, finish: str | None) -> dict[str, float]:
        return plain(Output(Task("Do."), text, "m", finish_reason=finish))

    assert of(" \n", "stop") == {"empty": 1, "words": 0, "repetition": 0, "unfinished": 0}
    assert of("two words", "length")["unfinished"] == 1
    assert of("two words", None) == {"empty": 0, "words": 2, "repetition": 0}
    assert of("", "refused: no")["unfinished"] == 0


def test_checks_are_ifevals() -> None:
    """By the definitions in the paper's table; the references of our own suite follow theirs."""
    for task in suites.read(suites.OURS):
        if task.checks:
            assert all(followed(task, task.reference or "").strict), task.instruction
    commas = checking("punctuation:no_comma")
    assert followed(commas, "one two").strict == (True,)
    assert followed(commas, "one, two").strict == (False,)
    bullets = checking("detectable_format:number_bullet_lists", num_bullets=2)
    assert followed(bullets, "* a\n* b").strict == (True,)
    assert followed(bullets, "* a\n* b\n* c").strict == (False,)
    # loosely, also without the first or last line
    shout = checking("change_case:english_capital")
    assert followed(shout, "Sure:\nTHIS IS LOUD").strict == (False,)
    assert followed(shout, "Sure:\nTHIS IS LOUD").loose == (True,)
    words = checking("length_constraints:number_words", num_words=3, relation="less than")
    assert [followed(words, text).strict[0] for text in ("a b", "a b c")] == [True, False]
    both = Task("Do.", checks=(*commas.checks, *words.checks))
    assert followed(both, "a, b") == checks.Followed((False, True), (False, True))
    assert followed(both, "") == checks.Followed((False, False), (False, False))


def test_an_answer_that_a_check_cannot_parse_fails_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Models that repeat themselves nest deeper than a parser goes."""
    task = checking("detectable_format:json_format")
    assert followed(task, "[" * 100_000).strict == (False,)
    assert followed(task, '{"a": 1}').strict == (True,)
    assert followed(checking("language:response_language", language="de"), "1 2 3").strict == (
        True,
    )
    assert "Unable to detect" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "given", "why"),
    [
        ("keywords:invented", {}, "which IFEval does not have"),
        ("length_constraints:number_words", {"num_words": 30}, "no usable relation"),
        ("length_constraints:number_words", {"relation": "at least"}, "no usable num_words"),
        ("length_constraints:number_words", {"num_words": -3, "relation": "at least"}, "num_words"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "exactly"}, "are wrong"),
        ("length_constraints:number_words", {"words": 3}, "are wrong"),
        ("keywords:forbidden_words", {}, "no usable forbidden_words"),
        ("keywords:existence", {"keywords": "word"}, "no usable keywords"),
        ("keywords:existence", {"keywords": ["(c"]}, "cannot be made"),
        ("keywords:existence", {"keywords": [3]}, "cannot be made"),
        ("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1,
         "let_relation": "at least"}, "no usable letter"),
        ("language:response_language", {"language": "klingon"}, "are wrong"),
        ("startend:end_checker", {}, "no usable end_phrase"),
        ("punctuation:no_comma", {"x": 1}, "are wrong"),
    ],
)  # fmt: skip
def test_an_unknown_check_and_arguments_it_would_replace_by_chance_are_refused(
    name: str, given: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=why):
        checks.verified(checking(name, **given), "an answer")


def test_the_loss_is_that_of_all_tokens_together(two: list[Path]) -> None:
    base, tuned = (measure(files.read(path), {}) for path in two)
    found = base.interval("loss")
    assert found is not None
    assert found.mean == pytest.approx(13 / 10)  # not the mean of 1, 2, 3 and 1
    assert found.low < 1.3 < found.high
    assert base.by_kind("loss") == pytest.approx({"fact": 1.5, "form": 3.0, "open": 1.0})
    changed = difference(base, tuned, "loss")
    assert changed is not None
    assert changed.mean == pytest.approx(6.5 / 10 - 13 / 10)
    assert changed.high < 0


# ---- the table, JSON


def test_the_table_has_each_measure_and_its_difference(
    two: list[Path], suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(*two, "--suite", suite, "--json", tmp_path / "s.json") == 0
    table = capsys.readouterr().out
    rows = {line.split("  ")[0].strip(): line for line in table.splitlines()}
    assert re.search(r"2 +50\.0% \[0\.0, 100\.0\] +50\.0% \[", rows["exact match"])
    assert re.search(r"1 +0\.0% \[0\.0, 0\.0\] +100\.0% .* \+100\.0\* ", rows["follows all checks"])
    losses = rows["loss of the references"]
    assert re.search(r"4 +1\.300 \[.*\] +0\.650 \[.*\] +-0\.650\* \[", losses)
    assert re.search(r"4 +25\.0% \[.*\] +0\.0% \[.*\] +-25\.0 \[", rows["cut at the limit"])
    assert re.search(r"4 +0\.0% .* +25\.0% .* +\+25\.0 \[", rows["empty"])
    assert "*" not in rows["words"]  # neither direction is better
    figures = json.loads((tmp_path / "s.json").read_text(), parse_constant=pytest.fail)
    assert [model["generator"] for model in figures["models"]] == ["base", "tuned"]
    for name, title in (("match", "exact match"), ("checks", "follows all checks")):
        for model in figures["models"]:
            assert f"{model['measures'][name]['mean']:.1%} [" in rows[title]
    base, tuned = figures["models"]
    assert f"{base['measures']['loss']['mean']:.3f} [" in losses
    assert base["measures"]["perplexity"]["mean"] == pytest.approx(math.exp(1.3))
    assert base["kinds"]["match"] == {"fact": 0.5}
    [changed] = figures["differences"]
    assert (changed["generator"], changed["baseline"]) == ("tuned", "base")
    for name, title in (("checks", "follows all checks"), ("empty", "empty")):
        assert f"{100 * changed[name]['mean']:+.1f}" in rows[title]
    assert tuned["each"][1]["match"] == 1
    assert "match" not in tuned["each"][3]
    assert base["settings"] == {}


def test_models_are_held_against_each_other_on_what_both_answered(
    two: list[Path], suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(two[1], [*entries("tuned")[1:], {**entries("tuned")[0], "instruction": "Other?"}])
    assert score(*two, "--suite", suite, "--json", tmp_path / "s.json") == 0
    err = capsys.readouterr().err
    assert "tuned is held against base on the 3 tasks that both answered" in err
    assert "1 of 4 answers of tuned are to tasks that --suite does not have" in err
    [changed] = json.loads((tmp_path / "s.json").read_text())["differences"]
    assert changed["match"]["mean"] == 1  # on "Half of ten?" alone
    assert changed["loss"]["mean"] == pytest.approx(-6 / 9)


def test_losses_of_other_tokens_are_not_said_to_compare(
    two: list[Path], suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(*two, "--suite", suite) == 0
    assert "other tokens" not in capsys.readouterr().err
    written(two[1], [{**one, "reference_tokens": 8} for one in entries("tuned")])
    assert score(*two, "--suite", suite) == 0
    assert "tuned and base have other tokens" in capsys.readouterr().err


def test_files_of_other_programs_are_read(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("instruction", "output", "generator", "dataset")
    plain_ones = [{key: one[key] for key in keys} for one in entries("base")]
    path = written(tmp_path / "model_outputs.json", plain_ones)
    assert score(path, "--suite", suite, "--json", tmp_path / "s.json") == 0
    assert "loss" not in capsys.readouterr().out.split("In brackets")[0]
    [model] = json.loads((tmp_path / "s.json").read_text())["models"]
    assert model["measures"]["match"]["mean"] == 0.5
    assert "unfinished" not in model["measures"]


def test_names_that_look_like_markup_are_printed_as_they_are(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "[/red][bold]x\x1b[2J é"
    path = written(tmp_path / "a.json", entries("base", name))
    assert score(path, "--suite", suite) == 0
    out = capsys.readouterr().out
    assert "[/red][bold]x [2J é" in out
    assert "\x1b" not in out


BAD: list[tuple[Any, str]] = [
    ([], "holds no answers"),
    ([3], "entry 0: it is no object"),
    ([{"instruction": "a", "output": "b"}], "generator is no text"),
    ([{"instruction": "a", "output": 3, "generator": "c"}], "output is no text"),
    ([{"instruction": "a", "output": "\ud800", "generator": "c"}], "half of a surrogate pair"),
    ([{"instruction": "a", "output": "", "generator": g} for g in "ab"], "several generators"),
    *(
        ([{"instruction": "a", "output": "b", "generator": "c", key: value}], f"{key} is no")
        for key, value in (
            ("tokens", -1), ("tokens", 10**400), ("tokens", True), ("tokens", "3"), ("input", 3),
            ("reference_loss", math.nan), ("reference_loss", math.inf), ("reference_loss", -1),
            ("reference_loss", 1e300), ("reference_tokens", 0.5), ("finish_reason", 1),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("items", "why"), BAD)
def test_a_wrong_file_of_answers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], items: Any, why: str
) -> None:
    assert score(written(tmp_path / "a.json", items)) == 2
    assert why in capsys.readouterr().err


def test_one_generator_twice_and_files_that_would_be_lost_are_refused(
    two: list[Path], suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = written(tmp_path / "again.json", entries("base"))
    for arguments, why in (
        ((two[0], again), "Two files are of one generator: base, base"),
        ((tmp_path / "none.json",), "There is no data file"),
        ((two[0], "--json", two[0]), "is an input, and would be lost"),
        ((two[0], "--suite", suite, "--html", suite), "is an input, and would be lost"),
        ((two[0], "--html", tmp_path), "is a folder"),
        ((two[0], "--json", suite / "s.json"), "is no folder"),
        ((two[0], "--suite", tmp_path / "none.json"), "There is no data file"),
    ):
        assert score(*arguments) == 2
        assert why in capsys.readouterr().err
    assert json.loads(two[0].read_text()) == entries("base")


def test_a_senseless_loss_is_a_number_still(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "a.json", [{**entries("base")[0], "reference_loss": 1e14}])
    written_to = ("--json", tmp_path / "s.json", "--html", tmp_path / "s.html")
    assert score(path, "--suite", suite, *written_to) == 0
    json.loads((tmp_path / "s.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("missing", "row"),
    [("if_verifiable", "follows all checks"), ("py3langid", "in the asked language")],
)
def test_a_missing_package_is_told_and_the_rest_is_printed(
    two: list[Path], suite: Path, missing: str, row: str
) -> None:
    script = (
        f"import sys; sys.modules[{missing!r}] = None;"
        "from alpaca.cli import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "score", *map(str, two), "--suite", str(suite)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"{missing} is missing" in done.stderr
    assert "pip install -e '.[evaluation]'" in done.stderr
    assert "exact match" in done.stdout
    assert row not in done.stdout


# ---- the page


def test_the_page_is_one_file_that_shows_texts_as_texts(
    tmp_path: Path, browser: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    long = "unbroken" * 40
    tasks = [*SUITE, {"instruction": f"{MARKUP} {long}", "input": MARKUP, "output": MARKUP,
                      "kind": MARKUP, "answers": ["no"]}]  # fmt: skip
    paths = []
    for name in ("base", "tuned"):
        last = {**entries(name)[0], "instruction": tasks[-1]["instruction"], "input": MARKUP,
                "output": f"{MARKUP}\n{long}", "kind": MARKUP}  # fmt: skip
        items = [{**one, "generator": f"{name} {MARKUP}"} for one in [*entries(name), last]]
        paths.append(written(tmp_path / f"{name}.json", items))
    suite, html = written(tmp_path / "suite.json", tasks), tmp_path / "page.html"
    assert score(*paths, "--suite", suite, "--html", html) == 0
    assert f"page: {html}" in capsys.readouterr().out
    text = html.read_text()
    assert not re.search(r"<(script|img|link|iframe)|\bsrc=\"|url\(|@import|https?://", text)
    page = browser.new_page(viewport={"width": 390, "height": 800})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(html.as_uri())
    assert page.locator("details").count() == 5
    for detail in page.locator("details").all():
        detail.locator("summary").click()
    shown = page.locator("pre").all_text_contents()
    assert f"{MARKUP}\n{long}" in shown
    assert MARKUP in shown
    assert page.locator("h3", has_text="base <script>").count() == 5
    assert page.locator("summary b.good").count() == 3
    assert page.locator("summary b.bad").count() == 5
    assert page.evaluate(TOO_WIDE) <= 0
    result = Axe().run(page)
    assert result.violations_count == 0, result.generate_report()
    page.set_viewport_size({"width": 1200, "height": 800})
    assert page.evaluate(TOO_WIDE) <= 0
    page.screenshot(path=os.environ.get("SCORE_SHOT") or str(tmp_path / "shot.png"))
    assert (said, asked) == ([], [html.as_uri()])
    page.close()


def test_only_our_keys_decide_which_task_is_meant() -> None:
    first, second = keyed([Task("a"), Task("a")])
    assert first.key != second.key
    assert keyed([Task("a", kind="x")])[0].key == first.key
