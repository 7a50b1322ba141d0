"""Everything a client may send that is not a plain prediction, and what it gets back."""

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import pytest
from http_server import LONG, SETTINGS, Server, receiver, serving

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"input": {"prompt": ', JSON, 400),
        (b'{"input": {"prompt": "\xff\xfe"}}', JSON, 400),
        (b'{"input": {"prompt": "\\ud800"}}', JSON, 400),
        (b'{"input": {"prompt": "a"}}', {"content-type": "text/plain"}, 415),
        (b'{"input": {"prompt": "a"}}', {}, 422),
        (b"[]", JSON, 422),
        (b'{"input": 7}', JSON, 422),
        (b'{"input": {"prompt": "a"}, "webhook_events_filter": ["never"]}', JSON, 422),
    ],
    ids=str,
)
def test_malformed_requests_get_a_4xx(
    server: Server, body: bytes, headers: dict[str, str], status: int
) -> None:
    answer = server.client.post("/predictions", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.text


def test_a_huge_body_is_refused(server: Server) -> None:
    body = b'{"input": {"prompt": "' + b"a" * (120 * 2**20) + b'"}}'
    try:
        status = server.client.post("/predictions", content=body, headers=JSON).status_code
    except httpx.TransportError:  # the server may close while we still send
        status = 413
    assert status == 413
    server.run_one()


def test_an_input_that_does_not_exist_is_ignored(server: Server) -> None:
    answer = server.post(prompt="a", max_new_tokens=1, colour="red").json()
    assert answer["status"] == "succeeded"


@pytest.mark.parametrize(
    "extremes",
    [
        {"prompt": ""},
        {"prompt": "\u0000 \u202e 👩‍👩‍👧‍👦"},
        {"prompt": "a", "seed": 2**53 - 1},
        {"prompt": "a", "n": 2.0, "seed": 5.0, "total_tokens": 9e3, "top_k": 3.0},
        {"prompt": "a", "top_k": 10**12},
        {"prompt": "a", "total_tokens": 1},
        {"prompt": "a", "total_tokens": 10**15},
        {"prompt": "a", "stop": ["", *["x" * 1000] * 15]},
        {"prompt": "a", "temperature": 5e-324},
        {"prompt": "a", "repetition_penalty": 0.01, "top_p": 0.01},
    ],
    ids=lambda inputs: str(inputs)[:40],
)
def test_every_extreme_within_the_ranges_succeeds(
    server: Server, extremes: dict[str, object]
) -> None:
    answer = server.post(**{"max_new_tokens": 3, **extremes}).json()
    assert answer["status"] == "succeeded", answer


def test_put_is_idempotent_while_it_runs(server: Server) -> None:
    path, asked = "/predictions/once", {"input": LONG}
    first = server.client.put(path, json=asked, headers={"prefer": "respond-async"})
    server.run_one()
    again = server.client.put(path, json=asked)
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json()["id"] == "once"
    wrong = server.client.put(path + "2", json={"id": "other", "input": {"prompt": "a"}})
    assert wrong.status_code == 422
    assert server.client.post(path + "/cancel").status_code == 200
    assert server.client.post("/predictions/never/cancel").status_code == 404
    assert server.idle()


def test_webhooks_tell_start_and_end(server: Server) -> None:
    received: Queue[dict[str, Any]] = Queue()
    with receiver(received.put) as url:
        inputs = {"prompt": "Say hello.", "max_new_tokens": 4, "seed": 3}
        request = {"input": inputs, "webhook": url, "webhook_events_filter": ["start", "completed"]}
        asked = server.client.post(
            "/predictions", json=request, headers={"prefer": "respond-async"}
        )
        assert asked.status_code == 202
        started, completed = received.get(timeout=30), received.get(timeout=30)
    assert started["status"] in ("starting", "processing")
    assert completed["status"] == "succeeded"
    assert completed["output"] == server.post(**inputs).json()["output"]


def test_webhooks_tell_of_a_cancellation(server: Server) -> None:
    received: Queue[dict[str, Any]] = Queue()
    with receiver(received.put) as url:
        request = {"input": LONG, "webhook": url, "webhook_events_filter": ["completed"]}
        headers = {"prefer": "respond-async"}
        server.client.put("/predictions/hooked", json=request, headers=headers)
        server.run_one()
        server.client.post("/predictions/hooked/cancel")
        assert received.get(timeout=30)["status"] == "canceled"
    assert server.idle()


@pytest.mark.parametrize("starts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_lets_running_predictions_finish_and_the_next_start_works(
    endless_model: Path, tmp_path: Path, starts: int
) -> None:
    """One that is waited for, and one that is streamed."""
    inputs = {"prompt": "Tell a story.", "max_new_tokens": 1000, "temperature": 0}
    outputs = []
    for _ in range(starts):
        with serving(endless_model, tmp_path, **SETTINGS) as running, ThreadPoolExecutor(2) as pool:
            answer = pool.submit(running.post, **inputs)
            stream = pool.submit(lambda server: list(server.stream(**inputs)), running)
            running.run_one()
            running.process.send_signal(signal.SIGTERM)
            outputs.append(answer.result().json()["output"])
            *pieces, (last, end) = stream.result()
            assert (last, end["status"]) == ("completed", "succeeded")
            assert ["".join(end["output"])] == outputs[-1]
            assert [data["chunk"] for name, data in pieces if name == "output"] == end["output"]
            assert running.process.wait(60) == 0
    assert len(set(map(str, outputs))) == 1
