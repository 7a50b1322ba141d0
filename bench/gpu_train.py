"""Training speed of 7B-shaped layers on one GPU: tokens a second, useful-token MFU, memory.

    python bench/gpu_train.py [--layers N] [--lora RANK [--quantize_base nf4]]
    python bench/gpu_train.py --device cpu --tiny

Runs the trainer's own steps (`--fsdp shard_grad_op`, 32 examples, AdamW, fp32 master weights, bf16
compute) on random weights and random examples with Alpaca's lengths, with as many layers as fit,
and with torch.compile and gradient checkpointing on and off. MFU counts the FLOPs of real tokens,
each template once per pack. First, the fused attention is compared with one call per segment
(`varlen_rel_diff_*`). Needs no network; under 9 minutes. Last line: JSON.
"""

import argparse
import gc
import json
import os
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlamaConfig

from alpaca.recipe import packing, steps
from alpaca.recipe.arguments import QUANTIZED, Arguments
from alpaca.recipe.corpus import Corpus
from alpaca.training import attention, flops, sharding
from alpaca.training.loop import Data, Trainer
from alpaca.training.loss import TargetLoss
from alpaca.training.weights import local

EXAMPLES = 32  # per step: the published 4 x 8 of a device
PREFIXES = (38, 50)  # LLaMA tokens of the two templates before the instruction
ROUNDING = 0.02  # of bf16 attention and its gradients, against fp32
STEPS = 4  # different ones; each runs once, which compiles its layers, before any is measured
SHAPE = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip


def main() -> None:
    """Measure the four cases, print a line each and a line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers")
    parser.add_argument("--layers", type=int, default=0, help="0: as many as fit")
    parser.add_argument("--max_tokens_per_pack", type=int, default=2048)
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train an adapter")
    parser.add_argument("--quantize_base", default="no", choices=["no", *QUANTIZED])
    parser.add_argument("--seconds", type=float, default=40, help="measured of each case")
    parser.add_argument("--eager", action="store_true", help="only the cases without torch.compile")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_train: there is no GPU here")
    os.environ.pop("RANK", None)  # one process, whoever started it
    bench = Bench(options, device)
    differences = varlen_differences(bench.data.corpus, device)
    print(f"varlen_attn against a call a segment: {differences}", flush=True)
    if max(differences.values(), default=0.0) > ROUNDING:
        raise SystemExit("gpu_train: the fused attention is wrong; nothing else is measured")
    cases = {}
    for compiled in (False,) if options.eager else (False, True):
        for checkpointing in (False, True):
            name = ("compiled" if compiled else "eager") + "+checkpointing" * checkpointing
            cases[name] = bench.case(torch_compile=compiled, gradient_checkpointing=checkpointing)
            print(f"{name}: {cases[name]}", flush=True)
    best = max(case.get("mfu", 0.0) for case in cases.values())
    print(json.dumps({**bench.facts(), **differences, "best_mfu": best, "cases": cases}))


class Bench:
    """What all cases share: the shape of the model, the data, the rates of the device."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        """Measure the device, choose the layers, make the data."""
        self.device = device
        self.seconds = options.seconds
        self.shape: dict[str, Any] = TINY if options.tiny else SHAPE
        self.arguments = Arguments(
            fsdp="shard_grad_op auto_wrap",
            max_tokens_per_pack=options.max_tokens_per_pack,
            lora_rank=options.lora,
            quantize_base=options.quantize_base,
        )
        self.mesh = sharding.start(device)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.rate = flops.matmul_rate(device, self.dtype)
        self.peak = flops.peak(device, self.dtype)
        self.layers = options.layers or (2 if options.tiny else self.fitting())
        self.data = Data(
            corpus(STEPS * EXAMPLES, self.shape["vocab_size"]), range(STEPS * EXAMPLES), NOTHING, ()
        )

    def facts(self) -> dict[str, Any]:
        """The hardware, software and settings of the measurement."""
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "layers": self.layers,
            "parameters": self.layers * self.layer_parameters() + self.table_parameters(),
            "max_tokens_per_pack": self.arguments.pack_tokens,
            "lora_rank": self.arguments.lora_rank,
            "quantize_base": self.arguments.quantize_base,
            "matmul_tflops": round(self.rate / 1e12, 2),
            "peak_tflops": round(self.peak / 1e12, 2),
        }

    def layer_parameters(self) -> int:
        """Weights of one layer's matrices."""
        width, inner = self.shape["hidden_size"], self.shape["intermediate_size"]
        kept = self.shape["num_key_value_heads"] / self.shape["num_attention_heads"]
        return int(width * width * (2 + 2 * kept) + 3 * width * inner)

    def table_parameters(self) -> int:
        """Weights of both vocabulary tables."""
        return 2 * int(self.shape["vocab_size"] * self.shape["hidden_size"])

    def fitting(self) -> int:
        """How many layers fit: 22 bytes per weight, and the activations of a pack.

        The 22 bytes: fp32 weight, gradient (whole while it is added up, and reduced) and two
        moments, and the bf16 copy. A frozen base takes 2. Without checkpointing, a layer keeps for
        each token about 16 vectors of its width and 3 of the inner width, in bf16.
        """
        vectors = 16 * self.shape["hidden_size"] + 3 * self.shape["intermediate_size"]
        each = 2 if self.arguments.lora_rank else 22
        layer = each * self.layer_parameters() + 2 * vectors * self.arguments.pack_tokens
        free = torch.cuda.mem_get_info()[0] - each * self.table_parameters() - 6e9
        return max(1, min(32, int(free / layer)))

    def case(self, **flags: bool) -> dict[str, Any]:
        """Measure the steps of a trainer with `flags`; running out of memory is a result too."""
        gc.collect()
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            return self.measure(self.trainer(replace(self.arguments, **flags)))
        except torch.cuda.OutOfMemoryError as error:
            return {"error": str(error).partition("\n")[0][:200]}

    def trainer(self, arguments: Arguments) -> Trainer:
        """A trainer of one device, with random weights."""
        torch.manual_seed(0)
        config = LlamaConfig(**self.shape, num_hidden_layers=self.layers)
        module = sharding.without_values(
            config, self.mesh, self.dtype, self.device, arguments, arguments
        )
        fill(module)
        once = sharding.reduces_once(module, self.mesh, arguments)
        schedule = steps.schedule(arguments, len(self.data.train), 1)
        assert schedule.batch == EXAMPLES
        return Trainer(
            arguments, module, self.data, schedule, self.device, self.dtype, {}, reduces_once=once
        )

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        """Measure steps until the time is over, after a warm-up round."""
        for step in range(STEPS):
            trainer.step(step)
        lines: list[dict[str, Any]] = []
        began = time.perf_counter()
        while not lines or time.perf_counter() - began < self.seconds:
            lines.append(trainer.step(len(lines) % STEPS)[0])
        seconds = sum(line["step_seconds"] for line in lines)
        mfu = sum(line["mfu"] * line["step_seconds"] for line in lines) / seconds
        return {
            "tokens_per_second": round(sum(line["tokens"] for line in lines) / seconds),
            "examples_per_second": round(len(lines) * EXAMPLES / seconds, 1),
            "mfu": round(mfu, 4),
            "of_matmul_rate": round(mfu * self.peak / self.rate, 4),
            "step_seconds": round(seconds / len(lines), 4),
            "steps": len(lines),
            "memory_gb": round(lines[-1]["memory"] / 1e9, 1),
            "last_loss": round(lines[-1]["loss"], 4),
        }


