"""The page of `compare`, as a judge uses it: Chromium against the real command, also killed."""

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pages import note_errors, serving_page

from alpaca.evaluation import verdict_forms, verdicts

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("vicuna-13b", "guanaco-65b")
STEMS = ("published", "homemade")
SECRETS = (*NAMES, "vicuna", "guanaco", *STEMS, "generator", "output_", "shown_first", "annotator")
MARKUP = "<script>alert(1)</script><img src=/page/none onerror=alert(2)>"
TOO_WIDE = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
# By what the test, and nobody else, tells the models' answers apart.
MARKS = ("kappa", "sigma")
WISHES = {0: MARKS[0], 1: MARKS[1], 2: "tie"}  # by the task's number modulo 3
PREFERENCES = {MARKS[0]: 1, MARKS[1]: 2, "tie": 1.5}
CAST = """async (count) => {
    let state = await (await fetch("/state")).json();
    for (let turn = 0; turn < count; turn++) {
        const body = JSON.stringify({ pair: state.pair, choice: "left", note: "" });
        const headers = { "Content-Type": "application/json" };
        state = await (await fetch("/vote", { method: "POST", headers, body })).json();
    }
}"""


def files(folder: Path, count: int) -> list[Path]:
    """Two files of answers to the same tasks."""
    paths = [folder / f"{stem}.json" for stem in STEMS]
    for path, name, mark in zip(paths, NAMES, MARKS, strict=True):
        items = [
            {
                "instruction": f"Task {n}: explain.",
                "input": f"input of {n} {MARKUP}" if n % 2 else "",
                "output": f"An answer, {mark}\n    indented {MARKUP} " + "word " * (n * 7),
                "generator": name,
                "dataset": "a set",
            }
            for n in range(count)
        ]
        path.write_text(json.dumps(items))
    return paths


def votes_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        (folder / f"{STEMS[0]}-vs-{STEMS[1]}.votes.json").read_text()
    )
    return found


@dataclass
class Command:
    """The running command."""

    process: subprocess.Popen[str]
    url: str

    def ended(self) -> tuple[int, str]:
        """Its exit code, and what it has printed since the address."""
        said, _ = self.process.communicate(timeout=30)
        return self.process.returncode, said


@contextmanager
def comparing(folder: Path, *flags: str) -> Iterator[Command]:
    paths = [str(folder / f"{stem}.json") for stem in STEMS]
    words = [sys.executable, "-m", "alpaca", "compare", *paths, "--no-browser", *flags]
    with serving_page(words, ROOT) as (process, url, _):
        yield Command(process, url)


@dataclass
class Page:
    """A tab, what went over the wire before the result was asked for, and what went wrong."""

    shown: Any
    url: str
    wire: list[str] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    unread: int = 0

    def __post_init__(self) -> None:
        self.shown.on("response", self._heard)
        note_errors(self.shown, self.errors)

    def _heard(self, response: Any) -> None:
        self.unread += 1
        request = response.request
        assert request.url.startswith(self.url), request.url
        both = (request.all_headers(), request.post_data, response.all_headers(), response.text())
        self.wire.append(f"{request.method} {request.url} {both}")
        if "json" in response.headers.get("content-type", ""):
            self.states.append(response.json())
        self.unread -= 1

    def settle(self) -> None:
        """Wait until the bodies are read; the browser forgets them when it leaves the page."""
        while self.unread:
            self.shown.wait_for_timeout(20)

    def text(self, name: str) -> str:
        return str(self.shown.text_content(f"#{name}"))

    def eventually(self, name: str, pattern: str) -> None:
        from playwright.sync_api import expect

        expect(self.shown.locator(f"#{name}")).to_have_text(re.compile(pattern), timeout=20_000)

    def ready(self, count: str) -> None:
        """Wait until this pair, such as "2 of 20", can be voted on."""
        self.eventually("count", f"^{count}$")
        self.shown.wait_for_selector("#pair[aria-busy=false]")

    def wish(self) -> tuple[str, str]:
        """What the test wants for the pair shown, and the key that says so."""
        wanted = WISHES[int(self.text("instruction").split()[1].rstrip(":")) % 3]
        left = self.text("left")
        assert sum(mark in left for mark in MARKS) == 1
        return wanted, "0" if wanted == "tie" else "1" if wanted in left else "2"

    def is_blind(self) -> None:
        """Nothing that the browser has been sent, sends or shows tells whose answers they are."""
        self.settle()
        assert len(self.wire) > 4
        source = self.shown.content() + self.shown.title() + self.shown.url
        for text in (*self.wire, source):
            told = [secret for secret in SECRETS if secret in text.lower()]
            assert not told, f"{told} in {text}"


@contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[Page]:
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    page = Page(context.new_page(), url)
    page.shown.goto(url)
    page.shown.wait_for_selector("#ask:not([hidden]), #pair:not([hidden]), #end:not([hidden])")
    yield page
    page.settle()
    assert page.errors == []
    context.close()


