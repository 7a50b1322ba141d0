"""`python -m alpaca generate` against a teacher that misbehaves, and against kill -9."""

import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from scripted_teacher import MODES, entries, files, generate, scripted_teacher, side

from alpaca.dataset.novelty import Index
from alpaca.records import read_records

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-a-very-secret-key"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


CASES = [(mode, "chat") for mode in MODES] + [
    (mode, "completion") for mode in ("well", "cut connection", "truncated reply")
]


@pytest.mark.parametrize(("mode", "endpoint"), CASES)
def test_500_instructions_come_out_and_every_paid_reply_is_used(
    mode: str, endpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "data.json"
    with scripted_teacher(mode) as teacher:
        timeout = "4" if mode == "hang" else "60"
        assert generate(teacher, output, "--endpoint", endpoint, "--timeout", timeout) == 0
    records = read_records(output)
    assert len(records) == len({record.instruction for record in records}) == 500
    assert "parrots" not in output.read_text() + (tmp_path / "data.dropped.jsonl").read_text()
    replies = entries(output, "reply")
    opening = "4. Instruction:" if endpoint == "completion" else ""
    assert Counter(reply["text"] for reply in replies) == Counter(opening + t for t in teacher.paid)
    assert len({reply["request"] for reply in replies}) == len(replies)
    if mode in ("429 with Retry-After", "429", "500", "hang", "cut connection", "malformed JSON"):
        assert len(teacher.asked) > len(teacher.paid)  # it did misbehave
    if mode == "no choices":
        assert all(entry["tokens_in"] == 700 for entry in entries(output, "wasted"))
        assert len(entries(output, "wasted")) > 3
    if mode == "error in a 200":
        assert len(teacher.asked) > len(teacher.paid)
        assert not entries(output, "wasted")  # nothing was paid
    if mode == "reasoning alone":
        spent = entries(output, "refused")
        assert len(spent) >= 3
        assert {(item["tokens_in"], item["tokens_out"]) for item in spent} == {(700, 300)}
        assert "300 tokens held no answer (finish_reason length)" in spent[0]["why"]
        assert len({*teacher.asked}) == len(teacher.asked)  # none was asked, and paid, again
    if mode == "truncated reply":
        read = Counter(len(entry["tasks"]) for entry in entries(output, "judged"))
        assert set(read) == {19}
    said = capfd.readouterr()
    assert "500 of 500 instructions" in said.out
    everything = said.out + said.err + "".join(p.read_text() for p in tmp_path.iterdir())
    assert KEY not in everything
    assert teacher.keys == {f"Bearer {KEY}"}


def test_what_is_kept_is_new_and_what_is_dropped_has_its_reason(tmp_path: Path) -> None:
    output = tmp_path / "data.json"
    with scripted_teacher() as teacher:
        assert generate(teacher, output, wanted=100) == 0
    seeds = [record.instruction for record in read_records(ROOT / "data" / "seed_tasks.jsonl")]
    index = Index(seeds)
    for record, kept in zip(read_records(output), side(output, "neighbours"), strict=True):
        nearest = index.nearest(record.instruction, 5)
        assert nearest[0].score < 0.7
        assert [item["score"] for item in kept["nearest"]] == [item.score for item in nearest]
        index.add(record.instruction)
    dropped = side(output, "dropped")
    assert {item["verdict"] for item in dropped} == {"similar", "needs_media"}
    assert all(item["nearest"][0][1] >= 0.7 for item in dropped if item["verdict"] == "similar")


def test_the_journal_alone_makes_the_files_again(tmp_path: Path) -> None:
    output = tmp_path / "data.json"
    with scripted_teacher() as teacher:
        generate(teacher, output, wanted=100)
        before, asked = files(tmp_path), len(teacher.asked)
        journal = tmp_path / "data.journal.jsonl"
        for path in tmp_path.iterdir():
            if path != journal:
                path.unlink()
        generate(teacher, output, wanted=100)
        assert files(tmp_path) == before
        # The judgements are themselves a function of the replies.
        lines = [line for line in journal.read_text().splitlines() if '"judged"' not in line]
        journal.write_text("\n".join(lines) + "\n")
        generate(teacher, output, wanted=100)
        assert files(tmp_path) == before
        assert len(teacher.asked) == asked
        # And more may be asked for later: what is there stays, and nothing is paid twice.
        first = read_records(output)
        generate(teacher, output, wanted=150)
        assert read_records(output)[:100] == first
        assert len(read_records(output)) == 150
        assert len(set(teacher.paid)) == len(teacher.paid)


def test_the_budget_is_never_overrun_and_raising_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "data.json"
    prices = ["--price_in", "10", "--price_out", "40", "--max_tokens", "400"]
    with scripted_teacher() as teacher:  # a reply costs 0.019, and 0.026 at most
        assert generate(teacher, output, *prices, "--max_cost", "0.2") == 0
        assert "stopped at the budget" in capsys.readouterr().out
        assert 5 <= len(teacher.paid) <= 0.2 // 0.019
        assert 0 < len(read_records(output)) < 500
        assert generate(teacher, output, *prices, "--max_cost", "9") == 0
        assert len(read_records(output)) == 500
        assert len(set(teacher.paid)) == len(teacher.paid)


def test_a_token_budget_stops_too(tmp_path: Path) -> None:
    with scripted_teacher() as teacher:
        generate(teacher, tmp_path / "d.json", "--max_total_tokens", "9000", "--max_tokens", "500")
        assert 3 <= len(teacher.paid) <= 9


@pytest.mark.parametrize(
    ("mode", "said"),
    [("401", "OPENAI_API_KEY"), ("404", "--endpoint"), ("400", "--extra")],
)
def test_a_refusal_says_what_to_do_and_never_the_key(
    mode: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with scripted_teacher(mode) as teacher:
        assert generate(teacher, tmp_path / "data.json") == 2
    error = capfd.readouterr().err
    assert said in error
    assert "[key] may not" in error
    assert "Traceback" not in error
    assert KEY not in error + "".join(p.read_text() for p in tmp_path.iterdir())
    assert not (tmp_path / "data.json").exists()


def test_a_server_that_is_gone_is_a_clear_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with scripted_teacher() as teacher:
        pass
    assert generate(teacher, tmp_path / "data.json", "--retries", "1") == 2
    assert "failed 2 times" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--seed", "5"], "seed was 0 and is now 5"),
        (["--max_cost", "1"], "--price_in"),
        (["--concurrency", "1000"], "--concurrency"),
        (["--teacher", "localhost"], "not a URL"),
    ],
)
def test_mistakes_are_named(
    changed: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with scripted_teacher() as teacher:
        generate(teacher, tmp_path / "data.json", wanted=20)
        asked = len(teacher.asked)
        assert generate(teacher, tmp_path / "data.json", *changed, wanted=20) == 2
        assert len(teacher.asked) == asked
    assert said in capfd.readouterr().err


def test_replies_of_reasoning_alone_end_the_run_with_the_cause_and_are_never_paid_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODES, "reasoning alone", 1)
    with scripted_teacher("reasoning alone") as teacher:
        for _ in range(2):
            assert generate(teacher, tmp_path / "data.json", "--concurrency", "3") == 2
            error = capfd.readouterr().err
            assert "300 tokens held no answer (finish_reason length)" in error
            assert "Raise --max_tokens" in error
        assert 2 <= len(teacher.asked) <= 6
        assert len({*teacher.asked}) == len(teacher.asked)


