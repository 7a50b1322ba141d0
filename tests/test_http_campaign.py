"""Long campaigns against the real server, run by ./script/test --slow."""

import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue

import psutil
import pytest
from http_server import LONG, SETTINGS, Server, leave, receiver, serving, varied

pytestmark = pytest.mark.slow

DIFFERENT = 70  # requests, each made about ten times
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")


def memory(server: Server) -> int:
    """Bytes that the server and its worker hold."""
    process = psutil.Process(server.process.pid)
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])


def dropped(server: Server, name: str, hook: str, ended: Queue[str], seconds: float) -> int:
    """Ask for what would take minutes, cancel it after `seconds`, and see it told as canceled.

    Returns how many cancels that took: Cog drops one that overtakes its prediction.
    """
    request = {"input": LONG, "webhook": hook, "webhook_events_filter": ["completed"]}
    headers = {"prefer": "respond-async"}
    asked = server.client.put(f"/predictions/{name}", json=request, headers=headers)
    assert asked.status_code == 202
    time.sleep(seconds)
    for cancels in range(1, 10):
        server.client.post(f"/predictions/{name}/cancel")
        with suppress(Empty):
            assert ended.get(timeout=5) == "canceled"
            return cancels
    raise AssertionError(f"{name} was not told of its end")


def test_a_thousand_requests_with_cancels_lose_and_mix_up_nothing(server: Server) -> None:
    kept = [index for index in range(1000) if random.Random(index).random() >= 0.3]
    wanted = [server.post(**varied(index)).json()["output"] for index in range(DIFFERENT)]
    assert len({str(output) for output in wanted}) > 0.9 * DIFFERENT
    endings: dict[str, Queue[str]] = {f"drop-{index}": Queue() for index in range(1000)}

    def one(index: int) -> tuple[int, str, list[str], int]:
        if index in kept:
            answer = server.post(**varied(index % DIFFERENT)).json()
            return index, answer["status"], answer["output"], 0
        name, seconds = f"drop-{index}", random.Random(index).random() / 2
        return index, "canceled", [], dropped(server, name, hook, endings[name], seconds)

    with (
        receiver(lambda told: endings[told["id"]].put(told["status"])) as hook,
        ThreadPoolExecutor(48) as pool,
    ):
        results = list(pool.map(one, range(500)))
        before = memory(server)  # by now it has all the threads and buffers that it will need
        results += pool.map(one, range(500, 1000))
    assert [index for index, *_ in results] == list(range(1000))
    outputs = {index: output for index, status, output, _ in results if status == "succeeded"}
    assert sorted(outputs) == kept
    assert all(outputs[index] == wanted[index % DIFFERENT] for index in kept)
    cancels = [count for *_, count in results if count]
    assert len(cancels) == 1000 - len(kept)
    assert sum(count > 1 for count in cancels) < 0.1 * len(cancels), "cancels are lost too often"
    assert server.idle()
    assert server.health() == "READY"
    assert memory(server) < before + 50 * 2**20


def test_two_hundred_clients_that_leave_their_streams_leave_no_slot_taken(server: Server) -> None:
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda index: leave(server.port, index, stream=True), range(200)))
    began = time.monotonic()
    assert server.idle()
    assert time.monotonic() - began < 2


def test_two_hundred_clients_that_leave_plain_requests_take_slots_for_a_limited_time(
    endless_model: Path, tmp_path: Path
) -> None:
    """Cog does not say that a client left within the first milliseconds; the time limit remains."""
    settings = {**SETTINGS, "ALPACA_MAX_SECONDS": "5"}
    with serving(endless_model, tmp_path, **settings) as server:
        with ThreadPoolExecutor(10) as pool:
            list(pool.map(lambda index: leave(server.port, index, stream=False), range(200)))
        assert server.idle()


def test_schemathesis_finds_no_5xx(tiny_model: Path, tmp_path: Path) -> None:
    """It reads /openapi.json and makes requests of its own, valid and not."""
    with serving(tiny_model, tmp_path, ALPACA_CONTEXT="64") as server:
        done = attacked(server)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "/predictions" in done.stdout


def attacked(server: Server) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            SCHEMATHESIS,
            "run",
            f"{server.url}/openapi.json",
            "--checks",
            "not_a_server_error",
            "--max-examples",
            "100",
            "--seed",
            "1",
            "--include-path-regex",
            "predictions|health|^/$",
            "--request-timeout",
            "60",
            "--phases",
            "examples,coverage,fuzzing",
            "--no-color",
        ],
        capture_output=True,
        text=True,
    )
