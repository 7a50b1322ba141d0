"""How long a data set of Alpaca's size takes to be checked and tokenized, and in how much memory.

    python bench/tokenize_corpus.py [--model DIR] [--examples 52000] [--cores 2]

The examples are the seed tasks, repeated, each with a different number. The benchmark measures what
train.py does before its first step (`open_corpus`): read, validate, tokenize, write the arrays. It
measures this once more with the cache present. Peak memory is that of the whole process, including
the imports of torch and transformers. Last line: JSON.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

from alpaca.folder import load_tokenizer
from alpaca.recipe.corpus import open_corpus
from alpaca.records import Record, read_records
from alpaca.tokens import Codec

SEEDS = Path(__file__).resolve().parent.parent / "data/seed_tasks.jsonl"


def main() -> None:
    """Write the examples, tokenize them twice, print a line of JSON."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--model", type=Path, default=Path("weights/smollm2-135m"))
    options.add_argument("--examples", type=int, default=52_000)
    options.add_argument("--cores", type=int, default=2)
    arguments = options.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    codec = Codec(load_tokenizer(arguments.model))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "alpaca_data.json")
        write(data, read_records(SEEDS), arguments.examples)
        before = peak_mb()
        started, busy = time.perf_counter(), time.process_time()
        corpus = open_corpus(data, codec, Path(folder, "cache"), 512)
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
        started = time.perf_counter()
        open_corpus(data, codec, Path(folder, "cache"), 512)
        again = time.perf_counter() - started
    result = {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(busy, 2),
        "peak_rss_mb": peak_mb(),
        "peak_rss_mb_before": before,
        "seconds_with_cache": round(again, 3),
        "examples": len(corpus),
        "tokens": int(corpus.offsets[-1]),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result))


def write(path: Path, seeds: list[Record], count: int) -> None:
    """A JSON list of `count` examples, no two alike, without holding it in memory."""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            task = seeds[number % len(seeds)]
            varied = {
                "instruction": f"{task.instruction} ({number})",
                "input": task.input,
                "output": f"{task.output} ({number})",
            }
            file.write(("[" if number == 0 else ",\n") + json.dumps(varied, ensure_ascii=False))
        file.write("]\n")


def peak_mb() -> int:
    """Peak resident memory of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 1_000_000


if __name__ == "__main__":
    main()
