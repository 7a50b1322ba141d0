"""The training loop, read from top to bottom in the order things happen.

step k -> examples -> this rank's packs -> loss sum / global targets -> backward
       -> clip -> AdamW -> log line -> maybe evaluate, maybe checkpoint
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from alpaca.training import checkpoint, loss, packing
from alpaca.training.arguments import Arguments
from alpaca.training.corpus import Corpus
from alpaca.training.loss import TargetLoss
from alpaca.training.signals import SAVE, STOP, Requests, StoppedError
from alpaca.training.steps import Schedule
from alpaca.training.telling import Journal


@dataclass(frozen=True)
class Progress:
    """What a run has done so far; kept in its checkpoints.

    Losses are means over target tokens, None without held-out data; `padded_tokens` is what the
    padded recipe would have computed for the same steps.
    """

    steps: int = 0
    loss: float = math.nan
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    padded_tokens: int = 0


@dataclass(frozen=True)
class Data:
    """Indices of `corpus` to train on, and of `other` to evaluate on."""

    corpus: Corpus
    train: Sequence[int]
    other: Corpus
    held_out: Sequence[int]


class Trainer:
    """One run: the sharded model, its optimizer, and the data it walks through."""

    def __init__(
        self,
        arguments: Arguments,
        module: TargetLoss,
        data: Data,
        schedule: Schedule,
        device: torch.device,
        run: dict[str, Any],
    ) -> None:
        """`run` is what makes this run this run: a checkpoint is resumed only where it agrees."""
        self.arguments = arguments
        self.module = module
        self.data = data
        self.schedule = schedule
        self.device = device
        self.identity = run
        self.optimizer = adamw(module, arguments)
        self.requests = Requests()
        self.progress = Progress()

    def train(self) -> Progress:
        """Train to the last step, from the newest checkpoint where there is one.

        Raises:
            StoppedError: a signal asked for it; a checkpoint was written.
        """
        folder = self.arguments.output_dir
        newest = checkpoint.newest(folder, self.identity)
        if newest is not None:
            meta = checkpoint.load(newest, self.module, self.optimizer)
            self.progress = Progress(**meta["progress"])
        earlier, started = self.progress.seconds, time.monotonic()
        with Journal(folder, self.schedule.steps, self.progress.steps) as journal:
            if newest is None:
                self.evaluate(journal)
            for step in range(self.progress.steps, self.schedule.steps):
                line = self.step(step)
                self.advance(line, earlier + time.monotonic() - started)
                journal.step(line, write=(step + 1) % self.arguments.logging_steps == 0)
                wanted = self.agree(self.requests.wanted)
                if self.due(self.arguments.eval_strategy, self.arguments.eval_steps, last=True):
                    self.evaluate(journal)
                if wanted or self.due(self.arguments.save_strategy, self.arguments.save_steps):
                    self.save()
                    self.requests.clear()
                if wanted == STOP and self.progress.steps < self.schedule.steps:
                    raise StoppedError(self.requests.number, self.progress.steps)
        return self.progress

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step; returns its log line."""
        started = time.monotonic()
        members = [self.data.train[i] for i in self.schedule.indices(step)]
        targets = sum(self.data.corpus.targets(i) for i in members)
        total = torch.zeros((), device=self.device)
        tokens = 0
        for pack in self.packs(self.data.corpus, members):
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
        mean, computed = self.sum(total.item(), tokens)
        if not math.isfinite(mean):
            raise FloatingPointError(f"step {step + 1}: the loss is {mean}")
        seconds = time.monotonic() - started
        padded = packing.padded_tokens(
            self.data.corpus, members, self.arguments.per_device_train_batch_size
        )
        return {
            "step": step + 1,
            "loss": mean,
            "grad_norm": norm,
            "lr": rate,
            "step_seconds": round(seconds, 4),
            "tokens": int(computed),
            "target_tokens": targets,
            "padded_tokens": padded,
            "tokens_per_second": round(computed / seconds, 1),
        }

    def packs(self, corpus: Corpus, members: Sequence[int]) -> Iterator[packing.Pack]:
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
    def evaluate(self, journal: Journal) -> None:
        """Write the mean loss over the held-out examples' target tokens, where there are any."""
        corpus, members = self.data.other, self.data.held_out
        if not members:
            return
        self.module.eval()
        packs = self.packs(corpus, members)
        total = sum(float(loss.run(self.module, pack, self.device)) for pack in packs)
        self.module.train()
        mean = self.sum(total)[0] / max(1, sum(corpus.targets(i) for i in members))
        journal.write({"step": self.progress.steps, "eval_loss": mean})
        if self.progress.steps:
            self.progress = dataclasses.replace(self.progress, eval_loss_after=mean)
        else:
            self.progress = dataclasses.replace(self.progress, eval_loss_before=mean)

    def advance(self, line: dict[str, Any], seconds: float) -> None:
        """Count a step that was done."""
        self.progress = dataclasses.replace(
            self.progress,
            steps=line["step"],
            loss=line["loss"],
            seconds=seconds,
            tokens=self.progress.tokens + line["tokens"],
            padded_tokens=self.progress.padded_tokens + line["padded_tokens"],
        )

    def save(self) -> None:
        """Write a checkpoint of the steps done so far."""
        meta = {"run": self.identity, "progress": dataclasses.asdict(self.progress)}
        keep, folder = self.arguments.save_total_limit, self.arguments.output_dir
        checkpoint.save(folder, self.progress.steps, self.module, self.optimizer, meta, keep)

    def due(self, strategy: str, every: int, *, last: bool = False) -> bool:
        """Whether `strategy` asks for something after the steps done; `last`: always at the end."""
        period = {"no": 0, "steps": every, "epoch": self.schedule.steps_per_epoch}[strategy]
        done = self.progress.steps
        return bool(period and done % period == 0) or (last and done == self.schedule.steps)

    def sum(self, *values: float) -> list[float]:
        """Sums over all ranks."""
        total = torch.tensor(values, device=self.device, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def agree(self, wanted: int) -> int:
        """The most that a signal asks of any rank: nothing, SAVE or STOP."""
        most = torch.tensor(wanted, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        assert most.item() in (0, SAVE, STOP)
        return int(most.item())


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