@torch.no_grad()
def fill(module: TargetLoss) -> None:
    """Random weights: norms are 1, matrices small, the bytes of quantized ones any."""
    for name, parameter in module.named_parameters():
        values = local(parameter)
        if name.endswith("scales"):  # fp32, as bytes
            values.view(torch.float32).fill_(0.02)
        elif values.dtype == torch.uint8:
            values.random_(0, 256)
        elif values.ndim == 1:
            values.fill_(1.0)
        else:
            values.normal_(std=0.02)


def corpus(examples: int, vocabulary: int) -> Corpus:
    """Random examples with lengths like Alpaca's: 40% with input, answers of 65 tokens on average.

    Log-normal, cut at 512: the median example has about 110 tokens, the longest reach the limit.
    """
    chance = np.random.default_rng(0)
    kinds = (chance.random(examples) < 0.4).astype(np.uint8)
    asked = chance.lognormal(np.where(kinds, 3.6, 2.9), 0.5).astype(int) + 8
    answered = chance.lognormal(3.75, 0.95, examples).astype(int) + 2
    prompts = np.minimum(np.array(PREFIXES)[kinds] + asked, 500)
    lengths = np.minimum(prompts + answered, 512)
    ids = chance.integers(3, vocabulary, int(lengths.sum()), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    for kind, start in zip(kinds, offsets, strict=False):
        ids[start : start + PREFIXES[kind]] = np.arange(3, 3 + PREFIXES[kind])
    return Corpus(
        ids=ids,
        offsets=offsets,
        prompt_lengths=prompts.astype(np.int32),
        kinds=kinds,
        prefix_lengths=PREFIXES,
        truncated=0,
    )


def varlen_differences(data: Corpus, device: torch.device) -> dict[str, float]:
    """Relative difference of fused attention and its gradients from one fp32 call per segment.

    Measured on a pack of eight examples, with as many key heads as query heads, and with a quarter
    as many. Empty without a GPU that has the kernel.
    """
    if device.type != "cuda" or not attention.has_kernel(
        torch.bfloat16, torch.cuda.get_device_capability(device)
    ):
        return {}
    pack = packing.build(data, range(8))
    index = attention.index(pack.segments, device)
    found = {}
    for kv_heads in (8, 2):
        torch.manual_seed(kv_heads)
        inputs = [
            torch.randn(pack.tokens, heads, 64, device=device).bfloat16()
            for heads in (8, kv_heads, kv_heads)
        ]
        results = []
        for run, dtype in (
            (attention.varlen, torch.bfloat16),
            (attention.segmentwise, torch.float),
        ):
            query, key, value = (tensor.to(dtype).requires_grad_() for tensor in inputs)
            out = run(query, key, value, 0.125, index)
            gradients = torch.autograd.grad(out.float().square().sum(), (query, key, value))
            results.append([out.detach(), *gradients])
        pairs = [(a.float(), b.float()) for a, b in zip(*results, strict=True)]
        worst = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        found[f"varlen_rel_diff_{kv_heads}_of_8"] = round(worst, 6)
    return found


NOTHING = corpus(0, 4)


if __name__ == "__main__":
    main()
