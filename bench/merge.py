"""Does a merge in bf16 compute more nearly what base + adapter compute with one rounding or other?

Trains a LoRA adapter of SmolLM2-135M with peft for some steps (rank 16, all linear layers), on four
of five seed tasks. Then merges it in bf16, rounding to nearest, and stochastically with several
seeds. For each: the largest and the root mean square difference of the golden prompts' logits from
base + adapter in float64, the difference of the held-out loss from that of the fp32 merge, and how
much of the change is kept: the projection of the rounded change on the exact one, 1 on the average
where the rounding keeps the mean.

    python bench/merge.py [--base weights/smollm2-135m] [--steps 40] [--seeds 5] [--adapter FOLDER]
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from alpaca import golden, proof
from alpaca.adapter import Adapter
from alpaca.folder import load_tokenizer
from alpaca.merging import Base, Merge
from alpaca.records import read_records
from alpaca.tokens import Codec, Example

ROOT = Path(__file__).resolve().parent.parent
BATCH = 4
LONGEST = 160  # tokens of an example, prompt included


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--base", type=Path, default=ROOT / "weights/smollm2-135m")
    options.add_argument("--adapter", type=Path, help="a trained one, or where to keep the new one")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--seeds", type=int, default=5)
    given = options.parse_args()
    torch.manual_seed(0)
    codec = Codec(load_tokenizer(given.base))
    records = read_records(ROOT / "data/seed_tasks.jsonl")
    examples = [one for one in codec.examples(records, LONGEST) if one.targets]
    with tempfile.TemporaryDirectory(prefix="bench-merge-") as name:
        folder = given.adapter or Path(name)
        if not (folder / "adapter_config.json").exists():
            learned = [one for at, one in enumerate(examples) if at % 5]
            train(given.base, folder, learned, given.steps)
        compare(given.base, Adapter(folder), examples[::5], given.seeds)


def train(base: Path, folder: Path, examples: list[Example], steps: int) -> None:
    """A plain loop: AdamW at 2e-4, constant, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    for step in range(steps):
        batch = [examples[(step * BATCH + at) % len(examples)] for at in range(BATCH)]
        targets = sum(one.targets for one in batch)
        total = 0.0
        for one in batch:
            loss = loss_sum(tuned, one) / targets
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: {total:.4f}", flush=True)
    tuned.save_pretrained(folder)


def loss_sum(model: PreTrainedModel, one: Example) -> torch.Tensor:
    """The sum of an example's losses over its answer."""
    ids = torch.tensor(one.ids)
    logits = model(ids[None]).logits[0, one.prompt_length - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, ids[one.prompt_length :], reduction="sum")


@torch.no_grad()
def held_out(model: PreTrainedModel, examples: list[Example]) -> float:
    """The mean loss of a target token."""
    total = sum(loss_sum(model, one).item() for one in examples)
    return total / sum(one.targets for one in examples)


@torch.no_grad()
def compare(base: Path, adapter: Adapter, examples: list[Example], seeds: int) -> None:
    """Print one line for each merge."""
    ids = golden.prompt_ids(base)
    exact = golden.forward(proof.AdaptedWeights(base, adapter), ids)
    entries = golden.Float64Weights(base).entries
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    print(f"base: held-out loss {held_out(model, examples):.5f}")
    whole = None
    for way, dtype, seed in [
        ("fp32", torch.float32, None),
        ("bf16, nearest", torch.bfloat16, None),
        *((f"bf16, stochastic, seed {seed}", torch.bfloat16, seed) for seed in range(seeds)),
    ]:
        merge = Merge(Base(entries), adapter, seed)
        found = golden.forward(proof.MergedWeights(base, merge, dtype), ids)
        far = torch.stack(found) - torch.stack(exact)
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.cat(list(merge.pieces(name, dtype))))
        loss = held_out(model, examples)
        whole = loss if whole is None else whole
        figures = {
            "largest": float(far.abs().max()),
            "rms": float(far.square().mean().sqrt()),
            "loss": loss,
            "loss_difference": loss - whole,
            "kept": kept(adapter, merge, dtype),
        }
        print(way, json.dumps(figures), flush=True)


def kept(adapter: Adapter, merge: Merge, dtype: torch.dtype) -> float:
    """The share of the change that the merged tensors hold."""
    product = squares = 0.0
    for module in adapter.modules:
        name = f"{module}.weight"
        base = merge.base.rows(name, slice(None)).double()
        change = merge.rows(name, slice(None), torch.float32).double() - base
        found = merge.rows(name, slice(None), dtype).double() - base
        product += float((found * change).sum())
        squares += float(change.square().sum())
    return product / squares


if __name__ == "__main__":
    main()
