"""Cog's real server as a test fixture: started by `python -m alpaca serve`, spoken to over HTTP."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
SLOTS = "5"
ALL_SLOTS = {"prompt": "a", "n": 5, "max_new_tokens": 1}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A running server: its process, its log, and a client bound to it."""

    def __init__(self, weights: Path | None, log: Path, *flags: str, **environment: str) -> None:
        self.port = free_port()
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
        self.url = f"http://127.0.0.1:{self.port}"
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.Client(base_url=self.url, timeout=120, limits=limits)

    def wait_until_ready(self, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while self.health() != "READY":
            assert self.process.poll() is None, self.log.read_text()
            assert self.health() != "SETUP_FAILED", self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def health(self) -> str:
        try:
            return str(self.client.get("/health-check").json()["status"])
        except httpx.TransportError:
            return "ABSENT"

    def post(self, **inputs: object) -> httpx.Response:
        return self.client.post("/predictions", json={"input": inputs})

    def run_one(self) -> None:
        """See a prediction through: those that were asked for before it have begun by then."""
        time.sleep(0.2)  # so that they have been asked for
        assert self.post(prompt="a", max_new_tokens=1).json()["status"] == "succeeded"

    def idle(self) -> bool:
        """Whether every slot is free: an answer for as many as there are comes before a time-out.

        Meaningful where something in a slot would stay there for minutes.
        """
        answer = self.client.post("/predictions", json={"input": ALL_SLOTS}, timeout=30)
        return bool(answer.json()["status"] == "succeeded")

    def stop(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)


@contextmanager
def serving(weights: Path | None, folder: Path, **environment: str) -> Iterator[Server]:
    server = Server(weights, folder / "server.log", **environment)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()
