"""OpenAI's /v1 over real HTTP: the same engine as /predictions, and what is refused."""

import asyncio
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from engines import engine_of, tiny
from http_server import SETTINGS, Server, free_port, varied
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerBase

from alpaca.prompt import render
from alpaca.serving import remote
from alpaca.serving.border import Limits
from alpaca.serving.engine import Engine
from alpaca.serving.request import Request, Sampling
from alpaca.tokens import Codec
from alpaca.web import app, server

GREEDY = Sampling(temperature=0)
LONG = {"prompt": [5, 6, 7], "max_tokens": 2000, "ignore_eos": True, "temperature": 0}
ROOT = Path(__file__).resolve().parent.parent
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")


@contextmanager
def listening(site: app.Site, *served: tuple[str, Engine, Codec]) -> Iterator[server.Web]:
    web = server.Web(site, "127.0.0.1", 0)
    for one in served:
        web.serve(*one)
    yield web
    web.stop()


@pytest.fixture(scope="module", params=["own", "url"])
def served(
    request: pytest.FixtureRequest, bpe: PreTrainedTokenizerBase
) -> Iterator[tuple[Any, Codec]]:
    """An engine of five slots and eight places to wait: the own one, or one that asks it by /v1."""
    codec = Codec(bpe)
    own = engine_of(tiny("llama", bpe), codec, slots=5, waiting=8)
    try:
        if request.param == "own":
            yield own, codec
            return
        with listening(app.Site(), ("tiny", own, codec)) as behind:
            servers = [remote.Server(f"{behind.url}v1", "tiny")]
            limits, capacity = Limits(waiting=8), own.capacity
            asking = remote.RemoteEngine(servers, own.table, own.ends, capacity, limits=limits)
            asking.start()
            yield asking, codec
            asking.stop()
    finally:
        own.stop()


@pytest.fixture(scope="module")
def web(served: tuple[Engine, Codec]) -> Iterator[server.Web]:
    """A server around an engine of five slots and eight places to wait."""
    with listening(app.Site(), ("tiny", *served)) as running:
        yield running


@pytest.fixture(scope="module")
def client(web: server.Web) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{web.url}v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def http(web: server.Web) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=web.url, timeout=60) as made:
        yield made


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_chat_has_the_prompt_and_the_answer_of_the_engine(
    client: openai.OpenAI, served: tuple[Engine, Codec]
) -> None:
    engine, codec = served
    for text in ("Name three colors.", " 1 + 1 = 🙂\n", f"say {codec.tokenizer.eos_token} twice"):
        ids = tuple(codec.prompt(text))
        sampling = Sampling(temperature=0.9, top_p=0.8, seed=11)
        job = engine.submit(Request(ids, n=2, max_new_tokens=24, sampling=sampling))
        expected = [one.result.result(60) for one in job.completions]
        found = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": text}],
            n=2,
            max_completion_tokens=24,
            temperature=0.9,
            top_p=0.8,
            seed=11,
        )
        assert [choice.message.content for choice in found.choices] == [a.text for a in expected]
        reasons = {"eos": "stop", "length": "length"}
        assert [c.finish_reason for c in found.choices] == [reasons[a.reason] for a in expected]
        assert found.usage is not None
        assert found.usage.prompt_tokens == len(ids)
        assert found.usage.completion_tokens == sum(answer.tokens for answer in expected)
        same = client.completions.create(
            model="tiny", prompt=list(ids), n=2, max_tokens=24, temperature=0.9, top_p=0.8, seed=11
        )
        assert [choice.text for choice in same.choices] == [answer.text for answer in expected]


