"""Blind comparison without its page: pairs, sides, votes on disk, and what they say."""

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca import atomic
from alpaca.errors import UserError
from alpaca.evaluation import verdict_forms, verdicts
from alpaca.evaluation.ballot import IDENTICAL, Ballot, Votes
from alpaca.evaluation.booth import Booth, listening
from alpaca.evaluation.pairs import Contest, Pair, joined, ordered

ROOT = Path(__file__).resolve().parent.parent
FIRST, SECOND = "base-7b", "tuned-7b"


def answers(path: Path, generator: str, outputs: Sequence[str], **other: str) -> Path:
    items = [
        {"instruction": f"Task {n}", "output": output, "generator": generator, **other}
        for n, output in enumerate(outputs)
    ]
    path.write_text(json.dumps(items))
    return path


def contest_of(count: int) -> Contest:
    pairs = [Pair(f"key {n}", f"Task {n}", "", (f"first {n}", f"second {n}")) for n in range(count)]
    return Contest((FIRST, SECOND), pairs, (0, 0))


def side_of(ballot: Ballot, wanted: str) -> str:
    """The side that a judge chooses who wants the first model's answer, the second's, or none."""
    if wanted == "tie":
        return "tie"
    left, _ = ballot.sides
    return "left" if left.startswith(wanted) else "right"


def saved(path: Path) -> dict[tuple[str, str], Any]:
    """Preference by judge and instruction, as any reader of the file finds it."""
    entries = json.loads(path.read_text())
    found = {(one["annotator"], one["instruction"]): one["preference"] for one in entries}
    assert len(found) == len(entries)
    return found


WANTED = st.sampled_from(["first", "second", "tie"])
PREFERENCE = {"first": 1, "second": 2, "tie": 1.5}


@settings(max_examples=30)
@given(
    wishes=st.lists(WANTED, min_size=1, max_size=6),
    judges=st.lists(st.sampled_from(["ann", "bob", "Zoë"]), min_size=1, max_size=2, unique=True),
    seed=st.integers(),
    undone=st.sets(st.integers(0, 5)),
    restarted=st.sets(st.integers(0, 5)),
)
def test_order_sides_undo_and_restarts_never_change_whose_vote_it_is(
    wishes: list[str], judges: list[str], seed: int, undone: set[int], restarted: set[int]
) -> None:
    contest = contest_of(len(wishes))
    wish = {f"Task {n}": wanted for n, wanted in enumerate(wishes)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "votes.json")
        for judge in judges:
            ballot = Ballot(Votes(path, contest), judge, seed)
            for turn in range(len(wishes)):
                if turn in restarted:
                    ballot = Ballot(Votes(path, contest), judge, seed)
                assert ballot.current is not None
                if turn in undone:
                    shown = ballot.current, ballot.sides, ballot.ticket
                    ballot.vote("left", "a mistake")
                    ballot.undo()
                    assert (ballot.current, ballot.sides, ballot.ticket) == shown
                    assert ballot.draft == "a mistake"
                ballot.vote(side_of(ballot, wish[ballot.current.instruction]), "")
            assert ballot.current is None
        expected = {(j, task): PREFERENCE[w] for j in judges for task, w in wish.items()}
        assert saved(path) == expected
        verdict = verdicts.load([path])
        all_pairs = verdict.rows[0].rate
        counts = [wishes.count(each) for each in ("second", "tie", "first")]
        assert [all_pairs.wins, all_pairs.ties, all_pairs.losses] == counts


@given(seed=st.integers(), limit=st.integers(1, 12))
def test_judges_with_the_same_limit_see_the_same_pairs_in_the_same_order(
    seed: int, limit: int
) -> None:
    contest = contest_of(12)
    whole, part = ordered(contest.pairs, seed), ordered(contest.pairs[::2], seed)
    assert [pair for pair in whole if pair in part] == part
    votes = Votes(Path("unwritten"), contest)
    ann, bob = (Ballot(votes, judge, seed, limit) for judge in ("ann", "bob"))
    assert ann.current == bob.current == whole[0]
    assert ann.total == bob.total == limit
    assert ann.ticket != bob.ticket


def test_sides_are_balanced_and_independent_of_judge_ticket_and_place() -> None:
    """Each share is a coin's: within 4 standard errors of a half."""
    count, contest = 800, contest_of(800)
    votes = Votes(Path("unwritten"), contest)
    lefts, tickets = {}, []
    for judge in ("ann", "bob"):
        ballot = Ballot(votes, judge, seed=0)
        queue = list(ballot._queue)
        lefts[judge] = [ballot._first(pair) == 1 for pair in queue]
        while ballot._queue:
            tickets.append(int(str(ballot.ticket), 16) % 2 == 1)
            ballot._queue.popleft()
    ann, bob = lefts["ann"], lefts["bob"]
    places = [place % 2 == 0 for place in range(count)]
    for other in ([True] * count, bob, tickets[:count], places, [*ann[1:], ann[0]]):
        share = sum(a == b for a, b in zip(ann, other, strict=True)) / count
        assert abs(share - 0.5) < 4 * 0.5 / count**0.5


