"""The page of the web server, as a person uses it: Chromium against the real server."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from pages import note_errors

from alpaca.errors import UserError
from alpaca.prompt import chat_template, render
from alpaca.serving import schema
from alpaca.serving.engine import Engine
from alpaca.serving.request import Request, Sampling
from alpaca.tokens import Codec
from alpaca.web import app, remote, server
from alpaca.web.runs import Run

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = {"instruction": "Sort the words.", "input": "pear, apple"}
MARKUP = "<img src=/page/none onerror=alert(1)><script>alert(2)</script>"
BLOCK_STORAGE = """Object.defineProperty(window, "localStorage", {
    get() { throw new DOMException("blocked", "SecurityError"); }
})"""
HASTEN = "window.setTimeout = ((wait) => (call, ms) => wait(call, Math.min(ms, 1000)))(setTimeout)"
# Controls whose accessible name is not given by a label, an aria-label or their own text.
UNNAMED = """() => [...document.querySelectorAll("input, select, textarea, button")]
    .filter((one) => !one.labels?.length && !one.ariaLabel && !one.textContent.trim())
    .map((one) => one.outerHTML)"""
TOO_WIDE = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


@contextmanager
def listening(site: app.Site) -> Iterator[server.Web]:
    web = server.Web(site, "127.0.0.1", 0)
    try:
        yield web
    finally:
        web.stop()


def site_of(run: Path | None = None) -> app.Site:
    inputs = schema.find(ROOT, "predict.py:Runner", "run").input_schema()["properties"]
    return app.Site(inputs=inputs, examples=[EXAMPLE], run=Run(run) if run else None)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "alpaca_out"
    folder.mkdir()
    log(folder, 30)
    return folder


def log(folder: Path, steps: int) -> None:
    """A run log as train.py writes it, up to this step of 60."""
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.0}]
    for step in range(1, steps + 1):
        speed = {"tokens_per_second": 900.0, "step_seconds": 2.0, "total_steps": 60}
        lines.append({"step": step, "loss": 3 - step / 40, "lr": 2e-5, **speed})
    sample = {"prompt": "Name a color.", "answer": f"At {steps}: {MARKUP}"}
    lines.append({"step": steps, "eval_loss": 2.5, "samples": [sample]})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def web(served: tuple[Engine, Codec], run_folder: Path) -> Iterator[server.Web]:
    """Two models, which are one engine, and a run to watch."""
    engine, codec = served
    codec.tokenizer.chat_template = chat_template(codec.bos is not None)
    with listening(site_of(run_folder)) as running:
        running.serve("tuned", engine, codec)
        running.serve("base", engine, codec)
        yield running


@dataclass
class Page:
    """A browser's window with the page in it, and what went wrong there."""

    shown: Any
    url: str
    requested: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shown.on("request", lambda request: self.requested.append(request.url))
        note_errors(self.shown, self.errors)

    def set(self, **values: object) -> None:
        self.shown.evaluate("() => (document.getElementById('settings').open = true)")
        for name, value in values.items():
            self.shown.fill(f"#setting-{name}", str(value))

    def ask(self, instruction: str, wait: bool = True) -> None:
        self.shown.fill("#instruction", instruction)
        self.shown.press("#instruction", "Control+Enter")
        if wait:
            self.said(r"^(?!Answering).")

    def said(self, pattern: str) -> None:
        self.eventually("#progress", pattern)

    def eventually(self, selector: str, pattern: str) -> None:
        from playwright.sync_api import expect

        expect(self.shown.locator(selector).first).to_have_text(re.compile(pattern), timeout=20_000)

    def texts(self, selector: str) -> list[str]:
        return list(self.shown.locator(selector).all_text_contents())


@contextmanager
def opened(
    browser: Any, url: str, script: str = "", width: int = 1280, scheme: str = "light"
) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.add_init_script(script)
    page = Page(context.new_page(), url)
    page.shown.goto(url)
    page.eventually("#server-state", "^$|loading")
    yield page
    assert page.requested
    assert all(request.startswith(url) for request in page.requested), page.requested
    assert page.errors == []
    context.close()


