"""What LoRA adapters cost while decoding, beside the base alone.

    python bench/serve_adapters.py [--model weights/smollm2-135m] [--slots 16] [--repeats 5]

The engine itself, without HTTP, in float32: as many requests as slots, 64 new tokens each (the EOS
does not end an answer), tokens per second. By turns, in one process: the base; the base while four
adapters are loaded; all requests of one adapter; and of four adapters and the base, mixed, so that
an adapter's rows are not next to each other. Adapters are random, of rank 16 (`--rank`, `--dora`),
in all linear layers. The last line is JSON: ratios to the first (medians of the turns).

    python bench/serve_adapters.py --passes [--repeats 20]

For a machine that is not quiet: the processor time of one decoding pass on one thread, the least of
the turns.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from alpaca.serving import loading
from alpaca.serving.engine import Engine
from alpaca.serving.forward import Batch
from alpaca.serving.lora import LoadedAdapter
from alpaca.serving.request import Request, Sampling
from alpaca.serving.weights import Weights
from alpaca.tokens import Codec

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 64
POSITION = 60  # of the token in a pass that is timed alone; those before it are zeros
ADAPTERS = ("a", "b", "c", "d")


def main() -> None:
    """Measure and print."""
    arguments = parse()
    if arguments.passes:
        torch.set_num_threads(1)
    tuned = {"ALPACA_SLOTS": str(arguments.slots), "ALPACA_CONTEXT": "512"}
    tuned["ALPACA_DTYPE"] = "float32"
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ADAPTERS}
        for folder in folders.values():
            make(folder, arguments.model, arguments.rank, dora=arguments.dora)
        bare, codec = loading.load(Weights(arguments.model, "bench"), tuned)
        full, _ = loading.load(Weights(arguments.model, "bench", folders), tuned)
    kinds = {
        "base": (bare, [""]),
        "base, four loaded": (full, [""]),
        "one adapter": (full, ["a"]),
        "four and the base": (full, ["", *ADAPTERS]),
    }
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(arguments.repeats + 1):
        for kind in sorted(kinds, reverse=bool(turn % 2)):
            engine, names = kinds[kind]
            each = [names[slot % len(names)] for slot in range(arguments.slots)]
            value = seconds(engine, each) if arguments.passes else rate(engine, codec, each)
            if turn:  # the first warms up
                found[kind].append(value)
    print(json.dumps(passes_summary(found) if arguments.passes else summary(found)))
    for engine in (bare, full):
        engine.stop()


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "weights" / "smollm2-135m")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--passes", action="store_true")
    return parser.parse_args()


def make(folder: Path, base: Path, rank: int, *, dora: bool) -> None:
    """An adapter with random matrices in every linear layer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules="all-linear", use_dora=dora
    )
    tuned = get_peft_model(model, settings)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.01 * torch.randn_like(parameter)
    tuned.save_pretrained(folder)


def rate(engine: Engine, codec: Codec, names: list[str]) -> float:
    """Tokens per second of one request for each name, all at once."""
    began = time.monotonic()
    jobs = [
        engine.submit(
            Request(
                tuple(codec.prompt(f"Tell me about the number {number}.")),
                max_new_tokens=NEW_TOKENS,
                sampling=Sampling(seed=number),
                ignore_ends=True,
                adapter=name,
            )
        )
        for number, name in enumerate(names)
    ]
    tokens = sum(job.completions[0].result.result(600).tokens for job in jobs)
    assert tokens == NEW_TOKENS * len(jobs)
    return tokens / (time.monotonic() - began)


def seconds(engine: Engine, names: list[str]) -> float:
    """Processor time of a pass over one token for each name."""
    adapted: defaultdict[LoadedAdapter, list[int]] = defaultdict(list)
    for row, name in enumerate(names):
        if (adapter := engine.adapters.find(name)) is not None:
            adapted[adapter].append(row)
    rows = list(range(len(names)))
    batch = Batch([(row, POSITION, 7) for row in rows], [], rows, adapted)
    began = time.process_time()
    engine.model.run(batch)
    return time.process_time() - began


def summary(rates: dict[str, list[float]]) -> dict[str, object]:
    """Ratios of tokens per second to the base's, in the same turn."""
    ratios = {
        kind: [own / base for own, base in zip(values, rates["base"], strict=True)]
        for kind, values in rates.items()
    }
    return {
        "base_tokens_per_second": round(statistics.median(rates["base"]), 1),
        **{kind: round(statistics.median(values), 3) for kind, values in ratios.items()},
        "spread": {kind: [round(min(r), 3), round(max(r), 3)] for kind, r in ratios.items()},
    }


def passes_summary(times: dict[str, list[float]]) -> dict[str, float]:
    """The base's time over each; the least times are those that other programs disturbed least."""
    base = min(times["base"])
    ratios = {kind: round(base / min(values), 3) for kind, values in times.items()}
    return {"base_milliseconds": round(1000 * base, 1), **ratios}


if __name__ == "__main__":
    main()
