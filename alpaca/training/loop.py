"""The training loop, read from top to bottom in the order things happen.

step k -> examples -> this rank's packs -> loss sum / global targets -> backward
       -> clip -> AdamW -> log line
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from alpaca import atomic
from alpaca.training import loss, packing
from alpaca.training.arguments import Arguments
from alpaca.training.corpus import Corpus
from alpaca.training.loss import TargetLoss
from alpaca.training.steps import Schedule


@dataclass(frozen=True)
class Result:
    """What a run ended with; losses are means over target tokens, None without held-out data."""

    steps: int
    final_loss: float
    eval_loss_before: float | None
    eval_loss_after: float | None
    seconds: float
    tokens: int
    padded_tokens: int


class Trainer:
    """One run: the sharded model, its optimizer, and the data it walks through."""

    def __init__(
        self,
        arguments: Arguments,
        module: TargetLoss,
        corpus: Corpus,
        train: list[int],
        held_out: tuple[Corpus, list[int]],
        schedule: Schedule,
        device: torch.device,
    ) -> None:
        """`train` are the indices of `corpus` to train on; `held_out` a corpus and its indices."""
        self.arguments = arguments
        self.module = module
        self.corpus = corpus
        self.train = train
        self.held_out = held_out
        self.schedule = schedule
        self.device = device
        self.optimizer = adamw(module, arguments)
        self.log = arguments.output_dir / "log.jsonl"

    def run(self) -> Result:
        """Train from the first step to the last."""
        if self.is_main:
            atomic.write_text(self.log, "")
        started = time.monotonic()
        before = self.evaluate(0)
        last, tokens, padded = math.nan, 0, 0
        bar = tqdm(total=self.schedule.steps, desc="train", unit="step", disable=not self.is_main)
        after = before
        for step in self.schedule.walk():
            line = self.step(step)
            last, tokens, padded = line["loss"], tokens + line["tokens"], padded + line["padded"]
            if (step + 1) % self.arguments.logging_steps == 0:
                self.write({"step": step + 1, **line})
            bar.set_postfix(loss=f"{last:.4f}", tok_s=f"{line['tokens_per_second']:.0f}")
            bar.update()
            if self.evaluation_due(step + 1):
                after = self.evaluate(step + 1)
        bar.close()
        seconds = time.monotonic() - started
        return Result(self.schedule.steps, last, before, after, seconds, tokens, padded)

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step; returns its log line."""
        started = time.monotonic()
        members = [self.train[i] for i in self.schedule.indices(step)]
        targets = sum(self.corpus.targets(i) for i in members)
        total = torch.zeros((), device=self.device)
        tokens = 0
        for pack in self.packs(self.corpus, members):
            value = loss.run(self.module, pack, self.device) / max(1, targets)
            # FSDP averages gradients over ranks; the loss is a sum over them.
            (value * dist.get_world_size()).backward()
            total += value.detach()
            tokens += pack.tokens
        norm = clip(self.module, self.arguments.max_grad_norm)
        rate = self.schedule.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.all_reduce(total)
        tokens = self.sum(tokens)
        seconds = time.monotonic() - started
        batch = self.arguments.per_device_train_batch_size
        if not math.isfinite(total.item()):
            raise FloatingPointError(f"step {step + 1}: the loss is {total.item()}")
        return {
            "loss": total.item(),
            "grad_norm": norm,
            "lr": rate,
            "step_seconds": round(seconds, 4),
            "tokens": tokens,
            "target_tokens": targets,
            "padded": packing.padded_tokens(self.corpus, members, batch),
            "tokens_per_second": round(tokens / seconds, 1),
        }

    def packs(self, corpus: Corpus, members: list[int]) -> Iterator[packing.Pack]:
        """This rank's packs of a step."""
        arguments, ranks = self.arguments, dist.get_world_size()
        if arguments.packing:
            shares = packing.distribute(corpus, members, arguments.pack_tokens, ranks)
        else:
            shares = packing.batches(members, arguments.per_device_train_batch_size, ranks)
        for pack in shares[dist.get_rank()]:
            # A rank without examples still takes part in every collective, without targets.
            if pack:
                yield packing.build(corpus, pack, padded=not arguments.packing)
            else:
                yield packing.idle(corpus, members[0])

    @torch.no_grad()
    def evaluate(self, step: int) -> float | None:
        """Mean loss over the target tokens of the held-out examples; None where there are none."""
        corpus, members = self.held_out
        if not members:
            return None
        self.module.eval()
        total = torch.zeros((), device=self.device)
        for pack in self.packs(corpus, members):
            total += loss.run(self.module, pack, self.device)
        self.module.train()
        dist.all_reduce(total)
        mean = total.item() / max(1, sum(corpus.targets(i) for i in members))
        self.write({"step": step, "eval_loss": mean})
        return mean

    def evaluation_due(self, done: int) -> bool:
        """Whether to evaluate after `done` steps: as --eval_strategy says, and at the end."""
        every = {
            "no": self.schedule.steps,
            "steps": self.arguments.eval_steps,
            "epoch": self.schedule.steps_per_epoch,
        }[self.arguments.eval_strategy]
        return done % every == 0 or done == self.schedule.steps

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return dist.get_rank() == 0

    def sum(self, value: int) -> int:
        """Sum of an integer over all ranks."""
        total = torch.tensor(value, device=self.device)
        dist.all_reduce(total)
        return int(total.item())

    def write(self, line: dict[str, Any]) -> None:
        """Append one line to the log."""
        if self.is_main:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def adamw(module: torch.nn.Module, arguments: Arguments) -> torch.optim.AdamW:
    """AdamW as the recipe has it: no weight decay on norms and biases."""
    parameters = list(module.parameters())
    groups = [
        {
            "params": [p for p in parameters if p.ndim > 1],
            "weight_decay": arguments.weight_decay,
        },
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, fused=True)


def clip(module: torch.nn.Module, limit: float) -> float:
    """Scale gradients down to a global norm of `limit`; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), limit)
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return float(whole.item())


def recipe(arguments: Arguments) -> dict[str, Any]:
    """The arguments as JSON values, for the passport."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(arguments).items()
    }