def test_pairs_are_joined_by_instruction_input_and_order_of_repeats(tmp_path: Path) -> None:
    def write(name: str, tasks: list[tuple[str, str | None, str]]) -> Path:
        items = [
            {"instruction": one, "input": given, "output": output, "generator": name}
            for one, given, output in tasks
        ]
        (tmp_path / name).write_text(json.dumps(items))
        return tmp_path / name

    first = write("m", [("a", "", "1"), ("a", "x", "2"), ("b", None, "3"), ("b", "", "4")])
    second = write("n", [("b", "", "5"), ("b", "", "6"), ("b", "", "7"), ("a", "x", "8")])
    contest = joined(first, second)
    assert [pair.answers for pair in contest.pairs] == [("2", "8"), ("3", "5"), ("4", "6")]
    assert contest.names == ("m", "n")
    assert contest.alone == (1, 1)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    first = answers(tmp_path / "a.json", FIRST, ["x", "y"])
    again = answers(tmp_path / "b.json", FIRST, ["x", "z"])
    assert joined(first, again).names == (f"{FIRST} (1)", f"{FIRST} (2)")
    with pytest.raises(UserError, match="the same answers of base-7b"):
        joined(first, first)
    items = [{"instruction": "Other", "output": "x", "generator": SECOND}]
    (tmp_path / "c.json").write_text(json.dumps(items))
    with pytest.raises(UserError, match="no task in common"):
        joined(first, tmp_path / "c.json")
    (tmp_path / "c.json").write_text(json.dumps([{**items[0], "output": "\ud800"}]))
    with pytest.raises(UserError, match="entry 0 holds half of a surrogate pair"):
        joined(first, tmp_path / "c.json")
    for name in ("", "  ", "x" * 61, "a\x1b[2J"):
        with pytest.raises(UserError, match="judge's name"):
            Ballot(Votes(tmp_path / "v.json", contest_of(1)), name, 0)


def test_votes_of_another_comparison_are_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "votes.json"
    contest = contest_of(3)
    ballot = Ballot(Votes(path, contest), "ann", 0)
    ballot.vote("left", "")
    before = path.read_bytes()
    others = (
        (Contest((FIRST, "x"), contest.pairs, (0, 0)), "compares base-7b with tuned-7b"),
        (Contest((SECOND, FIRST), contest.pairs, (0, 0)), "not tuned-7b with base-7b"),
        (Contest((FIRST, SECOND), [Pair("k", "Task 9", "", ("a", "b"))], (0, 0)), "other answers"),
    )
    for other, why in others:
        with pytest.raises(UserError, match=why):
            Votes(path, other)
    [entry] = json.loads(before)
    path.write_text(json.dumps([entry, entry]))
    with pytest.raises(UserError, match=r"entry 1 .* ann has voted on its pair before"):
        Votes(path, contest)
    with pytest.raises(UserError, match="entry 0"):
        Votes(answers(tmp_path / "answers.json", FIRST, ["x"]), contest)


def test_a_damaged_file_is_told_and_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "votes.json"
    contest = contest_of(4)
    ballot = Ballot(Votes(path, contest), "ann", 0)
    for _ in range(3):
        ballot.vote("left", "ü")
    whole = path.read_bytes()
    atomic.partial_path(path).write_bytes(whole[:50])  # as a kill within a write leaves it
    assert Ballot(Votes(path, contest), "ann", 0).done == 3
    for at in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:at])
        with pytest.raises(UserError, match=re_path(path)):
            Votes(path, contest)
        assert path.read_bytes() == whole[:at]


def re_path(path: Path) -> str:
    return str(path).replace(".", r"\.")


def test_a_vote_that_cannot_be_written_is_not_counted(tmp_path: Path) -> None:
    folder = tmp_path / "votes"
    ballot = Ballot(Votes(folder / "votes.json", contest_of(2)), "ann", 0)
    ballot.vote("left", "")
    second = ballot.current
    (folder / "votes.json").unlink()
    folder.rmdir()
    folder.write_text("a file where the folder was")
    with pytest.raises(OSError, match="votes"):
        ballot.vote("left", "")
    assert ballot.current == second
    assert ballot.done == 1