def until(true: Any) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_answer_the_prompt_and_the_code_are_those_of_the_engine(
    browser: Any, web: server.Web, served: tuple[Engine, Codec]
) -> None:
    engine, codec = served
    instruction = 'Say "it\'s $HOME" twice.\n\tThen stop\\.'
    ids = tuple(codec.prompt(instruction))
    sampling = Sampling(temperature=0.9, top_p=0.8, seed=5)
    [job] = engine.submit(Request(ids, max_new_tokens=24, sampling=sampling)).completions
    expected = job.result.result(60)
    with opened(browser, web.url) as page:
        page.shown.select_option("#model", label="tuned")
        page.set(temperature=0.9, top_p=0.8, seed=5, max_new_tokens=24)
        page.ask(instruction)
        page.said("^Done.$")
        assert page.texts("#answers .text") == [expected.text]
        [stats] = page.texts("#answers .stats")
        assert stats.startswith(f"{expected.tokens} token")
        assert ("limit" in stats) == (expected.reason == "length")
        shown = page.shown.locator(".token").evaluate_all("all => all.map((one) => one.ariaLabel)")
        assert [int(label.rpartition(" ")[2]) for label in shown] == list(ids)
        assert page.texts("#answers summary")[0] == f"Prompt as sent: {len(ids)} tokens"
        curl, python, _ = page.texts("#answers pre")
    assert run([sys.executable, "-c", python]).rstrip("\n") == expected.text.rstrip("\n")
    if shutil.which("curl"):
        answer = json.loads(run(["sh", "-c", curl]))
        assert answer["choices"][0]["message"]["content"] == expected.text


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_models_answer_an_instruction_with_an_input_side_by_side(
    browser: Any, web: server.Web
) -> None:
    with opened(browser, web.url) as page:
        page.shown.click("#example-list button")
        assert page.shown.input_value("#input") == EXAMPLE["input"]
        page.set(n=2, max_new_tokens=8)
        page.shown.press("#instruction", "Meta+Enter")
        page.said("^Done.$")
        assert page.texts("#answers h3") == ["tuned", "base"]
        assert page.shown.locator("#answers .card").count() == 4
        left, right = page.shown.locator(".group").all()
        assert left.bounding_box()["y"] == right.bounding_box()["y"]
        curl = page.texts("#answers pre")[0]
        assert "/v1/completions" in curl
        assert json.dumps(render(**EXAMPLE)) in curl


