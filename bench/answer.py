"""How fast a suite is answered: `answer` beside our own HTTP server, and transformers' `generate`.

    python bench/answer.py [--model weights/smollm2-135m] [--tasks 200] [--repeats 3]

200 of the seed and evaluation tasks, exactly 64 new tokens each (the model's EOS does not end an
answer), in float32. `answer` and the server (16 clients, streamed) take turns; `generate` is the
way of 2023, one prompt at a time, once, on 24 of the tasks. Loading is not counted. The last line
is JSON: `vs_generate` and `vs_server`, ratios of tokens per second (medians of the turns).
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent))

import serve

from alpaca.evaluation import suites
from alpaca.evaluation.offline import Offline
from alpaca.evaluation.suites import Task, keyed

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = 16
ALONE = 24  # prompts for `generate`


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "weights" / "smollm2-135m")
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    given = suites.read(ROOT / "data" / "seed_tasks.jsonl") + suites.read(suites.OURS)
    asked = [one.instruction for one in given if not one.input][: arguments.tasks]
    rates: dict[str, list[float]] = {"answer": [], "server": []}
    with serve.without_end(arguments.model) as folder:
        for turn in range(arguments.repeats):
            for name in sorted(rates, reverse=bool(turn % 2)):
                rate = offline(folder, asked) if name == "answer" else served(folder, asked)
                rates[name].append(rate)
                print(f"{name}: {rate:.1f} tok/s", flush=True)
    alone = serve.generate_rate(arguments.model, asked[:ALONE])
    print(f"generate, one at a time: {alone:.1f} tok/s", flush=True)
    ratios = [a / s for a, s in zip(rates["answer"], rates["server"], strict=True)]
    print(
        json.dumps(
            {
                "tasks": len(asked),
                "vs_generate": round(statistics.median(rates["answer"]) / alone, 2),
                "vs_server": round(statistics.median(ratios), 2),
            }
        )
    )


def offline(folder: Path, asked: list[str]) -> float:
    """Tokens per second of the queue that `answer` uses."""
    tasks = keyed([Task(instruction=text) for text in asked])
    settings = {"temperature": 0.75, "top_p": 1.0, "seed": 0, "max_new_tokens": serve.NEW_TOKENS}
    with Offline(folder, tasks, serve.NEW_TOKENS).loaded(settings) as queue:
        began = time.monotonic()
        tokens = sum(entry["tokens"] for entry in queue.answers(tasks))
        return tokens / (time.monotonic() - began)


def served(folder: Path, asked: list[str]) -> float:
    """Tokens per second of the HTTP server."""
    rounds = len(asked) // CLIENTS
    limits = httpx.Limits(max_connections=None)
    with (
        serve.ours(folder) as (url, _),
        httpx.Client(base_url=url, timeout=600, limits=limits) as client,
    ):
        serve.ask_ours(client, asked[0])  # the first request warms up
        row = serve.one_row("server", client, serve.ask_ours, asked, CLIENTS, rounds)
    return row["tokens_per_second"]


if __name__ == "__main__":
    main()
