"""One DPO step padded as TRL pads it, and packed with the prompt shared by both answers.

    python bench/preference_step.py [--data pairs.json] [--model DIR] [--examples 16] [--rounds 3]

fp32, LoRA of rank 16 on all linear layers, forward and backward, with the reference's forward pass;
the optimizer's part is the same. Without --data, the pairs are the seed tasks, and a rejected
answer is another task's. Each round runs the two in turn. Last line: JSON, with the tokens of each
layout.
"""

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from train_step import BATCH, CPU, LENGTH, options, timed
from transformers import AutoModelForCausalLM

from alpaca.folder import load_tokenizer
from alpaca.recipe import packing
from alpaca.recipe.corpus import Corpus, open_corpus
from alpaca.tokens import Codec
from alpaca.training import attention
from alpaca.training.loss import TargetLoss
from alpaca.training.preference import pack_sums

SEEDS = Path("data/seed_tasks.jsonl")
RANK = 16


def main() -> None:
    arguments = options(__doc__).parse_args()
    codec = Codec(load_tokenizer(arguments.model))
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data
        if data == SEEDS:
            data = Path(scratch, "pairs.json")
            data.write_text(json.dumps(pairs_of_seeds()))
        corpus = open_corpus(data, codec, Path(scratch), LENGTH, pairs=True)
        usable = [i for i in range(len(corpus)) if corpus.targets(i)]
        report(arguments.model, corpus, usable[: arguments.examples], arguments.rounds)


def pairs_of_seeds() -> list[dict[str, str]]:
    """Pairs whose rejected answer is the next task's."""
    tasks = [json.loads(line) for line in SEEDS.read_text().splitlines()]
    return [
        {"instruction": t["instruction"], "input": t["input"], "chosen": t["output"],
         "rejected": other["output"]}
        for t, other in zip(tasks, [*tasks[1:], tasks[0]], strict=True)
    ]  # fmt: skip


def module_of(folder: Path) -> TargetLoss:
    """The model with a random adapter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention.NAME
    )
    config = LoraConfig(
        r=RANK, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return TargetLoss(model.train())


def report(folder: Path, corpus: Corpus, members: list[int], rounds: int) -> None:
    module = module_of(folder)
    by_batch = packing.batches(members, BATCH, world_size=1)[0]
    by_size = packing.distribute(corpus, members, 2 * BATCH * LENGTH, world_size=1)[0]
    ways = {
        "padded": [packing.build(corpus, part, padded=True) for part in by_batch],
        "shared": [packing.build(corpus, part) for part in by_size],
    }

    def step(packs: list[packing.Pack]) -> Callable[[], None]:
        def run() -> None:
            for pack in packs:
                (pack_sums(module, pack, CPU, (), beta=0.1)[0] / len(members)).backward()

        return run

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    gradients = {}
    for number in range(rounds):
        for name, packs in ways.items():
            spent, gradients[name] = timed(step(packs), module)
            seconds[name].append(spent)
            print(f"round {number + 1}: {name} {spent:.2f} s", flush=True)
    difference = (gradients["padded"] - gradients["shared"]).norm() / gradients["padded"].norm()
    ratios = [a / b for a, b in zip(seconds["padded"], seconds["shared"], strict=True)]
    result: dict[str, Any] = {
        "pairs": len(members),
        "tokens": {
            "padded": sum(pack.tokens for pack in ways["padded"]),
            "without padding": sum(sum(corpus.alone(i)) for i in members),
            "prompt once a pair": sum(corpus.length(i) for i in members),
            "prompt once a pair, template once a pack": sum(p.tokens for p in ways["shared"]),
        },
        "seconds": {name: round(statistics.median(spent), 2) for name, spent in seconds.items()},
        "speedup": round(statistics.median(ratios), 2),
        "gradient_difference": float(difference),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
