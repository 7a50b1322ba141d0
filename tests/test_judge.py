"""`judge`: both orders of each pair, the right winner, resumed without paying twice."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_endpoint import Body, Said, ScriptedEndpoint, prompt_of, scripted_endpoint

from alpaca.cli import main
from alpaca.dataset.teacher import estimate
from alpaca.evaluation import annotations
from alpaca.evaluation.pairs import Pair
from alpaca.evaluation.preference import annotated, keys, question, verdict

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("base", "tuned")
COUNT = 12
SHOWN = re.compile(r"<answer_1>\n(.*?)\n</answer_1>\n\n<answer_2>\n(.*?)\n</answer_2>", re.DOTALL)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def answers(folder: Path, count: int = COUNT, same: int = 0) -> list[Path]:
    """Two files; the second model's answers are longer where the task's number is not 0 mod 4."""
    paths = []
    for side, name in enumerate(NAMES):
        items = [
            {
                "instruction": f"Task {n}",
                "input": f"input {n}" if n % 2 else "",
                "output": "the same" if n < same else f"{name} {n}" + " more" * words(n, side),
                "generator": name,
                "dataset": "d",
            }
            for n in range(count)
        ]
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(items))
    return paths


def words(number: int, side: int) -> int:
    return 3 + number if side == (number % 4 > 0) else 1


def shown(body: Body) -> tuple[str, str]:
    found = SHOWN.search(prompt_of(body))
    assert found is not None
    return found[1], found[2]


def first(body: Body) -> Said:
    return Said("1")


def longer(body: Body) -> Said:
    one, other = shown(body)
    return Said("1" if len(one) > len(other) else "2")


@pytest.fixture
def judge() -> Iterator[ScriptedEndpoint]:
    with scripted_endpoint(longer) as endpoint:
        yield endpoint


def flags(judge: ScriptedEndpoint, folder: Path, *more: str) -> list[str]:
    paths = [str(folder / f"{name}.json") for name in NAMES]
    model = [] if "--model" in more else ["--model", "scripted"]
    url = [] if "--judge" in more else ["--judge", judge.url]
    return ["judge", *paths, *url, *model, "-o", str(folder / "out.json"), *more]


def judged(judge: ScriptedEndpoint, folder: Path, *more: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(flags(judge, folder, *more))
    return int(ended.value.code or 0)


def journal(folder: Path, kind: str = "verdict") -> list[dict[str, Any]]:
    lines = (folder / "out.journal.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["entry"] == kind]


# ---- one reply, one pair


@pytest.mark.parametrize(
    ("text", "preference"),
    [
        ("2", 2.0),
        ("Answer 2.", 2.0),
        ("1.", 1.0),
        ("**1**", 1.0),
        ("[[2]]", 2.0),
        ("<answer_2>", 2.0),
        ("0\n", 1.5),
        ("Answer 1 is short. Answer 2 is wrong in two of its 10 points.\n\nSo neither: 0", 1.5),
        ("Answer 1 is shorter than answer 2, but complete.\nVerdict: 1", 1.0),
        ("Answer 1 is better than answer 2.", None),  # not guessed at
        ("1 or 2", None),
        ("10", None),
        ("12", None),
        ("0.5", None),
        ("2024", None),
        ("-1", None),
        ("1,000", None),
        ("3", None),
        ("I cannot decide", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_from_text(text: str, preference: float | None) -> None:
    assert verdict(text, ()) == preference


def test_log_probabilities_make_the_verdict_fractional() -> None:
    def log(*shares: float) -> list[float]:
        return [math.log(share) for share in shares]

    top = list(zip(("1", "2", "0", "The"), log(0.6, 0.2, 0.1, 0.1), strict=True))
    assert verdict("1", top) == pytest.approx((0.6 * 1 + 0.2 * 2 + 0.1 * 1.5) / 0.9)
    both = list(zip(("1", " 1", "2"), log(0.3, 0.3, 0.4), strict=True))
    assert verdict("2", both) == pytest.approx(1.4)
    # a reply that begins with a reason is read, not its first token's probabilities
    assert verdict("The second: 2", [("The", -0.1), ("1", -3.0)]) == 2.0
    assert verdict("", [("1", -math.inf), ("2", 0.0)]) == 2.0


TEXTS = st.text(alphabet="ab12 {}\n", max_size=6)
REPLIES = st.sampled_from(["1", "2", "0", "nonsense"])


@given(one=TEXTS, other=TEXTS, replies=st.tuples(REPLIES, REPLIES))
def test_a_judge_that_looks_at_content_gets_the_same_winner_in_any_order(
    one: str, other: str, replies: tuple[str, str]
) -> None:
    """The winner is a text, not a place: the prompts' order and the files' order change nothing."""

    def wins(pair: Pair) -> tuple[float | None, ...]:
        found = {}
        for side, key in enumerate(keys(pair)):
            asked = SHOWN.search(question(pair, side))
            assert asked is not None
            better = max(pair.answers)
            mark = "0" if asked[1] == asked[2] else "1" if asked[1] == better else "2"
            found[key] = {"preference": verdict(mark, ())}
        made = annotated(pair, NAMES, "judge", found)
        return made.preference, *made.extra["verdicts"]

    pair = Pair("k", "Do it.", "", (one, other))
    if pair.identical:
        assert wins(pair)[0] == 1.5
        return
    right = 2.0 if other > one else 1.0
    assert wins(pair) == (right, right, right)
    back = Pair("k", "Do it.", "", (other, one))
    assert wins(back) == (3 - right,) * 3
    # any two replies: exchanging the files turns the preference round
    verdicts = [{"preference": verdict(reply, ())} for reply in replies]
    given_replies = dict(zip(keys(pair), verdicts, strict=True))
    turned = dict(zip(keys(back), reversed(verdicts), strict=True))
    ours = annotated(pair, NAMES, "judge", given_replies).preference
    theirs = annotated(back, NAMES, "judge", turned).preference
    assert theirs == (None if ours is None else 3 - ours)
    assert (ours is None) == ("nonsense" in replies)


# ---- whole runs


def test_a_judge_that_prefers_the_longer_answer(
    judge: ScriptedEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(tmp_path)
    report = tmp_path / "report.json"
    html = tmp_path / "report.html"
    assert judged(judge, tmp_path, "--json", str(report), "--html", str(html)) == 0
    found = annotations.read(tmp_path / "out.json")
    assert [one.preference for one in found] == [2.0 if n % 4 else 1.0 for n in range(COUNT)]
    raw = json.loads((tmp_path / "out.json").read_text())
    for n, one in enumerate(raw):
        assert list(one)[:8] == [
            "instruction", "output_1", "generator_1", "dataset", "output_2", "generator_2",
            "annotator", "preference",
        ]  # fmt: skip
        assert (one["generator_1"], one["generator_2"], one["annotator"]) == (*NAMES, "scripted")
        assert one["output_1"].startswith(f"base {n}")
        assert one["output_2"].startswith(f"tuned {n}")
        assert (one["dataset"], one["input"]) == ("d", f"input {n}" if n % 2 else "")
    assert len(judge.asked) == 2 * COUNT
    pairs = Counter(frozenset(shown(body)) for body in judge.asked)
    assert set(pairs.values()) == {2}
    assert len({shown(body) for body in judge.asked}) == 2 * COUNT  # each in both orders
    assert "Task 3\n\ninput 3" in "".join(judge.prompts())
    figures = json.loads(report.read_text(), parse_constant=pytest.fail)
    row = figures["rows"][0]
    assert (row["wins"], row["losses"], row["rate"]) == (9, 3, 75.0)
    assert figures["position_bias"]["share"] == 50
    out = capsys.readouterr().out
    assert "Both orders have the same winner, or none, on 12 of 12 pairs." in out
    assert "Length-controlled win rate:" in out
    assert "spent: 1,200 tokens in, 24 out" in out
    assert "Both orders have the same winner" in html.read_text()


def test_a_judge_that_prefers_the_first_position_prefers_nobody(
    judge: ScriptedEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.reply = first
    answers(tmp_path)
    report = tmp_path / "report.json"
    assert judged(judge, tmp_path, "--json", str(report)) == 0
    assert {one.preference for one in annotations.read(tmp_path / "out.json")} == {1.5}
    figures = json.loads(report.read_text())
    assert (figures["rows"][0]["rate"], figures["rows"][0]["ties"]) == (50.0, COUNT)
    assert (figures["left_wins"], figures["right_wins"]) == (2 * COUNT, 0)
    assert figures["position_bias"]["share"] == 100.0
    out = capsys.readouterr().out
    assert f"won {2 * COUNT} of {2 * COUNT} times (without ties): 100.0%" in out
    assert "the same winner, or none, on 0 of 12 pairs" in out


def test_probabilities_are_asked_for_unless_told_otherwise(
    judge: ScriptedEndpoint, tmp_path: Path
) -> None:
    top = [("1", math.log(0.75)), ("2", math.log(0.25))]
    judge.reply = lambda body: Said("1", top=top if "logprobs" in body else None)
    answers(tmp_path, 2)
    assert judged(judge, tmp_path) == 0
    assert judge.asked[0]["top_logprobs"] == 20
    assert judge.asked[0]["temperature"] == 0
    found = annotations.read(tmp_path / "out.json")
    assert found[0].extra["verdicts"] == pytest.approx([1.25, 1.75])
    for path in tmp_path.glob("out.*"):
        path.unlink()
    assert judged(judge, tmp_path, "--no-logprobs") == 0
    assert "logprobs" not in judge.asked[-1]
    assert annotations.read(tmp_path / "out.json")[0].extra["verdicts"] == [1.0, 2.0]


def test_replies_without_a_verdict_are_counted_and_told(
    judge: ScriptedEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One order without a verdict makes a pair without one: else a liking for a side decides."""

    def reply(body: Body) -> Said:
        if "Task 3\n" in prompt_of(body) and shown(body)[0].startswith("base"):
            return Said("I cannot say.")
        if "Task 5\n" in prompt_of(body):
            return Said("", finish="length")
        return longer(body)

    judge.reply = reply
    answers(tmp_path)
    assert judged(judge, tmp_path) == 0
    found = annotations.read(tmp_path / "out.json")
    assert [n for n, one in enumerate(found) if one.preference is None] == [3, 5]
    assert found[3].extra["verdicts"] == [None, 2.0]
    assert "2 pairs have no verdict: a reply held none." in capsys.readouterr().out
    asked = len(judge.asked)
    assert asked == 2 * COUNT  # an empty reply is not asked for again
    assert judged(judge, tmp_path) == 0
    assert len(judge.asked) == asked


