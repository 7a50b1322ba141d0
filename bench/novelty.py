"""One new instruction against 52,000: ours and the `rouge_score` package, in one run.

    .venv/bin/python bench/novelty.py [--instructions 52000]

The instructions are the seed tasks' own, varied word by word with a fixed seed. `ms` is the mean
over the candidates, `worst_ms` the slowest of them; both sides score the same first candidate and
the largest difference between their scores is reported. The last line is JSON.
"""

import argparse
import json
import random
import time
from pathlib import Path

from rouge_score.rouge_scorer import RougeScorer

from alpaca.dataset.novelty import Index
from alpaca.records import read_records

SEEDS = Path(__file__).resolve().parent.parent / "data" / "seed_tasks.jsonl"


def varied(count: int, seed: int = 0) -> list[str]:
    """`count` instructions: the seeds', each with a third of its words replaced by others'."""
    rng = random.Random(seed)
    texts = [record.instruction for record in read_records(SEEDS)]
    vocabulary = sorted({word for text in texts for word in text.split()})
    return [
        " ".join(
            rng.choice(vocabulary) if rng.random() < 1 / 3 else word
            for word in texts[number % len(texts)].split()
        )
        for number in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instructions", type=int, default=52_000)
    parser.add_argument("--candidates", type=int, default=50)
    arguments = parser.parse_args()
    kept = varied(arguments.instructions)
    candidates = varied(arguments.candidates, seed=1)
    index = Index(kept)
    times = []
    for candidate in candidates:
        start = time.perf_counter()
        index.nearest(candidate, 5)
        times.append(time.perf_counter() - start)
    scorer = RougeScorer(["rougeL"])
    start = time.perf_counter()
    theirs = [scorer.score(text, candidates[0])["rougeL"].fmeasure for text in kept]
    rouge_score = time.perf_counter() - start
    ours = index.scores(candidates[0])
    mean = sum(times) / len(times)
    result = {
        "instructions": len(kept),
        "ms": round(1000 * mean, 2),
        "worst_ms": round(1000 * max(times), 2),
        "rouge_score_ms": round(1000 * rouge_score, 1),
        "speedup": round(rouge_score / mean, 1),
        "largest_difference": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
