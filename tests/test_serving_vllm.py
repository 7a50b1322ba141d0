"""vLLM behind the runner keeps the same promises; its CPU build, in an environment of its own.

`./script/setup vllm` makes it (.venvs/vllm); without it these are skipped.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from adapters import make_adapter
from engines import answer_of
from http_server import VLLM, Server, free_port, needs_vllm, serving

from alpaca.golden import PROMPTS
from alpaca.serving import guard, loading
from alpaca.serving.request import Sampling
from alpaca.serving.weights import Weights

pytestmark = needs_vllm
NEW = 24


@pytest.fixture(scope="module")
def folders(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("vllm")
    return {"base": smollm, "styled": make_adapter(made / "styled", smollm, recorded=True)}


@pytest.fixture(scope="module")
def door(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, str]]:
    """The runner with vLLM, and the URL of its second port."""
    port = free_port()
    given = {
        "ALPACA_ENGINE": "vllm",
        "ALPACA_VLLM_PYTHON": str(VLLM),
        "ALPACA_VLLM_FLAGS": "--enforce-eager",
        "ALPACA_DTYPE": "float32",
        "ALPACA_CONTEXT": "1024",
        "ALPACA_SLOTS": "16",
        "ALPACA_WEB_PORT": str(port),
        "ALPACA_ADAPTERS": f"styled={folders['styled']}",
        "ALPACA_ADAPTER_FOLDER": str(folders["styled"].parent),
    }
    with serving(folders["base"], tmp_path_factory.mktemp("log"), **given) as server:
        yield server, f"http://127.0.0.1:{port}/v1"


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_answers_are_those_of_the_own_engine(
    door: tuple[Server, str], folders: dict[str, Path], penalty: float
) -> None:
    server, _ = door
    weights = Weights(folders["base"], "a test", {"styled": folders["styled"]})
    own, codec = loading.load(weights, {"ALPACA_DTYPE": "float32", "ALPACA_CONTEXT": "1024"})
    try:
        for adapter in ("", "styled"):
            for instruction, given in PROMPTS:
                asked = {"max_new_tokens": NEW, "adapter": adapter}
                sampling = Sampling(temperature=0, repetition_penalty=penalty)
                ours = answer_of(own, codec.prompt(instruction, given), sampling, **asked)  # type: ignore[arg-type]
                told = server.post(
                    prompt=instruction,
                    input=given,
                    temperature=0,
                    repetition_penalty=penalty,
                    **asked,
                ).json()
                assert told["output"] == [ours.text]
                assert told["metrics"]["finish_reason"] == ours.reason
                assert told["metrics"]["completion_tokens"] == ours.tokens
    finally:
        own.stop()


def test_a_seed_repeats_its_answers_and_n_of_them_differ(door: tuple[Server, str]) -> None:
    server, _ = door
    asked = {"prompt": "Tell a story.", "n": 5, "seed": 9, "max_new_tokens": NEW}
    first, second = (server.post(**asked).json() for _ in range(2))
    assert first["output"] == second["output"]
    assert len(set(first["output"])) == 5
    assert server.post(**{**asked, "seed": 10}).json()["output"] != first["output"]


def test_a_stop_text_ends_an_answer_and_a_stream_joins_to_it(door: tuple[Server, str]) -> None:
    server, _ = door
    asked = {"prompt": "Name three colors.", "temperature": 0, "max_new_tokens": NEW}
    whole = server.post(**asked).json()["output"][0]
    stop = whole[len(whole) // 2 :][:3]
    cut = server.post(**asked, stop=[stop]).json()
    assert cut["output"] == [whole[: whole.index(stop)]]
    assert cut["metrics"]["finish_reason"] == "stop"
    pieces = [data["chunk"] for name, data in server.stream(**asked) if name == "output"]
    assert len(pieces) > 5
    assert "".join(pieces) == whole


def test_log_probabilities_and_adapters_over_v1(
    door: tuple[Server, str], folders: dict[str, Path]
) -> None:
    _, url = door
    asked = {"prompt": "The sky is", "max_tokens": 5, "temperature": 0, "logprobs": 2, "echo": True}
    told = httpx.post(f"{url}/completions", json=asked, timeout=120).json()["choices"][0]
    values = told["logprobs"]["token_logprobs"]
    assert values[0] is None
    assert len(values) == 8
    assert all(-50 < value <= 0 for value in values[1:])
    body = {"lora_name": "again", "lora_path": folders["styled"].name}
    assert httpx.post(f"{url}/load_lora_adapter", json=body, timeout=120).status_code == 200
    plain = {"prompt": "The sky is", "max_tokens": 8, "temperature": 0}
    texts = [
        httpx.post(f"{url}/completions", json={**plain, "model": name}, timeout=120).json()
        for name in ("styled", "again")
    ]
    assert texts[0]["choices"][0]["text"] == texts[1]["choices"][0]["text"]
    body = {"lora_name": "again"}
    assert httpx.post(f"{url}/unload_lora_adapter", json=body, timeout=120).status_code == 200
    listed = httpx.get(f"{url}/models").json()["data"]
    assert [one["id"] for one in listed] == [folders["base"].name, "styled"]


def test_more_requests_than_slots_wait_and_cancelling_frees(door: tuple[Server, str]) -> None:
    server, _ = door
    server.cancel_one("gone")
    assert server.idle()


@contextmanager
def vllms(model: Path, logs: Path, count: int) -> Iterator[list[tuple[int, psutil.Process]]]:
    """Servers of vLLM on this machine: the port and the guard of each."""
    started = []
    try:
        for number in range(count):
            port = free_port()
            command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
            command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", port]
            command += ["--max-model-len", 4096, "--enforce-eager", "--dtype", "float32"]
            settings = {
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": str(number),  # else all take the same core
                "VLLM_NO_USAGE_STATS": "1",
            }
            with (logs / f"vllm-{number}.log").open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, guard.__file__, *map(str, command)],
                    env={**os.environ, **settings},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            started.append((port, process))
        yield [(port, psutil.Process(process.pid)) for port, process in started]
    finally:
        for _, process in started:
            process.terminate()
        for _, process in started:
            process.wait(30)


def running(port: int) -> float:
    told = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
    found = re.search(r"^vllm:num_requests_running\{.*\} ([\d.]+)$", told, re.M)
    assert found is not None
    return float(found[1])


def test_of_two_servers_one_that_is_killed_costs_only_what_it_was_making(
    deep_model: Path, tmp_path: Path
) -> None:
    with vllms(deep_model, tmp_path, 2) as servers:
        urls = ",".join(f"http://127.0.0.1:{port}/v1" for port, _ in servers)
        settings = {"ALPACA_ENGINE_URL": urls, "ALPACA_CONTEXT": "4096"}
        with serving(deep_model, tmp_path, **settings) as server, ThreadPoolExecutor(16) as pool:

            def ask(number: int) -> dict[str, Any]:
                asked = {"prompt": f"Story {number}.", "temperature": 0, "max_new_tokens": 300}
                told: dict[str, Any] = server.post(**asked, total_tokens=4000).json()
                return told

            assert ask(0)["metrics"]["completion_tokens"] == 300
            asked = [pool.submit(ask, number) for number in range(16)]
            (_, killed), (port, _) = servers
            deadline = time.monotonic() + 60
            while [running(port) for port, _ in servers] != [8, 8]:
                assert time.monotonic() < deadline
            for process in killed.children(recursive=True):
                process.kill()
            told = [one.result() for one in asked]
            lost = [one["error"] for one in told if one["status"] != "succeeded"]
            assert len(lost) == 8
            assert all("ask again" in error for error in lost)
            later = [pool.submit(ask, number) for number in range(16)]
            assert [one.result()["status"] for one in later] == ["succeeded"] * 16
            assert server.health() == "READY"
            assert running(port) == 0
