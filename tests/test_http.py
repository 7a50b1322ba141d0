"""The HTTP door: Cog's own server with our runner, a tiny model, and requests from outside."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from http_server import LONG, Server, events, varied


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


def test_a_stream_comes_in_pieces_that_join_to_the_whole_answer(server: Server) -> None:
    inputs = {"prompt": "Say hello.", "temperature": 0.9, "seed": 5, "max_new_tokens": 40}
    [whole] = server.post(**inputs).json()["output"]
    seen = list(server.stream(**inputs))
    pieces = [data["chunk"] for name, data in seen if name == "output"]
    assert len(pieces) > 5
    assert "".join(pieces) == whole
    assert seen[-1][1]["status"] == "succeeded"
    assert seen[-1][1]["metrics"]["completion_tokens"] <= 40


def test_pieces_arrive_while_the_answer_is_being_made(server: Server) -> None:
    request = {"id": "endless", "input": {**LONG, "stream": True}}
    accept = {"accept": "text/event-stream"}
    with server.client.stream("POST", "/predictions", json=request, headers=accept) as response:
        seen = events(response)
        assert next(data for name, data in seen if name == "output")["chunk"]
        # Only an unfinished prediction can be cancelled; the rest of the stream says it was.
        assert server.client.post("/predictions/endless/cancel").status_code == 200
        name, data = list(seen)[-1]
    assert (name, data["status"]) == ("completed", "canceled")
    assert server.idle()


def test_cancel_of_a_prediction_that_is_waited_for(server: Server) -> None:
    assert server.cancel_one("waited") == "canceled"
    assert server.idle()


def test_a_client_that_goes_away_frees_its_slot(server: Server) -> None:
    path = f"{server.url}/predictions"
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(path, json={"input": LONG}, timeout=1)
    request, accept = {"input": {**LONG, "stream": True}}, {"accept": "text/event-stream"}
    with httpx.stream("POST", path, json=request, headers=accept) as response:
        next(data for name, data in events(response) if name == "output")
    assert server.idle()


def test_metrics_say_what_it_cost(server: Server) -> None:
    answer = server.post(prompt="Say hello.", n=2, max_new_tokens=3, seed=1, temperature=5).json()
    metrics = answer["metrics"]
    assert metrics["seed"] == 1
    assert metrics["prompt_tokens"] > 10
    assert metrics["completion_tokens"] <= 6
    assert set(metrics["finish_reason"].split(",")) <= {"length", "eos"}
    assert 0 < metrics["time_to_first_token"] <= metrics["predict_time"]
    assert metrics["tokens_per_second"] > 0


def test_many_clients_each_get_their_own_answer(server: Server) -> None:
    def one(index: int) -> list[str]:
        output: list[str] = server.post(**varied(index)).json()["output"]
        return output

    alone = [one(index) for index in range(64)]
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(one, range(64)))
    assert len({text for texts in alone for text in texts}) > 64
    assert together == alone


def test_a_prompt_longer_than_the_context_fails_with_the_numbers(server: Server) -> None:
    answer = server.post(prompt="word " * 150_000)
    assert answer.status_code == 200
    assert answer.json()["status"] == "failed"
    assert "prompt and answer together may have 200000" in answer.json()["error"]
