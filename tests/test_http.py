"""The HTTP door: Cog's own server with our runner, a tiny model, and requests from outside.

Whatever engine answers behind it.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from http_server import ENGINES, LONG, ROOT, Server, events, leave, varied

from alpaca.serving import schema

pytestmark = pytest.mark.parametrize("server", ENGINES, indirect=True)


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


def refused() -> Iterator[tuple[str, object]]:
    """For every input there is: values of each other type, and those beside its range."""
    values = {"string": "two", "integer": 5, "boolean": True, "array": ["a"], "object": {"a": 1}}
    fields = schema.find(ROOT, "predict.py:Runner", "run").input_schema()["properties"]
    for name, field in fields.items():
        numeric = field["type"] in ("integer", "number")
        for kind, value in values.items():
            if kind != field["type"] and not (kind == "integer" and numeric):
                yield name, value
        step = 1 if field["type"] == "integer" else 0.01
        if numeric:
            yield name, field["minimum"] - step  # each has one
        if field["type"] == "integer":
            yield name, field["minimum"] + 0.5
        if "maximum" in field:
            yield name, field["maximum"] + step
        if "items" in field:
            yield name, [5]
        yield name, None  # Cog refuses it also where the schema says nullable


REFUSED = list(refused())


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=str)
def test_inputs_out_of_type_or_range_are_refused(server: Server, name: str, value: object) -> None:
    answer = server.post(**{"prompt": "a", name: value})
    assert answer.status_code == 422
    [detail] = answer.json()["detail"]
    *where, what = detail["loc"]
    assert (where, what.partition("/")[0]) == (["body", "input"], name)
    assert detail["msg"]


def test_no_input_and_no_range_is_forgotten(server: Server) -> None:
    assert len({name for name, _ in REFUSED}) == 13
    for case in (
        ("n", 6),
        ("n", 0),
        ("top_p", 1.01),
        ("temperature", -0.01),
        ("seed", -1),
        ("seed", 2**53),
        ("seed", None),
        ("max_new_tokens", None),
    ):
        assert case in REFUSED
    assert server.post().status_code == 422  # without a prompt


def test_the_largest_seed_is_reported_as_it_is_and_repeats_the_answer(server: Server) -> None:
    inputs = {"prompt": "Say hello.", "temperature": 1, "max_new_tokens": 20, "seed": 2**53 - 1}
    first, second = (server.post(**inputs).json() for _ in range(2))
    assert first["metrics"]["seed"] == 2**53 - 1
    assert first["output"] == second["output"]
    assert server.post(**{**inputs, "seed": 2**53 - 2}).json()["output"] != first["output"]
    for larger in (2**53, 2**53 + 1, 2**200):
        assert server.post(**{**inputs, "seed": larger}).status_code == 422


def test_a_stream_wins_over_an_answer_in_the_background(server: Server) -> None:
    request = {"input": {"prompt": "Say hello.", "stream": True, "max_new_tokens": 5}}
    headers = {"accept": "text/event-stream", "prefer": "respond-async"}
    with server.client.stream("POST", "/predictions", json=request, headers=headers) as response:
        assert response.status_code == 200
        seen = list(events(response))
    assert seen[-1][0] == "completed"
    assert seen[-1][1]["status"] == "succeeded"


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


def test_clients_that_leave_a_stream_at_once_free_their_slots(server: Server) -> None:
    """Cog tells the worker that they left before their predictions have begun there."""
    for index in range(0, 60, 3):
        leave(server.port, index, stream=True)
    assert server.idle()


def test_metrics_say_what_it_cost(server: Server) -> None:
    answer = server.post(prompt="Say hello.", n=2, max_new_tokens=3, seed=1, temperature=2).json()
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