class Foreign(BaseHTTPRequestHandler):
    """Another project's server: lists a model, refuses what OpenAI does not know, and streams."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self.send(200, json.dumps({"data": [{"id": "other-7b", "owned_by": "someone"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if self.headers["Authorization"] != "Bearer secret-key":
            return self.send(401, "the key secret-key? no")
        if "top_k" in body:
            return self.send(400, "top_k is not known, secret-key")
        parts = [
            {"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}
            for word in ("A ", "distant ", MARKUP)
        ]
        end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        usage = {"choices": [], "usage": {"completion_tokens": 3}}
        events = [f"data: {json.dumps(one)}\n\n" for one in (*parts, end, usage)]
        return self.send(200, "".join(events) + "data: [DONE]\n\n")

    def send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def foreign() -> Iterator[str]:
    Foreign.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Foreign) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_model_of_another_server_answers_beside_ours(
    browser: Any, web: server.Web, foreign: str
) -> None:
    key = {"ALPACA_COMPARE_KEY": "secret-key"}
    web.site.compared = remote.find(foreign, key)
    try:
        with opened(browser, web.url) as page:
            page.eventually("#title", "tuned and 2 more")
            page.shown.select_option("#model", label="other-7b")
            page.set(max_new_tokens=8, seed=7)
            page.shown.fill("#input", "pear")
            page.ask("Sort.")
            page.said("^Done.$")
            assert page.texts("#answers .text") == [f"A distant {MARKUP}"]
            assert page.texts("#answers .stats")[0].startswith("3 tokens · ")
            assert foreign in page.texts("#answers .about")[0]
            page.set(top_k=3)
            page.ask("Sort.")
            page.eventually("#answers .error", r"status 400: top_k is not known, \[key\]")
    finally:
        web.site.compared = None
    wanted = {"model": "other-7b", "seed": 7, "max_tokens": 8, "temperature": 0.75, "n": 1}
    asked = Foreign.asked[0]
    assert wanted.items() <= asked.items()
    assert asked["messages"] == [{"role": "user", "content": "Sort.\n\npear"}]


def test_our_own_server_elsewhere_gets_the_input_as_such(browser: Any, web: server.Web) -> None:
    web.site.compared = remote.find(web.url, {"ALPACA_COMPARE_MODEL": "base"})
    assert web.site.compared.own
    try:
        with opened(browser, web.url) as page:
            page.set(max_new_tokens=8, temperature=0)
            answers = []
            for index in (1, 2):  # base here, and base there
                page.shown.select_option("#model", value=str(index))
                page.shown.fill("#input", EXAMPLE["input"])
                page.ask(EXAMPLE["instruction"])
                page.said("^Done.$")
                answers.append(page.texts("#answers .text"))
            assert answers[0] == answers[1] != [""]
    finally:
        web.site.compared = None


def test_the_reader_who_leaves_frees_the_slot_of_the_other_server(
    browser: Any, web: server.Web, served: tuple[Engine, Codec]
) -> None:
    web.site.compared = remote.find(web.url, {})
    try:
        with opened(browser, web.url) as page:
            page.shown.select_option("#model", value="2")
            # a seed, or now and then the first answer ends before it has a character
            page.set(n=5, temperature=5, seed=1)
            page.ask("Tell a story.", wait=False)
            page.eventually("#answers .text", "..")
            page.shown.click("#halt")
            page.said("^Stopped.$")
            until(lambda: served[0].idle_slots == 5)
    finally:
        web.site.compared = None


def test_another_server_that_cannot_be_used_is_told(foreign: str) -> None:
    with pytest.raises(UserError, match=r"(?s)does not have x.*other-7b"):
        remote.find(foreign, {"ALPACA_COMPARE_MODEL": "x"})
    with pytest.raises(UserError, match="not a URL"):
        remote.find("http://", {})


def test_the_ranges_are_the_servers_and_a_wrong_value_is_not_sent(
    browser: Any, web: server.Web
) -> None:
    with opened(browser, web.url) as page:
        inputs = web.site.inputs
        for name in ("temperature", "top_p", "top_k", "repetition_penalty", "n"):
            box = page.shown.locator(f"#setting-{name}")
            assert float(box.input_value()) == inputs[name]["default"]
            assert float(box.get_attribute("min")) == inputs[name]["minimum"]
            assert page.texts(f"#setting-{name}-help") == [inputs[name]["description"]]
        page.set(temperature=5.1)
        page.ask("Hello")
        page.said("^Not sent")
        page.eventually("#setting-temperature-error", "from 0 to 5")
        assert page.shown.evaluate("document.activeElement.id") == "setting-temperature"
        page.shown.click("#reset")
        assert page.shown.input_value("#setting-temperature") == "0.75"
        assert not any("/v1/" in request for request in page.requested)


def test_escape_and_the_stop_button_free_the_slots(
    browser: Any, web: server.Web, served: tuple[Engine, Codec]
) -> None:
    engine, _ = served
    with opened(browser, web.url) as page:
        page.shown.select_option("#model", label="tuned")
        page.set(n=5, temperature=5)
        for stop in ("Escape", "button"):
            page.ask("Tell a story.", wait=False)
            page.eventually("#answers .text", "..")
            if stop == "Escape":
                page.shown.keyboard.press("Escape")
            else:
                page.shown.focus("#halt")
                page.shown.keyboard.press("Enter")
            page.said("^Stopped.$")
            stats = page.texts("#answers .stats")
            stopped = r"\d+ tokens? · .*not complete"  # some may have ended by themselves
            assert any(re.match(stopped, text) for text in stats), stats
            until(lambda: engine.idle_slots == 5)
        assert page.shown.evaluate("document.activeElement.id") == "send"


def test_every_failure_is_told_in_words(browser: Any, web: server.Web) -> None:
    def fulfil(**answer: Any) -> None:
        page.shown.route("**/v1/completions", lambda route: route.fulfill(**answer))

    def told(instruction: str, words: str) -> None:
        page.ask(instruction)
        page.eventually("#answers .error", words)
        page.shown.unroute("**/v1/completions")

    error = json.dumps({"error": {"message": "Reasons."}})
    with opened(browser, web.url) as page:
        page.shown.select_option("#model", label="tuned")
        told("word " * 3000, "refused the request. It says: .*token")
        fulfil(status=429, body=error, headers={"Retry-After": "7"})
        told("a", "busy.* Try again in 7 s. It says: Reasons.")
        fulfil(status=503, body="<html>")
        told("a", r"not ready. \(HTTP status 503\)")
        fulfil(body=f"data: {error}\n\n")
        told("a", "stopped this answer. It says: Reasons.")
        fulfil(body='data: {"choices": [{"index": 0, "text": "half"}]}\n\n')
        told("a", "lost before the answer was complete")
        assert page.shown.is_visible("#answers .card")
        assert page.texts("#answers .text") == ["half"]  # what had arrived is kept
        page.shown.route("**/v1/completions", lambda route: route.abort())
        told("a", "cannot be reached")


def test_markup_from_the_model_is_shown_as_text(browser: Any, web: server.Web) -> None:
    chunk = json.dumps({"choices": [{"index": 0, "text": MARKUP, "finish_reason": "stop"}]})
    with opened(browser, web.url) as page:
        page.shown.select_option("#model", label="tuned")
        body = f"data: {chunk}\n\ndata: [DONE]\n\n"
        page.shown.route("**/v1/completions", lambda route: route.fulfill(body=body))
        page.ask(MARKUP)
        page.said("^Done.$")
        assert page.texts("#answers .text") == [MARKUP]
        page.shown.click("#tab-history")
        assert page.texts("#history-list .asked") == [MARKUP]
        page.shown.click("#tab-watch")
        page.eventually("#run-samples .text >> nth=1", "^At 30")
        assert page.shown.locator("main img, main script").count() == 0


def test_the_page_waits_for_the_model(browser: Any, served: tuple[Engine, Codec]) -> None:
    with listening(site_of()) as web, opened(browser, web.url, HASTEN) as page:
        page.eventually("#server-state", "The model is loading")
        page.ask("Hello")
        page.said("not loaded yet")
        web.serve("tiny", *served)
        page.eventually("#server-state", "^$")
        page.set(max_new_tokens=4)
        page.ask("Hello")
        page.said("^Done.$")
        assert page.texts("h1") == ["tiny"]
        assert not page.shown.is_visible("#tab-watch")
        assert not page.shown.is_visible("#model")
        page.set(temperature=0.5)
        web.serve("later", *served)
        page.said("second model is loaded")  # the page asks every 15 s, here every second
        assert page.texts("#model option") == ["Compare both, side by side", "tiny", "later"]
        assert page.shown.input_value("#model") == "0"
        assert page.shown.input_value("#setting-temperature") == "0.5"


@pytest.mark.parametrize("blocked", [False, True])
def test_the_history_is_the_browsers_own(browser: Any, web: server.Web, blocked: bool) -> None:
    with opened(browser, web.url, BLOCK_STORAGE if blocked else "") as page:
        page.set(max_new_tokens=4, temperature=0.5, seed=1)
        for text in ("First", "Second"):
            page.ask(text)
            page.said("^Done.$")
        if blocked:
            page.shown.click("#tab-history")
            page.eventually("#history-state", "lost when the page is closed")
        else:
            page.shown.reload()
            page.eventually("#server-state", "^$")
            page.shown.click("#tab-history")
        assert page.texts("#history-list .asked") == ["Second", "First"]
        page.shown.click("#history-list li:last-child .entry")
        assert page.shown.input_value("#instruction") == "First"
        assert page.shown.input_value("#setting-temperature") == "0.5"
        assert page.shown.locator("#answers .card").count() == 2
        page.shown.click("#tab-history")
        page.shown.click("#history-list li:first-child .small")
        assert page.texts("#history-list .asked") == ["First"]
        page.shown.click("#history-clear")
        page.shown.reload()
        assert page.texts("#history-list .asked") == []


def test_a_watched_run_is_drawn_and_followed(
    browser: Any, web: server.Web, run_folder: Path
) -> None:
    with opened(browser, web.url) as page:
        page.shown.click("#tab-watch")
        page.eventually("#run-facts dd", "^30 of 60$")
        loss = page.shown.locator("figure").first
        marks = loss.locator("polyline").evaluate_all(
            "all => all.map((one) => one.points.numberOfItems)"
        )
        assert marks == [30, 2]
        caption = loss.locator("figcaption").text_content()
        assert "Held-out loss: first 3 at step 0, last 2.5 at step 30" in caption
        log(run_folder, 40)
        page.eventually("#run-facts dd", "^40 of 60$")
        log(run_folder, 30)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_no_barrier(browser: Any, web: server.Web, scheme: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with opened(browser, web.url, width=width, scheme=scheme) as page:
        page.set(max_new_tokens=8, n=2)
        page.ask("Hello")
        page.said("^Done.$")
        for summary in page.shown.locator("#answers summary").all():
            summary.press("Enter")
        for view in ("ask", "history", "watch"):
            page.shown.click(f"#tab-{view}")
            page.shown.locator(f"#{view}").wait_for()
            found = Axe().run(page.shown)
            assert found.violations_count == 0, found.generate_report()


def test_the_keyboard_reaches_everything_and_nothing_is_wider_than_a_phone(
    browser: Any, web: server.Web
) -> None:
    with opened(browser, web.url, width=390) as page:
        page.set(max_new_tokens=8)
        page.ask("Hello " + "x" * 200)
        page.said("^Done.$")
        for summary in page.shown.locator("#answers summary").all():
            summary.press("Enter")
        assert page.shown.evaluate(UNNAMED) == []
        assert page.shown.evaluate(TOO_WIDE) == 0
        page.shown.focus(".token")
        page.shown.keyboard.press("ArrowRight")
        page.eventually(".tokens + p", "^Token 2 of")
        page.shown.focus("#tab-ask")
        for view in ("history", "watch"):
            page.shown.keyboard.press("ArrowRight")
            page.shown.locator(f"#{view}").wait_for()
            assert page.shown.evaluate(TOO_WIDE) == 0
        page.shown.keyboard.press("Home")
        reached = []
        while not reached or reached[-1] != "send":
            page.shown.keyboard.press("Tab")
            reached.append(page.shown.evaluate("document.activeElement.id"))
            assert len(reached) < 20
        assert reached[:2] == ["instruction", "input"]
