"""What LoRA adapters cost while decoding: tokens per second beside those of the base alone.

    python bench/serve_adapters.py [--model weights/smollm2-135m] [--slots 16] [--repeats 5]

The engine itself, without HTTP, in float32: as many requests as slots, 64 new tokens each (the EOS
does not end an answer). By turns, in one process: the base of an engine without adapters; the base
of one that has four loaded; all requests of one adapter; and of four adapters and the base, mixed,
so that an adapter's rows are not next to each other. Adapters are random, of rank 16, in all linear
layers. The last line is JSON: ratios to the first (medians of the turns).
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from alpaca.errors import UserError
from alpaca.serving import loading
from alpaca.serving.engine import Engine
from alpaca.serving.request import Request, Sampling
from alpaca.serving.weights import Weights
from alpaca.tokens import Codec

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 64
ADAPTERS = ("a", "b", "c", "d")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "weights" / "smollm2-135m")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    tuned = {
        "ALPACA_SLOTS": str(arguments.slots),
        "ALPACA_CONTEXT": "512",
        "ALPACA_DTYPE": "float32",
    }
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ADAPTERS}
        for folder in folders.values():
            make(folder, arguments.model, arguments.rank, dora=arguments.dora)
        bare, codec = loading.load(Weights(arguments.model, "bench"), tuned)
        full, _ = loading.load(Weights(arguments.model, "bench", folders), tuned)
    mixed = ["", *ADAPTERS]
    kinds: dict[str, tuple[Engine, list[str]]] = {
        "base": (bare, [""]),
        "base, four loaded": (full, [""]),
        "one adapter": (full, ["a"]),
        "four and the base": (full, mixed),
    }
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(arguments.repeats + 1):
        for kind in sorted(kinds, reverse=bool(turn % 2)):
            engine, names = kinds[kind]
            found = rate(engine, codec, [names[n % len(names)] for n in range(arguments.slots)])
            if turn:  # the first warms up
                rates[kind].append(found)
                print(f"{kind}: {found:.1f} tok/s", flush=True)
    ratios = {
        kind: [own / base for own, base in zip(values, rates["base"], strict=True)]
        for kind, values in rates.items()
    }
    print(
        json.dumps(
            {
                "base_tokens_per_second": round(statistics.median(rates["base"]), 1),
                **{kind: round(statistics.median(ratios[kind]), 3) for kind in ratios},
                "spread": {
                    kind: [round(min(r), 3), round(max(r), 3)] for kind, r in ratios.items()
                },
            }
        )
    )
    for engine in (bare, full):
        engine.stop()


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
    if tokens != NEW_TOKENS * len(jobs):
        raise UserError("An answer is shorter than it should be.")
    return tokens / (time.monotonic() - began)


if __name__ == "__main__":
    main()
