"""The HTTP door: Cog's own server with our runner, a tiny model, and requests from outside."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import Server, serving


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_model, tmp_path_factory.mktemp("server")) as running:
        yield running


def test_a_prediction_is_a_list_of_n_strings(server: Server) -> None:
    answer = server.post(prompt="Name a color.", n=3, total_tokens=60).json()
    assert answer["status"] == "succeeded"
    assert len(answer["output"]) == 3
    assert all(isinstance(text, str) for text in answer["output"])


def test_prompt_alone_is_enough_and_greedy_is_repeatable(server: Server) -> None:
    first, second = (
        server.post(prompt="Say hello.", temperature=0, total_tokens=60).json()["output"]
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"prompt": 5},
        {"prompt": None},
        {"prompt": ["a"]},
        {"prompt": "a", "n": 0},
        {"prompt": "a", "n": 6},
        {"prompt": "a", "n": 9},
        {"prompt": "a", "n": 1.5},
        {"prompt": "a", "n": "two"},
        {"prompt": "a", "n": None},
        {"prompt": "a", "total_tokens": 0},
        {"prompt": "a", "total_tokens": "many"},
        {"prompt": "a", "temperature": -0.1},
        {"prompt": "a", "temperature": 5.1},
        {"prompt": "a", "temperature": "hot"},
        {"prompt": "a", "top_p": 0.0},
        {"prompt": "a", "top_p": 1.01},
        {"prompt": "a", "repetition_penalty": 0.0},
        {"prompt": "a", "repetition_penalty": 5.5},
    ],
    ids=str,
)
def test_inputs_out_of_type_or_range_are_refused(server: Server, inputs: dict[str, object]) -> None:
    refused = server.post(**inputs)
    assert refused.status_code == 422
    [detail] = refused.json()["detail"]
    named = [key for key in inputs if key != "prompt"] or ["prompt"]
    assert detail["loc"] == ["body", "input", named[0]]
    assert detail["msg"]


def test_the_schema_is_served(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    assert document["components"]["schemas"]["Input"]["required"] == ["prompt"]
    assert document["paths"]["/predictions"]["post"]["x-cog-streaming"] is True


def test_server_sent_events(server: Server) -> None:
    request = {"input": {"prompt": "Say hello.", "n": 2, "temperature": 0, "total_tokens": 60}}
    accept = {"accept": "text/event-stream"}
    text = server.client.post("/predictions", json=request, headers=accept).text
    events = [dict(line.split(": ", 1) for line in e.splitlines()) for e in text.split("\n\n") if e]
    chunks = [json.loads(e["data"])["chunk"] for e in events if e["event"] == "output"]
    assert len(chunks) == 2
    assert json.loads(events[-1]["data"])["output"] == chunks