def test_a_judge_without_any_verdict_is_told(
    judge: ScriptedEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.reply = lambda body: Said("As a judge, I")
    answers(tmp_path, 3)
    assert judged(judge, tmp_path) == 2
    assert "None of the 3 pairs has a verdict" in capsys.readouterr().err
    assert [one.preference for one in annotations.read(tmp_path / "out.json")] == [None] * 3


def test_identical_answers_are_ties_without_a_request(
    judge: ScriptedEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(tmp_path, 6, same=4)
    assert judged(judge, tmp_path) == 0
    assert len(judge.asked) == 4
    found = annotations.read(tmp_path / "out.json")
    assert [one.preference for one in found[:4]] == [1.5] * 4
    assert "Ties without a vote, as both answers are identical: 4." in capsys.readouterr().out
    answers(tmp_path, 6, same=6)
    assert judged(judge, tmp_path) == 0
    assert len(judge.asked) == 4


@pytest.mark.parametrize("concurrency", ["1", "5"])
def test_the_budget_is_not_exceeded_and_a_raised_one_resumes(
    judge: ScriptedEndpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    concurrency: str,
) -> None:
    """A reply costs what is estimated for its request at the most, as real usage does here."""
    answers(tmp_path)
    judge.reply = lambda body: Said(
        longer(body).text, usage=(estimate(prompt_of(body)), body["max_tokens"])
    )
    budget = ("--concurrency", concurrency, "--max_total_tokens")
    assert judged(judge, tmp_path, *budget, "2500") == 0
    assert "stopped at the budget" in capsys.readouterr().out
    spent = sum(entry["tokens_in"] + entry["tokens_out"] for entry in journal(tmp_path))
    assert 1500 < spent <= 2500
    some = len(judge.asked)
    assert 0 < some < 2 * COUNT
    assert len(annotations.read(tmp_path / "out.json")) == some // 2
    assert judged(judge, tmp_path, *budget, "2500") == 0
    assert len(judge.asked) == some
    assert judged(judge, tmp_path, *budget, "99999") == 0
    assert len(judge.asked) == 2 * COUNT == len(set(judge.prompts()))
    assert len(annotations.read(tmp_path / "out.json")) == COUNT


def test_a_cost_limit_needs_prices_and_stops(
    judge: ScriptedEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(tmp_path)
    assert judged(judge, tmp_path, "--max_cost", "1") == 2
    assert "--max_cost needs --price_in and --price_out" in capsys.readouterr().err
    prices = ("--price_in", "1000", "--price_out", "1000")
    assert judged(judge, tmp_path, "--max_cost", "1", *prices) == 0
    out = capsys.readouterr().out
    assert "stopped at the budget" in out
    assert 0.5 < float(re.findall(r"cost ([\d.]+)", out)[0]) <= 1


def test_killed_and_resumed_nothing_is_asked_twice(judge: ScriptedEndpoint, tmp_path: Path) -> None:
    answers(tmp_path)
    reached = threading.Event()

    def reply(body: Body) -> Said:
        time.sleep(0.02)
        return longer(body)

    judge.reply = reply
    judge.on_reply = lambda count: reached.set() if count >= 9 else None
    command = [sys.executable, "-m", "alpaca", *flags(judge, tmp_path, "--concurrency", "2")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert reached.wait(60)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = {entry["key"] for entry in journal(tmp_path)}
    before = len(judge.asked)
    assert 5 <= len(kept) < 2 * COUNT
    assert not (tmp_path / "out.json").exists()
    assert judged(judge, tmp_path) == 0
    assert set(Counter(entry["key"] for entry in journal(tmp_path)).values()) == {1}
    assert len(journal(tmp_path)) == 2 * COUNT
    assert len(judge.asked) == before + 2 * COUNT - len(kept)  # only what was not in the journal
    assert judged(judge, tmp_path) == 0
    assert len(annotations.read(tmp_path / "out.json")) == COUNT


def test_ctrl_c_waits_for_the_replies_in_flight(
    judge: ScriptedEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(tmp_path)
    in_flight = threading.Barrier(3 + 1)

    def reply(body: Body) -> Said:
        if len(judge.asked) <= 3:
            in_flight.wait(30)
            time.sleep(0.3)
        return longer(body)

    def interrupt() -> None:
        in_flight.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    judge.reply = reply
    thread = Thread(target=interrupt)
    thread.start()
    assert judged(judge, tmp_path, "--concurrency", "3") == 130
    thread.join()
    err = capsys.readouterr().err
    assert "waiting for 3 request(s) in flight" in err
    assert "run the same command again to resume" in err
    assert len(journal(tmp_path)) == judge.answered == 3
    assert judged(judge, tmp_path) == 0
    assert len(judge.asked) == 2 * COUNT


def test_another_judge_is_not_mixed_in(
    judge: ScriptedEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(tmp_path, 3)
    assert judged(judge, tmp_path) == 0
    before = (tmp_path / "out.json").read_bytes()
    asked = len(judge.asked)
    for more in (
        ("--model", "other"),
        ("--judge", judge.url.replace("127.0.0.1", "localhost")),
        ("--max_tokens", "17"),
        ("--no-logprobs",),
    ):
        assert judged(judge, tmp_path, *more) == 2
        assert "was started with other settings" in capsys.readouterr().err
    path = tmp_path / "out.journal.jsonl"
    begun, *rest = path.read_bytes().split(b"\n")
    settings = json.loads(begun)["settings"] | {"template_sha256": "another"}
    changed = {"entry": "run", "format": 1, "settings": settings}  # format 1: without checksums
    path.write_bytes(b"\n".join([json.dumps(changed).encode(), *rest]))
    assert judged(judge, tmp_path) == 2
    assert "template_sha256 was 'another'" in capsys.readouterr().err
    path.write_text('{"entry": "run", "format": 1}\n')
    assert judged(judge, tmp_path) == 2
    assert "not a journal this version can resume from" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_bytes() == before
    assert len(judge.asked) == asked


def test_a_task_that_was_answered_again_is_judged_again(
    judge: ScriptedEndpoint, tmp_path: Path
) -> None:
    base, _ = answers(tmp_path, 3)
    assert judged(judge, tmp_path) == 0
    items = json.loads(base.read_text())
    items[1]["output"] = "now the longest of them all, by far, and much better"
    base.write_text(json.dumps(items))
    assert judged(judge, tmp_path) == 0
    assert len(judge.asked) == 6 + 2
    assert [one.preference for one in annotations.read(tmp_path / "out.json")] == [1.0, 1.0, 2.0]


def test_the_key_is_sent_and_never_told(
    judge: ScriptedEndpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The judge's errors quote it."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-test")
    answers(tmp_path, 3)
    refusing = [400]

    def reply(body: Body) -> Said:
        return Said("no", status=refusing.pop()) if refusing else longer(body)

    judge.reply = reply
    assert judged(judge, tmp_path, "--concurrency", "1") == 0
    assert "[key] may not" in journal(tmp_path)[0]["why"]
    for status in (401, 403, 404):
        refusing.append(status)
        answers(tmp_path, 3 + status % 400)
        assert judged(judge, tmp_path, "--concurrency", "1") == 2
    printed = "".join(capsys.readouterr())
    assert "The judge at" in printed
    written = "".join(path.read_text() for path in tmp_path.glob("out*"))
    assert "sk-secret" not in printed + written


def test_a_judge_that_refuses_everything_ends_the_run_and_nothing_is_recorded(
    judge: ScriptedEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.reply = lambda body: Said("no logprobs here", status=400)
    answers(tmp_path, 40)
    assert judged(judge, tmp_path) == 2
    err = capsys.readouterr().err
    assert "The judge refused all" in err
    assert "no logprobs here" in err
    assert "--no-logprobs" in err
    assert len(judge.asked) < 40
    assert journal(tmp_path) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--timeout", "0"), "--timeout is above 0"),
        (("--timeout", "nan"), "--timeout is above 0"),
        (("--retries", "-1"), "--retries at least 0"),
        (("--max_cost", "nan", "--price_in", "1", "--price_out", "1"), "--max_cost is nan"),
        (("--price_in", "-1"), "--price_in is -1.0"),
        (("--limit", "0"), "must be at least 1"),
        (("--judge", "localhost:8000"), "--judge localhost:8000 is not a URL"),
        (("-o", "tests"), "--output tests cannot be written"),
        (("--html", "README.md/x"), "is no folder"),
        (("--judge", "http://127.0.0.1:9/v1", "--retries", "0"), "The judge failed 1 times"),
    ],
)
def test_a_mistake_is_told_and_exits_with_2(
    judge: ScriptedEndpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(ROOT)
    answers(tmp_path, 2)
    assert judged(judge, tmp_path, *more) == 2
    assert said in capsys.readouterr().err
    assert judge.asked == []


def test_the_answers_are_not_overwritten_and_must_be_of_one_suite(
    judge: ScriptedEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = answers(tmp_path, 2)
    before = base.read_bytes()
    assert judged(judge, tmp_path, "-o", str(base)) == 2
    assert "is an input, and would be lost" in capsys.readouterr().err
    assert base.read_bytes() == before
    tuned.write_text(json.dumps([{"instruction": "x", "output": "y", "generator": "z"}]))
    assert judged(judge, tmp_path) == 2
    assert "no task in common" in capsys.readouterr().err