@pytest.mark.parametrize(
    ("code", "attempts", "remedy"),
    [
        (502, 2, "failed 2 times on one request; last failure: HTTP 502: Provider returned error"),
        ("overloaded", 2, "last failure: HTTP 500: Provider returned error"),
        (402, 1, "HTTP 402: Provider returned error\n  The account has no credit left"),
        ("401", 1, "HTTP 401: Provider returned error\n  Set OPENAI_API_KEY"),
    ],
)
def test_an_error_in_a_200_is_named_and_counts_as_nothing_paid(
    code: int | str,
    attempts: int,
    remedy: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(MODES, "error in a 200", 1)
    with scripted_teacher("error in a 200") as teacher:
        teacher.error_code = code
        more = ["--retries", "1", "--concurrency", "1"]
        assert generate(teacher, tmp_path / "data.json", *more) == 2
        assert len(teacher.asked) == attempts
    assert remedy in capfd.readouterr().err
    assert not entries(tmp_path / "data.json", "wasted")


def test_a_flipped_bit_anywhere_in_the_journal_is_found(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    journal = tmp_path / "data.journal.jsonl"
    with scripted_teacher() as teacher:
        generate(teacher, tmp_path / "data.json", wanted=40)
        whole, asked = journal.read_bytes(), len(teacher.asked)
        rng = random.Random(0)
        places = [place for place in rng.sample(range(len(whole)), 60) if whole[place] != 10]
        for place in places:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << rng.randrange(3)  # a letter of a reply stays one
            if flipped[place] == 10:
                continue
            journal.write_bytes(flipped)
            assert generate(teacher, tmp_path / "data.json", wanted=40) == 2
            line = whole.count(b"\n", 0, place) + 1
            assert f"damaged: line {line} was changed" in capfd.readouterr().err
        assert len(teacher.asked) == asked


def test_a_journal_from_before_checksums_is_resumed(tmp_path: Path) -> None:
    journal = tmp_path / "data.journal.jsonl"
    with scripted_teacher() as teacher:
        generate(teacher, tmp_path / "data.json", wanted=40)
        asked, before = len(teacher.asked), files(tmp_path)
        old = re.sub(r', "crc32": "[0-9a-f]{8}"\}', "}", journal.read_text())
        journal.write_text(old.replace('"format": 2', '"format": 1', 1))
        assert generate(teacher, tmp_path / "data.json", wanted=40) == 0
        assert (len(teacher.asked), files(tmp_path)) == (asked, before)
        assert generate(teacher, tmp_path / "data.json", wanted=80) == 0  # a file of both kinds
        assert generate(teacher, tmp_path / "data.json", wanted=80) == 0
        assert len({*teacher.asked}) == len(teacher.asked)


@pytest.mark.parametrize(("secret", "shown"), [("a", "no, Bearer [key] may not"), (KEY, "[key]")])
def test_a_key_of_one_letter_is_not_cut_out_of_words(
    secret: str,
    shown: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    with scripted_teacher("401") as teacher:
        assert generate(teacher, tmp_path / "data.json") == 2
    error = capfd.readouterr().err
    assert shown in error
    assert "The teacher at http://127.0.0.1" in error
    assert KEY not in error


def test_a_damaged_journal_is_refused_and_a_torn_one_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output, journal = tmp_path / "data.json", tmp_path / "data.journal.jsonl"
    with scripted_teacher() as teacher:
        generate(teacher, output, wanted=40)
        before = files(tmp_path)
        whole = journal.read_bytes()
        journal.write_bytes(whole + b'{"entry": "reply", "req')
        assert generate(teacher, output, wanted=40) == 0
        assert (files(tmp_path), journal.read_bytes()) == (before, whole)
        journal.write_bytes(whole.replace(b'{"entry": "reply"', b'{"entry', 1))
        assert generate(teacher, output, wanted=40) == 2
    assert "damaged: line 2" in capfd.readouterr().err


def test_two_runs_do_not_share_a_journal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import fcntl

    with scripted_teacher() as teacher, open(tmp_path / "data.journal.jsonl", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert generate(teacher, tmp_path / "data.json") == 2
    assert "Another run" in capfd.readouterr().err
    assert os.environ["OPENAI_API_KEY"] == KEY


def test_extra_changes_the_body_that_is_sent(tmp_path: Path) -> None:
    extra = '{"max_tokens": null, "max_completion_tokens": 99, "seed": 3}'
    with scripted_teacher() as teacher:
        generate(teacher, tmp_path / "data.json", "--extra", extra, wanted=20)
        body = teacher.bodies[0]
    assert (body["max_completion_tokens"], body["seed"]) == (99, 3)
    assert "max_tokens" not in body