def test_a_stream_is_the_whole_answer_in_pieces(
    client: openai.OpenAI, served: tuple[Any, Codec]
) -> None:
    settings: dict[str, Any] = {
        "model": "tiny", "messages": [{"role": "user", "content": "Tell a story."}], "seed": 3,
        "n": 3, "max_completion_tokens": 60, "stop": ["zz", "e"], "temperature": 1.2,
    }  # fmt: skip
    whole = client.chat.completions.create(**settings)
    texts, reasons, usage, roles = {}, {}, None, set()
    for chunk in client.chat.completions.create(
        **settings, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
            roles.add(choice.delta.role)
    assert [texts[at] for at in range(3)] == [c.message.content for c in whole.choices]
    assert [reasons[at] for at in range(3)] == [c.finish_reason for c in whole.choices]
    if isinstance(served[0], Engine):  # a text that a stop ends is counted by its pieces elsewhere
        assert usage == whole.usage
    assert roles == {"assistant", None}
    assert not any("e" in text for text in texts.values())


def test_top_p_zero_is_greedy(client: openai.OpenAI) -> None:
    ids = [5, 6, 7]
    greedy, narrow = (
        client.completions.create(model="tiny", prompt=ids, max_tokens=12, **settings)
        for settings in ({"temperature": 0}, {"top_p": 0})
    )
    assert narrow.choices[0].text == greedy.choices[0].text


def test_several_prompts_are_answered_in_order(client: openai.OpenAI, http: httpx.Client) -> None:
    texts = ["One", "Two two", "Three three three"]
    alone = [
        client.completions.create(model="tiny", prompt=text, temperature=0, max_tokens=8)
        for text in texts
    ]
    together = client.completions.create(model="tiny", prompt=texts, temperature=0, max_tokens=8)
    assert [c.text for c in together.choices] == [one.choices[0].text for one in alone]
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    echoed = client.completions.create(
        model="tiny", prompt=texts, temperature=0, max_tokens=8, echo=True
    )
    assert [c.text for c in echoed.choices] == [
        text + c.text for text, c in zip(texts, together.choices, strict=True)
    ]


@pytest.mark.parametrize("served", ["own"], indirect=True)
def test_log_probabilities_are_the_engines(
    client: openai.OpenAI, served: tuple[Engine, Codec]
) -> None:
    engine, codec = served
    ids = codec.prompts(["The answer is รา 42"])[0]
    job = engine.submit(
        Request(tuple(ids), max_new_tokens=6, sampling=GREEDY, logprobs=2, prompt_logprobs=True)
    )
    job.completions[0].result.result(60)
    expected = [one.logprob for one in [*job.prompt_scored, *job.completions[0].scored]]
    for stream in (False, True):
        made = client.completions.create(
            model="tiny", prompt=ids, max_tokens=6, temperature=0, echo=True, logprobs=2,
            stream=stream,
        )  # fmt: skip
        chunks = list(made) if stream else [made]
        found = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
        values = [value for one in found for value in one.token_logprobs]
        assert values[0] is None
        assert values[1:] == pytest.approx(expected, abs=1e-5)
        tops = [top for one in found for top in one.top_logprobs]
        best = [max(top.values()) for top in tops[len(ids) :]]
        assert best == values[len(ids) :]  # greedy: exactly the likeliest, as lm-eval asks
        offsets = [offset for one in found for offset in one.text_offset]
        assert offsets == sorted(offsets)
        assert offsets[0] == 0
    only = client.completions.create(
        model="tiny", prompt=ids, max_tokens=0, temperature=0, echo=True, logprobs=0
    ).choices[0]
    assert only.logprobs is not None
    assert len(only.logprobs.token_logprobs or []) == len(ids)
    assert only.text == codec.decode(ids)
    assert only.finish_reason == "length"
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=5, temperature=0,
        logprobs=True, top_logprobs=3,
    ).choices[0]  # fmt: skip
    assert chat.logprobs is not None
    content = chat.logprobs.content or []
    spelled = b"".join(bytes(token.bytes or []) for token in content)
    assert spelled.decode(errors="replace").rstrip("\ufffd") == chat.message.content
    assert all(len(token.top_logprobs) == 3 for token in content)