def test_twenty_pairs_by_keyboard_with_a_kill_after_the_tenth(browser: Any, tmp_path: Path) -> None:
    files(tmp_path, 20)
    wanted: dict[str, str] = {}

    def judge(page: Page, numbers: range) -> None:
        for number in numbers:
            page.ready(f"{number} of 20")
            wish, key = page.wish()
            assert page.text("instruction") not in wanted
            wanted[page.text("instruction")] = wish
            if number == 3:
                for one in ("n", *"sure 120u", "Escape"):  # keys of the field are no votes
                    page.shown.keyboard.press("Space" if one == " " else one)
            page.shown.keyboard.press(key)
            page.eventually("count", f"^{min(number + 1, 20)} of 20$")

    with comparing(tmp_path) as command, opened(browser, command.url) as page:
        page.shown.keyboard.type(" Ann ")  # the field has the focus
        page.shown.keyboard.press("Enter")
        judge(page, range(1, 11))
        page.ready("11 of 20")
        command.process.send_signal(signal.SIGKILL)
        command.process.wait()
        assert len(votes_of(tmp_path)) == 10
        page.shown.keyboard.press("1")
        page.eventually("message", "The program does not answer.*No counted vote is lost")
        page.is_blind()
    with (
        comparing(tmp_path, "--judge", "Ann") as command,
        opened(browser, command.url) as page,
    ):
        judge(page, range(11, 21))
        page.eventually("end-text", r"^20 votes saved\.$")
        page.is_blind()
        page.shown.click("#finish")
        code, said = command.ended()
        assert code == 0, said
        assert "Ann has judged all of 20." in said
        assert f"{NAMES[1]} against {NAMES[0]}" in said
        assert re.search(r"all\W+7\W+6\W+7\W", said)  # of 20 tasks: 7 first, 7 second, 6 ties
    votes = votes_of(tmp_path)
    assert {one["instruction"]: one["preference"] for one in votes} == {
        task: PREFERENCES[wish] for task, wish in wanted.items()
    }
    assert len(votes) == 20
    for one in votes:
        assert (one["generator_1"], one["generator_2"], one["annotator"]) == (*NAMES, "Ann")
        assert MARKS[0] in one["output_1"]
        assert MARKS[1] in one["output_2"]
    assert [one["note"] for one in votes if one["note"]] == ["sure 120u"]
    assert {one["shown_first"] for one in votes} == {1, 2}


def test_nothing_tells_whose_answers_they_are_before_the_result(
    browser: Any, tmp_path: Path
) -> None:
    files(tmp_path, 40)
    with (
        comparing(tmp_path, "--judge", "ann") as command,
        opened(browser, command.url) as page,
    ):
        page.shown.evaluate(CAST, 40)
        page.settle()
        page.shown.reload()
        page.eventually("end-title", "Thank you")
        page.is_blind()
        pairs = {state["pair"]: state for state in page.states if state.get("pair")}
        assert len(pairs) == 40
        assert len({tuple(state) for state in pairs.values()}) == 1  # one order of keys
        lefts = [MARKS[0] in state["left"] for state in pairs.values()]
        bits = [int(ticket, 16) % 2 == 1 for ticket in pairs]
        places = [place % 2 == 0 for place in range(40)]
        lengths = [len(state["left"]) > len(state["right"]) for state in pairs.values()]
        for other in ([True] * 40, bits, places, lengths, [*lefts[1:], lefts[0]]):
            same = sum(one == two for one, two in zip(lefts, other, strict=True))
            assert 10 <= same <= 30, (same, other)  # a fair coin: outside in one of 1,000
        page.shown.click("#show")
        page.eventually("result", f"{NAMES[1]} against {NAMES[0]}")
        assert command.ended()[0] == 0
    votes = {one["instruction"]: one for one in votes_of(tmp_path)}
    for state in pairs.values():
        vote = votes[state["instruction"]]
        assert vote["shown_first"] == vote["preference"] == 1 + (MARKS[1] in state["left"])


def test_undo_deletes_votes_one_after_the_other_and_gives_the_note_back(
    browser: Any, tmp_path: Path
) -> None:
    files(tmp_path, 3)
    with (
        comparing(tmp_path, "--judge", "ann") as command,
        opened(browser, command.url) as page,
    ):
        page.shown.keyboard.press("u")  # nothing to undo
        tasks = []
        for number in (1, 2, 3):
            page.ready(f"{number} of 3")
            tasks.append(page.text("instruction"))
            page.shown.fill("#note", f"note {number}")
            page.shown.click("[data-choice=left]")
        page.eventually("end-text", "3 votes saved")
        page.shown.keyboard.press("u")
        for number in (3, 2, 1):
            page.ready(f"{number} of 3")
            assert page.text("instruction") == tasks[number - 1]
            assert page.shown.input_value("#note") == f"note {number}"
            assert [one["instruction"] for one in votes_of(tmp_path)] == tasks[: number - 1]
            if number > 1:
                page.shown.click("#undo")
        page.shown.uncheck("#shortcuts")
        page.shown.keyboard.press("2")
        page.shown.click("[data-choice=tie]")
        page.ready("2 of 3")
        [vote] = votes_of(tmp_path)
        assert (vote["preference"], vote["note"]) == (1.5, "note 1")
        page.is_blind()


