"""Tokens a second of vLLM behind the runner, and of the same vLLM asked directly, in turn.

    python bench/bridge.py [--python .venvs/vllm/bin/python] [--model DIR] [--clients 1 16]

Each client asks for answers of 64 tokens, one after the other, with token ids as the prompt and
ends ignored, over /v1/completions: once at the runner's second port, once at vLLM's own. Streams
are read to their ends. Last line: JSON, `bridge_vs_direct` by number of clients.
"""

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from alpaca.folder import load_tokenizer
from alpaca.tokens import Codec

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 64


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--python", type=Path, default=ROOT / ".venvs/vllm/bin/python")
    options.add_argument("--model", type=Path, default=Path("weights/smollm2-135m"))
    options.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--answers", type=int, default=4, help="of each client in a round")
    options.add_argument("--flags", default="", help="ALPACA_VLLM_FLAGS")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        port, web = free_port(), free_port()
        settings = {
            "ALPACA_ENGINE": "vllm",
            "ALPACA_VLLM_PYTHON": str(arguments.python.absolute()),
            "ALPACA_VLLM_FLAGS": arguments.flags,
            "ALPACA_CONTEXT": "1024",
            "ALPACA_SLOTS": "64",
        }
        command = ["serve", "--weights", arguments.model, "--port", port, "--web-port", web]
        with log.open("w") as output:
            server = subprocess.Popen(
                [sys.executable, "-m", "alpaca", *map(str, command)],
                cwd=ROOT,
                env={**os.environ, **settings},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until_ready(port, log, server)
            found = re.search(r"Starting vLLM server on http://[\d.]+:(\d+)", log.read_text())
            assert found is not None, log.read_text()[-3000:]
            doors = {"bridge": web, "direct": int(found.group(1))}
            report(doors, arguments)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def report(doors: dict[str, int], arguments: argparse.Namespace) -> None:
    codec = Codec(load_tokenizer(arguments.model))
    ratios = {}
    for clients in arguments.clients:
        rates: dict[str, list[float]] = {name: [] for name in doors}
        for number in range(arguments.rounds + 1):
            for name, port in doors.items():
                rate = tokens_per_second(port, codec, clients, arguments.answers)
                if number:  # the first warms up
                    rates[name].append(rate)
                    print(f"{clients} clients, round {number}, {name}: {rate:.1f} tokens/s")
        pairs = zip(rates["bridge"], rates["direct"], strict=True)
        ratios[clients] = round(statistics.median(one / other for one, other in pairs), 3)
    print(json.dumps({"bridge_vs_direct": ratios, "rounds": arguments.rounds}))


def tokens_per_second(port: int, codec: Codec, clients: int, answers: int) -> float:
    """Of all clients together."""
    url = f"http://127.0.0.1:{port}/v1/completions"

    def client(number: int) -> None:
        with httpx.Client(timeout=600) as door:
            for count in range(answers):
                ids = codec.prompt(f"Tell a story about the number {100 * number + count}.", "")
                body = {
                    "prompt": ids,
                    "max_tokens": TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
                with door.stream("POST", url, json=body) as answer:
                    last = [one for one in answer.iter_lines() if one.startswith("data: {")][-1]
                told = json.loads(last.removeprefix("data: "))
                assert told["usage"]["completion_tokens"] == TOKENS, told

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return clients * answers * TOKENS / (time.perf_counter() - began)


def wait_until_ready(port: int, log: Path, server: "subprocess.Popen[bytes]") -> None:
    while True:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            status = httpx.get(f"http://127.0.0.1:{port}/health-check").json()["status"]
        except httpx.TransportError:
            status = ""
        if status == "READY":
            return
        assert status != "SETUP_FAILED", log.read_text()[-3000:]
        time.sleep(1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