@pytest.mark.parametrize("served", ["own"], indirect=True)
def test_tokens_of_a_stop_text_have_no_log_probabilities(client: openai.OpenAI) -> None:
    plain = client.completions.create(
        model="tiny", prompt="One two", max_tokens=40, seed=1, logprobs=0, temperature=2
    ).choices[0]
    stop = plain.text[10:12]
    cut = client.completions.create(
        model="tiny", prompt="One two", max_tokens=40, seed=1, logprobs=0, temperature=2, stop=stop
    ).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == plain.text[: plain.text.index(stop)]
    assert cut.logprobs is not None
    assert plain.logprobs is not None
    tokens = cut.logprobs.tokens or []
    assert tokens == (plain.logprobs.tokens or [])[: len(tokens)]
    assert (cut.logprobs.text_offset or [])[-1] < len(cut.text)


@pytest.mark.parametrize("served", ["own"], indirect=True)
def test_a_stream_has_the_log_probabilities_of_the_whole_answer(client: openai.OpenAI) -> None:
    """Text that may begin a stop text is held back, and so are its tokens."""
    for seed in range(12):
        settings: dict[str, Any] = {
            "model": "tiny", "prompt": "One two", "max_tokens": 40, "seed": seed, "logprobs": 0,
            "temperature": 1.5, "stop": ["en", "Res", " th"], "echo": bool(seed % 2),
        }  # fmt: skip
        whole = client.completions.create(**settings).choices[0]
        chunks = [chunk.choices[0] for chunk in client.completions.create(**settings, stream=True)]
        assert "".join(chunk.text for chunk in chunks) == whole.text
        for name in ("tokens", "token_logprobs", "text_offset"):
            pieces = [value for chunk in chunks for value in getattr(chunk.logprobs, name)]
            assert pieces == getattr(whole.logprobs, name), name
        offsets = whole.logprobs.text_offset
        for token, offset in zip(whole.logprobs.tokens, offsets, strict=True):
            if not token.startswith(("bytes:", "<")) and "\ufffd" not in whole.text:
                assert token.lstrip().startswith(whole.text[offset : offset + len(token)].lstrip())


@pytest.mark.parametrize("served", ["url"], indirect=True)
def test_a_server_without_ids_gives_no_log_probabilities(http: httpx.Client) -> None:
    asked = {"prompt": "Say hello.", "max_tokens": 2, "logprobs": 1}
    answer = http.post("/v1/completions", json=asked)
    assert answer.status_code == 400
    assert "tells no ids" in answer.json()["error"]["message"]
    assert http.post("/v1/completions", json={**asked, "logprobs": None}).status_code == 200


def test_an_answer_may_be_sent_back_as_a_message(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hi."}]
    for _ in range(2):
        made = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=5, temperature=0
        )
        messages += [made.choices[0].message, {"role": "user", "content": "And more?"}]
    assert made.usage is not None
    assert made.usage.prompt_tokens > 60