def test_a_vote_from_a_tab_that_is_behind_is_refused(browser: Any, tmp_path: Path) -> None:
    files(tmp_path, 4)
    with (
        comparing(tmp_path, "--judge", "ann") as command,
        opened(browser, command.url) as page,
        opened(browser, command.url) as behind,
    ):
        page.ready("1 of 4")
        behind.ready("1 of 4")
        page.shown.keyboard.press("1")
        page.ready("2 of 4")
        behind.shown.keyboard.press("2")
        behind.eventually("message", "another tab")
        behind.ready("2 of 4")
        assert behind.text("instruction") == page.text("instruction")
        behind.shown.keyboard.press("2")
        behind.ready("3 of 4")
        behind.eventually("message", "^$")
        page.shown.keyboard.press("u")
        page.eventually("message", "another tab")
        page.ready("3 of 4")
        first, second = votes_of(tmp_path)
        assert first["preference"] == first["shown_first"]
        assert second["preference"] == 3 - second["shown_first"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_barrier_and_nothing_is_wider_than_a_phone(
    browser: Any, tmp_path: Path, scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    files(tmp_path, 2)

    def check() -> None:
        for width in (390, 1280):
            page.shown.set_viewport_size({"width": width, "height": 800})
            assert page.shown.evaluate(TOO_WIDE) == 0
            if (width == 390) == (scheme == "dark"):  # a theme changes colours, a width the order
                found = Axe().run(page.shown)
                assert found.violations_count == 0, found.generate_report()
            if page.shown.is_visible("#pair"):
                left, right = (
                    page.shown.locator(f"#{s}").bounding_box() for s in ("left", "right")
                )
                assert (left["y"] == right["y"]) == (width == 1280)

    with (
        comparing(tmp_path) as command,
        opened(browser, command.url, color_scheme=scheme) as page,
    ):
        page.shown.wait_for_selector("#name")
        check()
        page.shown.click("#ask button")
        page.eventually("message", "1 to 60 printable characters")
        page.shown.fill("#name", "ann")
        page.shown.press("#name", "Enter")
        page.ready("1 of 2")
        check()
        reached: list[str] = []
        while not reached or reached[-1] != "undo":
            page.shown.keyboard.press("Tab")
            reached.append(page.shown.evaluate("document.activeElement.id || 'vote'"))
            assert len(reached) < 12, reached
        assert reached == ["note", "shortcuts", "vote", "vote", "vote", "undo"]
        page.shown.keyboard.press("Shift+Tab")
        page.shown.keyboard.press("Enter")
        page.ready("2 of 2")
        page.shown.keyboard.press("0")
        page.eventually("end-title", "Thank you")
        check()
        page.shown.click("#show")
        page.shown.wait_for_selector("#result table")
        check()
        assert command.ended()[0] == 0
    votes, report = tmp_path / "published-vs-homemade.votes.json", tmp_path / "report.html"
    verdict_forms.tell(verdicts.load([votes]), report, None)
    context = browser.new_context(color_scheme=scheme)
    written = context.new_page()
    written.goto(report.as_uri())
    found = Axe().run(written)
    assert found.violations_count == 0, found.generate_report()
    context.close()


def post(url: str, **headers: str) -> int:
    request = urllib.request.Request(url, b"{}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_other_sites_other_hosts_and_a_second_command_are_refused_and_ctrl_c_is_clean(
    tmp_path: Path,
) -> None:
    files(tmp_path, 3)
    json_type = {"Content-Type": "application/json"}
    with comparing(tmp_path, "--judge", "ann", "--seed", "7") as command:
        vote = f"{command.url}vote"
        assert post(vote, **{"Content-Type": "text/plain"}) == 415
        assert post(vote, **json_type, Origin="http://evil.example") == 403
        assert post(vote, **json_type, Host="evil.example") == 400
        assert post(vote, **json_type) == 400  # no choice
        assert post(f"{command.url}undo", **json_type) == 409  # no pair
        assert post(f"{command.url}result", **json_type) == 409  # there are pairs to judge
        assert post(f"{command.url}page/..%2fbooth.py", **json_type) in (404, 405)
        with pytest.raises(AssertionError, match="is open in another compare"):
            comparing(tmp_path, "--judge", "bob").__enter__()
        command.process.send_signal(signal.SIGINT)
        code, said = command.ended()
        assert code == 130
        assert "0 of 3 votes of ann are saved" in said
        assert "--judge ann --seed 7" in said
        assert "Traceback" not in said
    assert not (tmp_path / f"{STEMS[0]}-vs-{STEMS[1]}.votes.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{s}.json" for s in sorted(STEMS)]
