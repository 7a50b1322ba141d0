"""Long campaigns against the real server, run by ./script/test --slow."""

import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from http_server import CONTEXT, SLOTS, Server, endless, serving

pytestmark = pytest.mark.slow

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("campaign")
    endless(tiny_model, folder / "model")
    sizes = {"ALPACA_SLOTS": SLOTS, "ALPACA_CONTEXT": str(CONTEXT)}
    with serving(folder / "model", folder, **sizes) as running:
        yield running


def memory(server: Server) -> int:
    """Bytes that the server and its worker hold."""
    process = psutil.Process(server.process.pid)
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])


def inputs(index: int) -> dict[str, object]:
    choose = random.Random(index)
    return {
        "prompt": f"Say {index} {'word ' * choose.randrange(40)}",
        "seed": index,
        "max_new_tokens": choose.randrange(1, 40),
        "n": choose.randint(1, 3),
        "top_p": choose.choice([1.0, 0.9, 0.5]),
        "repetition_penalty": choose.choice([1.0, 1.2]),
    }


def test_a_thousand_requests_with_cancels_lose_and_mix_up_nothing(server: Server) -> None:
    kept = [index for index in range(1000) if random.Random(index).random() >= 0.3]
    wanted = {index: server.post(**inputs(index)).json()["output"] for index in kept[::10]}
    before = memory(server)

    def one(index: int) -> tuple[int, str, list[str]]:
        if index in kept:
            answer = server.post(**inputs(index)).json()
            return index, answer["status"], answer["output"]
        name = f"/predictions/drop-{index}"
        long = {"prompt": f"Tell {index}", "total_tokens": CONTEXT, "temperature": 0}
        asked = server.client.put(name, json={"input": long}, headers={"prefer": "respond-async"})
        assert asked.status_code == 202
        server.run_one()
        assert server.client.post(f"{name}/cancel").status_code == 200
        return index, "canceled", []

    with ThreadPoolExecutor(48) as pool:
        results = list(pool.map(one, range(1000)))
    assert [index for index, _, _ in results] == list(range(1000))
    outputs = {index: output for index, status, output in results if status == "succeeded"}
    assert sorted(outputs) == kept
    assert all(outputs[index] == wanted[index] for index in wanted)
    assert server.idle()
    assert server.health() == "READY"
    assert memory(server) < before + 150 * 2**20


def test_schemathesis_finds_no_5xx(tiny_model: Path, tmp_path: Path) -> None:
    """It reads /openapi.json and makes requests of its own, valid and not."""
    if not SCHEMATHESIS.exists():
        pytest.skip("schemathesis is not installed: pip install schemathesis==4.32.5")
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
