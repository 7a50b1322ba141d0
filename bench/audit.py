"""Seconds and memory of `alpaca audit` on 52,000 records, made by repeating and varying the seeds.

    .venv/bin/python bench/audit.py [--records 52000] [--tokenizer FOLDER]

A third of the records differ from a seed in 5% of their words, a third in 33%, a third in 60%, so
there are thousands of exact and near duplicates to find. The last line is JSON.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from alpaca.records import read_records

SEEDS = Path(__file__).resolve().parent.parent / "data" / "seed_tasks.jsonl"
CHANGED = (0.05, 0.33, 0.6)


def varied(count: int) -> list[dict[str, str]]:
    """`count` records: the seeds, repeated, with some words replaced by other words of theirs."""
    rng = random.Random(0)
    seeds = read_records(SEEDS)
    vocabulary = sorted({word for record in seeds for word in record.instruction.split()})

    def change(text: str, share: float) -> str:
        parts = text.split(" ")
        return " ".join(rng.choice(vocabulary) if rng.random() < share else part for part in parts)

    return [
        {
            field: change(getattr(seeds[number % len(seeds)], field), CHANGED[number % 3])
            for field in ("instruction", "input", "output")
        }
        for number in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=52_000)
    parser.add_argument("--tokenizer", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, html = Path(folder, "data.json"), Path(folder, "report.html")
        data.write_text(json.dumps(varied(arguments.records)))
        command = [
            sys.executable,
            "-m",
            "alpaca",
            "audit",
            str(data),
            "--json",
            "--html",
            str(html),
        ]
        if arguments.tokenizer:
            command += ["--tokenizer", str(arguments.tokenizer)]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {
        "records": arguments.records,
        "tokenizer": bool(arguments.tokenizer),
        "seconds": round(seconds, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gb": round(used.ru_maxrss / 1e6, 2),
        "counts": json.loads(done.stdout)["counts"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
