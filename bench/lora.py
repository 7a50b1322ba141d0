"""A LoRA step in this trainer, in TRL's SFTTrainer and in transformers' Trainer, both with peft.

    python bench/lora.py --data alpaca_data.json [--model DIR] [--examples 32] [--rounds 3]

Rank 16, all linear layers, fp32. Speed as in bench/peers.py: the same examples, already tokenized,
forward and backward; a library's fastest exact way is compared, in turn with ours; all use tcmalloc
where it is installed. Memory: the peak of whole runs of two steps, with all weights, with LoRA, and
with LoRA over a base in nf4, each beside its plan. `--parts speed` or `memory` measures one of
them. Last line: JSON.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import ROOT, Peers, example, fastest, summary
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from train_step import BATCH, CPU, LENGTH, options, packed, padded
from transformers import AutoModelForCausalLM

from alpaca import heap
from alpaca.folder import load_tokenizer
from alpaca.recipe.arguments import Arguments
from alpaca.recipe.corpus import Corpus, open_corpus
from alpaca.tokens import Codec
from alpaca.training import adapters, sharding
from alpaca.training.loss import TargetLoss
from alpaca.training.weights import local

RANK = 16
RUNS: dict[str, list[str]] = {
    "full": [],
    "lora": [f"--lora_rank={RANK}"],
    "qlora": [f"--lora_rank={RANK}", "--quantize_base=nf4"],
}


def main() -> None:
    flags = options(__doc__)
    flags.add_argument("--parts", nargs="+", default=["speed", "memory"])
    flags.add_argument("--ways", nargs="*", default=[], help="only these of the libraries' ways")
    flags.add_argument("--more", nargs="*", default=[], help="flags of the trainer, for memory")
    flags.add_argument("--pack", type=int, default=BATCH * LENGTH, help="tokens of a pack")
    arguments = flags.parse_args()
    heap.replace()
    codec = Codec(load_tokenizer(arguments.model))
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "memory" in arguments.parts:
            result |= memory(arguments, Path(folder))
        if "speed" in arguments.parts:
            corpus = open_corpus(arguments.data, codec, Path(folder), LENGTH)
            result |= speed(arguments, corpus, Path(folder))
    print(json.dumps(result))


def speed(arguments: Any, corpus: Corpus, work: Path) -> dict[str, Any]:
    members = list(range(min(arguments.examples, len(corpus))))
    targets = sum(corpus.targets(i) for i in members)
    adapter = first_values(arguments.model, work)
    module = ours(arguments.model, adapter)

    def step() -> float:
        return timed(lambda: packed(module, corpus, members, targets, arguments.pack), module)

    print(f"ours, once: {step():.2f} s", flush=True)
    gradients = {
        name: local(p.grad).clone()
        for name, p in adapters.trained(module.model)
        if p.grad is not None
    }
    save_file(gradients, work / "gradient.safetensors")
    (work / "examples.json").write_text(json.dumps([example(corpus, i) for i in members]))
    peers = Peers.start(arguments.model, work, adapter=adapter)
    try:
        trials = peers.try_all(arguments.ways)
        best = {name: fastest(name, trials) for name in ("sfttrainer", "trainer")}
        seconds: dict[str, list[float]] = {name: [] for name in ("ours", *best)}
        for number in range(1, arguments.rounds + 1):
            seconds["ours"].append(step())
            for name, way in best.items():
                seconds[name].append(peers.step(way)["seconds"])
            print(f"round {number}:", {k: round(v[-1], 2) for k, v in seconds.items()}, flush=True)
    finally:
        peers.process.kill()
    found = summary(peers, trials, best, seconds, len(members))
    return {
        **found,
        "grad_rel_diff": difference(arguments.model, adapter, corpus, members, gradients),
    }


def first_values(base: Path, work: Path) -> Path:
    """An adapter in PEFT's format whose B is not zero, so that every gradient says something."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(work / "adapter")
    return work / "adapter"


def ours(base: Path, adapter: Path) -> TargetLoss:
    """The trainer's own module, with that adapter."""
    mesh = sharding.start(CPU)
    module = sharding.build(base, mesh, torch.float32, CPU, adapter=Arguments(lora_rank=RANK))
    adapters.load(module.model, adapter)
    return module


def timed(body: Callable[[], None], module: torch.nn.Module) -> float:
    """Seconds of one step."""
    module.zero_grad()
    started = time.perf_counter()
    body()
    return time.perf_counter() - started


def difference(
    base: Path,
    adapter: Path,
    corpus: Corpus,
    members: list[int],
    gradients: dict[str, torch.Tensor],
) -> float:
    """How far our gradient is from that of padded batches in peft, whose loss is in fp64."""
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(loaded, adapter, is_trainable=True)
    targets = sum(corpus.targets(i) for i in members)
    padded(model, corpus, members, targets, exact=True)
    missed, whole = 0.0, 0.0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            error = gradients[name.replace(".default", "")] - parameter.grad
            missed += float(error.double().square().sum())
            whole += float(parameter.grad.double().square().sum())
    return float((missed / whole) ** 0.5)


def memory(arguments: Any, work: Path) -> dict[str, Any]:
    """Peaks of whole runs, and what was planned."""
    peaks, planned = {}, {}
    for name, flags in RUNS.items():
        done = subprocess.run(
            [
                sys.executable,
                "train.py",
                f"--model_name_or_path={arguments.model}",
                f"--data_path={arguments.data.resolve()}",
                f"--output_dir={work / name}",
                f"--gradient_accumulation_steps={arguments.examples // BATCH}",
                f"--max_tokens_per_pack={arguments.pack}",
                "--max_steps=2",
                *arguments.more,
                *flags,
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        found = re.search(r"memory, GB per rank\s+([\d.]+) and ([\d.]+)", done.stdout)
        assert found is not None, done.stdout
        planned[name], peaks[name] = map(float, found.groups())
        print(f"{name}: planned {planned[name]} GB, peak {peaks[name]} GB", flush=True)
    return {
        "memory_vs_full": round(peaks["lora"] / peaks["full"], 3),
        "qlora_memory_vs_lora": round(peaks["qlora"] / peaks["lora"], 3),
        "peak_gb": peaks,
        "planned_gb": planned,
    }


if __name__ == "__main__":
    main()
