"""Long campaigns against the real server, run by ./script/test --slow."""

import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from http_server import LONG, Server, serving, varied

pytestmark = pytest.mark.slow

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")


def memory(server: Server) -> int:
    """Bytes that the server and its worker hold."""
    process = psutil.Process(server.process.pid)
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])


def test_a_thousand_requests_with_cancels_lose_and_mix_up_nothing(server: Server) -> None:
    kept = [index for index in range(1000) if random.Random(index).random() >= 0.3]
    wanted = {index: server.post(**varied(index)).json()["output"] for index in kept[::10]}

    def one(index: int) -> tuple[int, str, list[str]]:
        if index in kept:
            answer = server.post(**varied(index)).json()
            return index, answer["status"], answer["output"]
        name = f"/predictions/drop-{index}"
        asked = server.client.put(name, json={"input": LONG}, headers={"prefer": "respond-async"})
        assert asked.status_code == 202
        time.sleep(random.Random(index).random() / 2)
        while server.client.post(f"{name}/cancel").status_code == 200:  # 404: it is no more
            time.sleep(0.1)
        return index, "canceled", []

    with ThreadPoolExecutor(48) as pool:
        results = list(pool.map(one, range(500)))
        before = memory(server)  # by now it has all the threads and buffers that it will need
        results += pool.map(one, range(500, 1000))
    assert [index for index, _, _ in results] == list(range(1000))
    outputs = {index: output for index, status, output in results if status == "succeeded"}
    assert sorted(outputs) == kept
    assert all(outputs[index] == wanted[index] for index in wanted)
    assert server.idle()
    assert server.health() == "READY"
    assert memory(server) < before + 50 * 2**20


def test_schemathesis_finds_no_5xx(tiny_model: Path, tmp_path: Path) -> None:
    """It reads /openapi.json and makes requests of its own, valid and not."""
    with serving(tiny_model, tmp_path, ALPACA_CONTEXT="64") as server:
        done = attacked(server)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "/predictions" in done.stdout


def attacked(server: Server) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            SCHEMATHESIS, "run", f"{server.url}/openapi.json",
            "--checks", "not_a_server_error", "--max-examples", "100", "--seed", "1",
            "--include-path-regex", "predictions|health|^/$", "--request-timeout", "60",
            "--phases", "examples,coverage,fuzzing", "--no-color",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