def test_millions_of_wrong_items_cost_little(http: httpx.Client) -> None:
    for body in (
        b'{"prompt": [' + b"1.5," * 400_000 + b"1]}",
        b'{"prompt": "a", ' + b",".join(b'"k%d":1' % n for n in range(200_000)) + b"}",
        b'{"messages": [' + b"1," * 400_000 + b"1]}",
        b'{"messages": [' + b'{"role":"user","content":""},' * 5000 + b"1]}",
    ):
        door = "completions" if b"prompt" in body else "chat/completions"
        answer = http.post(
            f"/v1/{door}", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400
        assert len(answer.content) < 1000


BAD: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("completions", {"prompt": "a", "model": "gpt-4"}, 404, "model"),
    ("completions", {"prompt": "a", "frobnicate": 1}, 400, "frobnicate"),
    ("completions", {}, 400, "prompt"),
    ("completions", {"prompt": ""}, 400, None),
    ("completions", {"prompt": []}, 400, "prompt"),
    ("completions", {"prompt": [[]]}, 400, None),
    ("completions", {"prompt": [10**9], "echo": True}, 400, None),
    ("completions", {"prompt": [2**32], "echo": True}, 400, "prompt"),
    ("completions", {"prompt": [1, "a"]}, 400, "prompt"),
    ("completions", {"prompt": ["a"] * 257}, 400, "prompt"),
    ("completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
    ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
    ("completions", {"prompt": "a", "n": 6}, 400, None),
    ("completions", {"prompt": "a", "n": 2, "best_of": 3}, 400, "best_of"),
    ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
    ("completions", {"prompt": "a", "logit_bias": {"5": 1}}, 400, "logit_bias"),
    ("completions", {"prompt": "a", "stop": ["a"] * 17}, 400, None),
    ("completions", {"prompt": "a " * 100_000}, 400, None),
    ("chat/completions", {"messages": []}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": "system", "content": "a"}]}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a", "b": 1}]}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400,
     "tools"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, 400,
     "top_logprobs"),
    ("chat/completions",
     {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 400,
     "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("door", "body", "status", "param"), BAD)
def test_a_bad_request_is_refused_with_openais_object(
    http: httpx.Client, door: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    answer = http.post(f"/v1/{door}", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


def test_what_is_no_json_or_too_much_is_refused_unread(http: httpx.Client) -> None:
    for content in (b"", b"{", b"[1]", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"NaN"):
        answer = http.post(
            "/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400, (content, answer.text)
    assert http.post("/v1/completions", content=b"{}").status_code == 415
    large = {"prompt": "a" * app.LARGEST_BODY}
    assert http.post("/v1/completions", json=large).status_code == 413
    assert http.get("/v1/completions").status_code == 405
    assert http.get("/nothing").status_code == 404
    assert http.get("/page/..%2fapp.py").status_code == 404


def test_a_full_queue_is_429_and_a_reader_that_leaves_frees_its_slots(
    web: server.Web, served: tuple[Engine, Codec]
) -> None:
    """The engine has five slots and eight places; the rest is told when to come again."""
    engine, _ = served

    async def flood() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{web.url}v1", api_key="none", max_retries=0
        ) as many:
            streams = []
            for _ in range(5):
                streams.append(
                    await many.completions.create(
                        model="tiny",
                        stream=True,
                        prompt=LONG["prompt"],
                        max_tokens=LONG["max_tokens"],
                        extra_body={"ignore_eos": True},
                    )
                )
                await streams[-1].__anext__()
            waiting = [asyncio.create_task(post(web, LONG)) for _ in range(8)]
            while engine.waiting < 8:
                await asyncio.sleep(0.02)
            with pytest.raises(openai.RateLimitError) as full:
                await many.completions.create(model="tiny", prompt="a")
            assert full.value.response.headers["retry-after"] == "1"
            for task in waiting:
                task.cancel()
            while engine.waiting:
                await asyncio.sleep(0.02)
            for stream in streams:
                await stream.close()

    asyncio.run(flood())
    until(lambda: engine.idle_slots == 5)
    assert engine.measures.ended["canceled"] >= 13


async def post(web: server.Web, body: dict[str, Any]) -> int:
    async with httpx.AsyncClient(base_url=web.url, timeout=60) as http:
        return (await http.post("/v1/completions", json=body)).status_code


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_at_any_moment_free_their_slots(
    web: server.Web, served: tuple[Engine, Codec], stream: bool
) -> None:
    engine, _ = served
    body = json.dumps({**LONG, "stream": stream}).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(body)}\r\n\r\n".encode()
    )
    for number in range(20):
        with socket.create_connection((web.host, web.port)) as client:
            client.sendall(head + body)
            time.sleep(random.Random(number).choice([0, 0.001, 0.02, 0.1]))
    until(lambda: engine.idle_slots == 5 and engine.waiting == 0)


def test_the_key_is_asked_for_in_two_ways(served: tuple[Engine, Codec]) -> None:
    with listening(app.Site(key="s3cret é"), ("tiny", *served)) as web:
        http = httpx.Client(base_url=web.url)
        for path in ("/", "/v1/models", "/metrics", "/page/settings", "/page/app.js"):
            answer = http.get(path)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"].startswith("Basic ")
        basic = httpx.BasicAuth("anyone", "s3cret é")
        assert http.get("/v1/models", auth=basic).status_code == 200
        bearer = {"Authorization": "Bearer s3cret é".encode()}
        assert http.get("/v1/models", headers=bearer).status_code == 200
        wrong = {"Authorization": "Bearer s3cret"}
        assert http.get("/v1/models", headers=wrong).status_code == 401
        assert http.get("/health").json() == {"status": "ok"}
        http.close()


def test_another_site_cannot_ask(served: tuple[Engine, Codec]) -> None:
    """Neither by a name that it points here, nor by a script, unless its origin is named."""
    with listening(app.Site(), ("tiny", *served)) as web:
        ask = {"prompt": "a", "max_tokens": 1}
        rebound = {"Host": f"evil.example:{web.port}"}
        assert httpx.post(f"{web.url}v1/completions", json=ask, headers=rebound).status_code == 403
        origin = {"Origin": "https://site.example", "Access-Control-Request-Method": "POST"}
        preflight = httpx.options(f"{web.url}v1/completions", headers=origin)
        assert "access-control-allow-origin" not in preflight.headers
    with listening(app.Site(key="k", origins=["https://site.example"]), ("tiny", *served)) as web:
        preflight = httpx.options(f"{web.url}v1/completions", headers=origin)
        assert preflight.headers["access-control-allow-origin"] == "https://site.example"


def test_settings_that_leave_the_server_open_or_shut_are_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wide = {"ALPACA_WEB_PORT": "0", "ALPACA_WEB_HOST": "0.0.0.0"}
    assert server.start({}, {}, ROOT) is None
    assert server.start(wide, {}, ROOT) is None
    assert "Set ALPACA_API_KEY" in capsys.readouterr().err
    assert server.start({"ALPACA_WEB_PORT": "http"}, {}, ROOT) is None
    assert "ALPACA_WEB_PORT is 'http'" in capsys.readouterr().err
    for more in ({"ALPACA_API_KEY": "k"}, {"ALPACA_WEB_OPEN": "1"}):
        opened = server.start(wide | more, {}, ROOT)
        assert opened is not None
        opened.stop()
    assert "k" not in capsys.readouterr().out.replace("/", "").split()


@pytest.mark.parametrize("served", ["own"], indirect=True)  # others tell pieces, of several tokens
def test_metrics_are_prometheus(http: httpx.Client, client: openai.OpenAI) -> None:
    def read() -> dict[str, float]:
        families = text_string_to_metric_families(http.get("/metrics").text)
        return {
            sample.name
            + sample.labels.get("le", "")
            + sample.labels.get("reason", ""): sample.value
            for family in families
            for sample in family.samples
        }

    before = read()
    client.completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=9, temperature=0, extra_body={"ignore_eos": True}
    )
    after = read()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["alpaca_requests_total"] == 1
    assert grown["alpaca_prompt_tokens_total"] == 3
    assert grown["alpaca_generated_tokens_total"] == 9
    assert grown["alpaca_answers_totallength"] == 1
    assert grown["alpaca_time_to_first_token_seconds_count"] == 1
    assert grown["alpaca_time_between_tokens_seconds_bucket+Inf"] == 8
    assert after["alpaca_slots"] == 5


def test_the_dashboard_asks_for_metrics_that_are_there(http: httpx.Client) -> None:
    text = http.get("/metrics").text
    told = {
        sample.name for family in text_string_to_metric_families(text) for sample in family.samples
    }
    told |= {name.removesuffix("_bucket") for name in told}
    panels = json.loads((ROOT / "deploy/grafana.json").read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    named = {name for expression in asked for name in re.findall(r"alpaca_\w+", expression)}
    assert len(named) > 8
    assert named <= told | {"alpaca_answers_total"}


@pytest.mark.slow
def test_schemathesis_finds_no_5xx(bpe: PreTrainedTokenizerBase) -> None:
    """It reads /openapi.json and makes requests of its own, valid and not."""
    codec = Codec(bpe)
    engine = engine_of(tiny("llama", bpe), codec, slots=5, length=64)
    with listening(app.Site(), ("tiny", engine, codec)) as web:
        done = subprocess.run(
            [
                SCHEMATHESIS, "run", f"{web.url}openapi.json", "--checks", "not_a_server_error",
                "--max-examples", "40", "--seed", "1", "--request-timeout", "60",
                "--phases", "examples,coverage,fuzzing", "--no-color",
            ],
            capture_output=True,
            text=True,
        )  # fmt: skip
    engine.stop()
    assert done.returncode == 0, done.stdout[-4000:]
    assert "5 selected / 5 total" in done.stdout


def test_while_the_model_loads_all_but_the_page_is_503(served: tuple[Engine, Codec]) -> None:
    with listening(app.Site()) as web, httpx.Client(base_url=web.url) as http:
        for answer in (http.get("/health"), http.get("/v1/models"),
                       http.post("/v1/completions", json={"prompt": "a"})):  # fmt: skip
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
        assert http.get("/").status_code == 200
        assert http.get("/page/settings").json()["ready"] is False
        web.serve("tiny", *served)
        assert http.get("/health").status_code == 200
        assert http.get("/page/settings").json()["ready"] is True


def test_the_page_is_told_the_prompt_token_by_token(
    http: httpx.Client, served: tuple[Engine, Codec]
) -> None:
    _, codec = served
    told = http.post("/page/prompt", json={"instruction": "Sum up.", "input": "é 1"}).json()
    assert told["text"] == render("Sum up.", "é 1")
    assert [token["id"] for token in told["tokens"]] == codec.prompt("Sum up.", "é 1")


def test_both_doors_at_once_each_client_gets_its_own_answer(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Cog's real server with its second port: 64 clients, half of them on each door."""
    port = free_port()
    running = Server(
        tiny_model, tmp_path / "log", "--web-port", str(port), **SETTINGS, ALPACA_MAX_SECONDS="60"
    )
    try:
        running.wait_until_ready()
        v1 = httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=120)
        [model] = v1.get("/models").json()["data"]
        assert model["id"] == tiny_model.name

        def cog(index: int) -> list[str]:
            return list(running.post(**varied(index)).json()["output"])

        def openais(index: int) -> list[str]:
            asked = varied(index)
            messages = [{"role": "user", "content": asked.pop("prompt")}]
            most = asked.pop("max_new_tokens")
            body = {**asked, "messages": messages, "max_tokens": most, "temperature": 0.75}
            choices = v1.post("/chat/completions", json=body).json()["choices"]
            return [choice["message"]["content"] for choice in choices]

        with ThreadPoolExecutor(64) as pool:
            one = [pool.submit(cog if n % 2 else openais, n) for n in range(64)]
            other = [pool.submit(openais if n % 2 else cog, n) for n in range(64)]
            for number in range(64):
                assert one[number].result() == other[number].result(), number
        v1.close()
    finally:
        running.stop()


def test_a_web_port_that_is_taken_costs_only_the_web_server(
    tiny_model: Path, tmp_path: Path
) -> None:
    """`serve` refuses a taken port; a container's server that finds one goes on without."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert server.start({"ALPACA_WEB_PORT": port}, {}, ROOT) is None
        refused = Server(tiny_model, tmp_path / "log", "--web-port", port)
        assert refused.process.wait(60) == 2
        assert f"Port {port} is in use." in refused.log.read_text()
        refused.stop()


def test_the_thread_ends_with_the_server(served: tuple[Engine, Codec]) -> None:
    with listening(app.Site(), ("tiny", *served)) as web:
        assert "web" in {thread.name for thread in threading.enumerate()}
        url = web.url
    with pytest.raises(httpx.TransportError):
        httpx.get(url)
