"""Cog's real server as a test fixture: started by `python -m alpaca serve`, spoken to over HTTP."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from alpaca.folder import load_tokenizer
from alpaca.serving import loading
from alpaca.serving.weights import Weights
from alpaca.web.server import start as start_web

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 200_000
# float32 whatever the machine is fast at: in bfloat16 an answer may depend on its neighbours.
SETTINGS = {
    "ALPACA_SLOTS": "5",
    "ALPACA_CONTEXT": str(CONTEXT),
    "ALPACA_DTYPE": "float32",
}
LONG = {"prompt": "Tell a story.", "total_tokens": CONTEXT, "temperature": 0}  # see `endless`
ALL_SLOTS = {"prompt": "a", "n": 5, "max_new_tokens": 1}
VLLM = Path(os.environ.get("ALPACA_VLLM_PYTHON", ROOT / ".venvs/vllm/bin/python"))
needs_vllm = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM.is_file(), reason="./script/setup vllm has not been run"),
]
# What may answer behind the runner: its own engine, a server at a URL, vLLM as its child.
ENGINES = ["own", "url", pytest.param("vllm", marks=needs_vllm)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def varied(index: int) -> dict[str, object]:
    """A request unlike the others, and the same each time; so is its answer."""
    choose = random.Random(index)
    return {
        "prompt": f"Say {index} {'word ' * choose.randrange(40)}",
        "seed": index,
        "max_new_tokens": choose.randrange(1, 40),
        "n": choose.randint(1, 3),
        "top_p": choose.choice([1.0, 0.9, 0.5]),
        "repetition_penalty": choose.choice([1.0, 1.2]),
    }


class Door:
    """A server spoken to from outside."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.Client(base_url=self.url, timeout=120, limits=limits)

    def health(self) -> str:
        try:
            return str(self.client.get("/health-check").json()["status"])
        except httpx.TransportError:
            return "ABSENT"

    def post(self, **inputs: object) -> httpx.Response:
        return self.client.post("/predictions", json={"input": inputs})

    def stream(self, **inputs: object) -> Iterator[tuple[str, dict[str, Any]]]:
        """Server-sent events as they arrive: (name, data)."""
        request = {"input": {**inputs, "stream": True}}
        accept = {"accept": "text/event-stream"}
        with self.client.stream("POST", "/predictions", json=request, headers=accept) as response:
            yield from events(response)

    def run_one(self) -> None:
        """See a prediction through: those that were asked for before it have begun by then."""
        time.sleep(0.2)  # so that they have been asked for
        assert self.post(prompt="a", max_new_tokens=1).json()["status"] == "succeeded"

    def cancel_one(self, name: str) -> str:
        """Cancel a long prediction that someone waits for; returns the status they are told."""
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(self.client.put, f"/predictions/{name}", json={"input": LONG})
            self.run_one()
            assert self.client.post(f"/predictions/{name}/cancel").status_code == 200
            return str(answer.result().json()["status"])

    def idle(self) -> bool:
        """Whether every slot is free: an answer for as many as there are comes before a time-out.

        Meaningful where something in a slot would stay there for minutes.
        """
        answer = self.client.post("/predictions", json={"input": ALL_SLOTS}, timeout=30)
        return bool(answer.json()["status"] == "succeeded")


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def leave(port: int, index: int, *, stream: bool) -> None:
    """Ask for what would take minutes, and close the connection within a second.

    A third of the clients leave within a millisecond, a third as soon as they receive anything.
    """
    choose = random.Random(index)
    body = json.dumps({"input": {**LONG, "stream": stream}})
    accept = "Accept: text/event-stream\r\n" if stream else ""
    head = (
        "POST /predictions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"{accept}Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall((head + body).encode())
        if index % 3 == 0:
            time.sleep(choose.random() / 1000)
        elif index % 3 == 1:
            client.settimeout(choose.random())
            with suppress(TimeoutError):
                client.recv(1)
        else:
            time.sleep(choose.random())


class Server(Door):
    """A server of this tree: its process and its log."""

    def __init__(self, weights: Path | None, log: Path, *flags: str, **environment: str) -> None:
        self.port = free_port()
        super().__init__(self.port)
        self.log = log
        named = ["--weights", str(weights)] if weights else []
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "alpaca", "serve", "--port", str(self.port), *named, *flags],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_until_ready(self, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while self.health() != "READY":
            assert self.process.poll() is None, self.log.read_text()
            assert self.health() != "SETUP_FAILED", self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)


def endless(source: Path, target: Path, layers: int = 2) -> None:
    """A model that, decoded greedily, goes on for minutes: EOS is never the likeliest.

    It has the sizes of `source`, but heads of 32 as vLLM's CPU build needs them.
    """
    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers = layers
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 32
    config.max_position_embeddings = CONTEXT
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[config.eos_token_id] = 0
    model.save_pretrained(target)
    load_tokenizer(source).save_pretrained(target)


@contextmanager
def serving(weights: Path | None, folder: Path, **environment: str) -> Iterator[Server]:
    server = Server(weights, folder / "server.log", **environment)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@contextmanager
def behind(kind: str, model: Path) -> Iterator[dict[str, str]]:
    """The settings with which a server of `model` has its answers from one of ENGINES."""
    if kind == "own":
        yield {}
    elif kind == "vllm":
        flags = {"ALPACA_VLLM_PYTHON": str(VLLM), "ALPACA_VLLM_FLAGS": "--enforce-eager"}
        yield {"ALPACA_ENGINE": "vllm", **flags}
    else:
        engine, codec = loading.load(Weights(model, "a test"), SETTINGS)
        web = start_web({"ALPACA_WEB_PORT": "0"}, {}, ROOT)
        assert web is not None
        try:
            web.serve(model.name, engine, codec)
            yield {"ALPACA_ENGINE_URL": f"{web.url}v1"}
        finally:
            web.stop()
            engine.stop()


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A small HTTP server beside the test; its URL."""
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def receiver(told: Callable[[dict[str, Any]], None]) -> Iterator[str]:
    """A local server for webhooks, which hands on what it is sent; its URL."""

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with answering(Hook) as url:
        yield url