VOTING = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from test_compare import contest_of, side_of
from alpaca.evaluation.ballot import Ballot, Votes
ballot = Ballot(Votes(Path(sys.argv[1]), contest_of(60)), "ann", 0)
while ballot.current:
    task = ballot.current.instruction
    ballot.vote(side_of(ballot, "first"), "")
    print(task, flush=True)
"""


def test_killed_at_any_moment_every_acknowledged_vote_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "votes.json"
    rng = random.Random(0)
    told: list[str] = []
    for stop in (7, 23, 60):
        command = [sys.executable, "-c", VOTING, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
            assert child.stdout is not None
            while len(told) < stop and (line := child.stdout.readline()):
                told.append(line.strip())
            if stop < 60:
                time.sleep(rng.random() / 50)  # somewhere within the next vote
                child.kill()
            told += child.stdout.read().split("\n")[:-1]
        votes = saved(path)
        assert {task for _, task in votes} >= set(told)
        assert len(votes) <= len(told) + 1
        told = [task for _, task in votes]  # one may be saved without having been told
    assert set(votes.values()) == {1}
    assert len(votes) == 60


def test_identical_answers_are_ties_that_nobody_is_asked_about(tmp_path: Path) -> None:
    first = answers(tmp_path / "a.json", FIRST, ["same", "x", "blank ", "same"])
    second = answers(tmp_path / "b.json", SECOND, ["same", "y", "blank\n", "same"])
    contest = joined(first, second)
    path = tmp_path / "votes.json"
    ballot = Ballot(Votes(path, contest), "ann", 0)
    assert (ballot.total, ballot.identical) == (1, 3)
    notes = [one["note"] for one in json.loads(path.read_text())]
    assert notes == [IDENTICAL] * 3
    ballot.undo()
    assert len(saved(path)) == 3
    assert Ballot(Votes(path, contest), "ann", 0).identical == 3
    assert len(saved(path)) == 3


def test_the_program_ends_by_itself_but_not_if_the_last_vote_is_undone(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.json", contest_of(1))
    booth = Booth(lambda name: Ballot(votes, name, 0), dict, "ann", linger=0.5)
    listener = listening(0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    states: list[dict[str, Any]] = []

    def send(path: str, **body: str | None) -> None:
        content = json.dumps(body).encode() if body else None
        request = urllib.request.Request(url + path, content, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            states.append(json.load(answer))

    def judge() -> None:
        send("/state")
        send("/vote", pair=states[0]["pair"], choice="left", note="")
        send("/undo", pair=None)
        time.sleep(1)
        send("/vote", pair=states[0]["pair"], choice="right", note="half \ud800")

    client = threading.Thread(target=judge)
    client.start()
    assert booth.serve(listener)
    client.join()
    assert [state["done"] for state in states] == [False, True, False, True]
    assert not any("first" in state for state in states)
    [vote] = votes.of("ann").values()
    assert vote.extra["note"] == "half ?"
    assert vote.preference == 3 - vote.extra["shown_first"]


# ---- the report


def vote(
    task: int, judge: str, preference: float, shown_first: int, **other: Any
) -> dict[str, Any]:
    return {
        "instruction": f"Task {task}",
        "input": "",
        "output_1": f"a{task}",
        "generator_1": FIRST,
        "output_2": f"b{task}",
        "generator_2": SECOND,
        "dataset": "one" if task < 3 else "two",
        "kind": "k",
        "annotator": judge,
        "preference": preference,
        "shown_first": shown_first,
        "note": "",
        "time": "2026-11-28T12:00:00+00:00",
    } | other


T = 1.5
GIVEN = {  # of tasks 0 to 5: the preference, and which output was shown first
    "ann": ((2, 1), (2, 2), (1, 1), (1, 2), (T, 1), (2, 2)),
    "bob": ((2, 2), (1, 1), (1, 1), (T, 1), (T, 2), (2, 2)),
}
HAND = [vote(n, judge, *one) for judge, all_of in GIVEN.items() for n, one in enumerate(all_of)]


def test_the_report_equals_one_worked_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "votes.json"
    path.write_text(json.dumps(HAND))
    verdict = verdicts.load([path])
    counts = {
        (row.group, row.label): (row.rate.wins, row.rate.ties, row.rate.losses)
        for row in verdict.rows
    }
    assert counts == {
        ("all", "all"): (2, 2, 2),  # the judges differ on task 1 (a tie) and 3 (ann's vote counts)
        ("dataset", "one"): (1, 1, 1),
        ("dataset", "two"): (1, 1, 1),
        ("judge", "ann"): (3, 1, 2),
        ("judge", "bob"): (2, 2, 2),
    }
    ann = verdict.rows[3].rate
    assert ann.rate == pytest.approx(100 * 3.5 / 6)
    assert ann.p_value == 1.0  # 3 of 5: 2 * (10 + 5 + 1) / 32
    [(one, other, pairs, kappa)] = verdict.kappas
    # observed 4/6; by chance (2 wins: 3*2, losses: 2*2, ties: 1*2) / 36 = 12/36
    assert (one, other, pairs) == ("ann", "bob", 6)
    assert kappa == pytest.approx((4 / 6 - 12 / 36) / (1 - 12 / 36))
    # 12 votes: 5 wins, 4 losses, 3 ties; unlike ordered pairs 144-25-16-9 = 94, two pairs apart
    assert verdict.alpha == pytest.approx(1 - 11 * 4 / 94)
    # ann's left: 0 lost, 1 won, 2 won, 3 lost, 5 won; bob's: 0 won, 1 won, 2 won, 5 won
    assert verdict.sides == (7, 2)
    figures = json.loads(verdict_forms.as_json(verdict))
    assert figures["position_bias"]["share"] == pytest.approx(700 / 9)
    assert figures["position_bias"]["p_value"] == pytest.approx(2 * (36 + 9 + 1) / 512)
    assert any("7 of 9 times" in line for line in verdict_forms.sentences(verdict))


def test_files_of_several_judges_are_one_report_whatever_the_order_of_models(
    tmp_path: Path,
) -> None:
    whole, ann, bob = (tmp_path / f"{name}.json" for name in ("whole", "ann", "bob"))
    whole.write_text(json.dumps(HAND))
    ann.write_text(json.dumps(HAND[:6]))
    turned = [
        one
        | {f"{key}_{n}": one[f"{key}_{3 - n}"] for key in ("output", "generator") for n in (1, 2)}
        | {"preference": 3 - one["preference"], "shown_first": 3 - one["shown_first"]}
        for one in HAND[6:]
    ]
    bob.write_text(json.dumps(turned))
    assert verdicts.load([ann, bob]) == verdicts.load([whole])
    with pytest.raises(UserError, match="both have ann's vote on one pair"):
        verdicts.load([ann, whole])
    other = tmp_path / "other.json"
    other.write_text(json.dumps([HAND[0] | {"generator_2": "x"}]))
    with pytest.raises(UserError, match=r"other\.json compares base-7b with x"):
        verdicts.load([ann, other])
    other.write_text("[]")
    with pytest.raises(UserError, match="no votes"):
        verdicts.load([other])


def test_ties_without_a_reader_do_not_raise_the_agreement(tmp_path: Path) -> None:
    same = [
        vote(n, judge, 1.5, 1, note=IDENTICAL, output_2=f"a{n}")
        for judge in ("ann", "bob")
        for n in range(6, 30)
    ]
    path = tmp_path / "votes.json"
    path.write_text(json.dumps([*HAND, *same]))
    more = verdicts.load([path])
    path.write_text(json.dumps(HAND))
    plain = verdicts.load([path])
    assert (more.identical, plain.identical) == (24, 0)
    assert (more.kappas, more.alpha) == (plain.kappas, plain.alpha)
    assert more.rows[0].rate.ties == plain.rows[0].rate.ties + 24


def test_a_judge_of_another_program_may_have_weights_gaps_and_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    entries = [
        {
            key: one[key]
            for key in one
            if key not in ("kind", "shown_first", "note", "time", "input")
        }
        | {"preference": preference, "price_per_example": 0.1}
        for one, preference in zip(HAND[:3], (1.75, None, 1.25), strict=True)
    ]
    path.write_text(json.dumps(entries))
    verdict = verdicts.load([path])
    assert (verdict.pairs, verdict.rows[0].rate.rate) == (2, 50.0)
    assert verdict.sides == (0, 0)
    assert verdict.alpha is None


class Parsed(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [name for name, _ in attrs if name in ("src", "href") or name[:2] == "on"]


def test_the_written_page_is_one_file_and_escapes_everything(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script>&"'
    names = {"generator_1": evil, "dataset": evil, "annotator": evil}
    verdict = verdicts.judged(
        read_back(tmp_path, [HAND[0] | names, *(o | names for o in HAND[1:6])])
    )
    text = verdict_forms.page(verdict)
    parsed = Parsed()
    parsed.feed(text)
    parsed.close()
    assert "script" not in parsed.tags
    assert parsed.links == []
    svg = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    widths = [float(one.attrib["width"]) for one in svg.iter() if one.tag == "rect"]
    assert sum(widths[:3]) == pytest.approx(verdict_forms.BAR, abs=0.2)


def read_back(tmp_path: Path, entries: list[dict[str, Any]]) -> Any:
    from alpaca.evaluation import annotations

    path = tmp_path / "read.json"
    path.write_text(json.dumps(entries))
    return annotations.read(path)
