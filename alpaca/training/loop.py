"""The training loop; its functions are in the order in which a step calls them.

step k -> examples -> this rank's packs -> loss sum / global targets -> backward
       -> clip -> AdamW -> log line -> maybe evaluate, maybe checkpoint
"""

import dataclasses
import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from alpaca.errors import UserError
from alpaca.recipe import packing, rules
from alpaca.recipe.arguments import LoopFlags
from alpaca.recipe.corpus import Corpus
from alpaca.recipe.progress import Progress
from alpaca.recipe.steps import Schedule
from alpaca.training import answers, checkpoint, export, flops, optimizer, sharding
from alpaca.training.answers import Samples
from alpaca.training.inputs import Data
from alpaca.training.loss import TargetLoss
from alpaca.training.objective import Objective
from alpaca.training.rendezvous import on_first_rank
from alpaca.training.run_log import RunLog
from alpaca.training.signals import STOP, Requests, StoppedError
from alpaca.training.trackers import Tracker, open_tracker
from alpaca.training.updates import Counts, UpdateSample, UpdateWatch

ModelWriter = Callable[[Path, dict[str, Any]], None]


@dataclass(frozen=True)
class Computed:
    """Result of a step's forward and backward passes: tokens, useful FLOPs, shares of the means.

    `means`: the loss, then the objective's measures.
    """

    tokens: float
    flops: float
    means: tuple[float, ...]

    @property
    def loss(self) -> float:
        """The share of the loss."""
        return self.means[0]


class Trainer:
    """One run: the sharded model, its optimizer, and its data."""

    def __init__(
        self,
        flags: LoopFlags,
        module: TargetLoss,
        data: Data,
        schedule: Schedule,
        device: torch.device,
        compute: torch.dtype,
        meta: dict[str, Any],
        *,
        reduces_once: bool,
        write_model: ModelWriter | None = None,
        samples: Samples | None = None,
    ) -> None:
        """`meta` is stored in checkpoints; its entry `run` is the run's identity.

        `reduces_once`: each rank adds up whole gradients and reduces them with the last pack.
        `write_model`, for `--save_only_model`: writes the model as it is now to a folder, with
        facts for its passport. `samples`: tasks that the model answers at each evaluation.
        """
        self.flags = flags
        self.module = module
        self.data = data
        self.schedule = schedule
        self.device = device
        self.compute = compute
        self.meta = meta
        self.write_model = write_model
        self.samples = samples
        self.reduces_once = reduces_once
        self.objective = Objective(flags)
        self.optimizer = optimizer.build(module, flags)
        self.sample = UpdateSample(module, compute)
        # 8-bit moments are tensors of torchao's own kind, which cannot be copied to host memory.
        self.saver = checkpoint.Saver(
            flags.output_dir, flags.save_total_limit, copies=not flags.moments_8bit
        )
        self.requests = Requests()
        self.progress = Progress()
        self.model_flops = flops.ModelFlops.of(module.model)
        self.peak = flops.peak(device, compute)
        self.lengths = packing.lengths(flags.pack_tokens) if flags.torch_compile else ()

    def train(self, newest: Path | None) -> Progress:
        """Train to the last step; resume from the checkpoint `newest` if there is one.

        Raises:
            StoppedError: a signal asked the run to stop; a checkpoint was written.
            UserError: the loss or the gradient's norm is NaN or infinite.
        """
        folder = self.flags.output_dir
        if newest is not None:
            meta = checkpoint.load(newest, self.module, self.optimizer)
            self.resume(meta)
        earlier, started = self.progress.seconds, time.monotonic()
        self.sample.count()  # counts start here
        watch = UpdateWatch(self.compute)
        tracker = self.tracker(resumed=newest is not None)
        log = RunLog(folder, self.schedule.steps, self.progress.steps, tracker)
        with self.saver, log as run_log:
            if newest is None:
                self.evaluate(run_log)
            while not self.ended:
                line, wanted, counts = self.step(self.progress.steps)
                if line["lr"] and (warning := watch.warning(counts)):
                    run_log.warn(warning)
                self.progress = self.progress.after(line, earlier + time.monotonic() - started)
                run_log.step(line, write=line["step"] % self.flags.logging_steps == 0)
                if self.due(self.flags.eval_strategy, self.flags.eval_steps, last=True):
                    self.evaluate(run_log)
                if self.saves(wanted):
                    self.requests.saving()
                    self.save(wait=wanted == STOP or self.ended)
                if wanted == STOP and not self.ended:
                    steps = self.progress.steps
                    resumes = not self.flags.save_only_model
                    raise StoppedError(self.requests.number, steps, resumes=resumes)
        return self.progress

    def resume(self, meta: dict[str, Any]) -> None:
        """Take the progress of a checkpoint with this `meta`, as far as it still applies."""
        self.progress = Progress(**meta["progress"])
        if self.evaluated(meta) != self.evaluated(self.meta):  # other held-out examples
            self.progress = self.progress.without_evaluations()
        if self.flags.save_best and self.best_checkpoint() is None:
            if self.progress.best_step is not None and dist.get_rank() == 0:
                print(
                    f"train: there is no checkpoint of step {self.progress.best_step}, which had "
                    "the lowest held-out loss; --save_best compares the evaluations from here on"
                )
            self.progress = self.progress.without_best()
        if self.progress.stopped is not None:  # with more patience it continues
            reason = self.progress.lacks_lower_loss(self.flags.early_stopping_patience)
            self.progress = dataclasses.replace(self.progress, stopped=reason)

    @property
    def ended(self) -> bool:
        """Whether there is no step left, or early stopping has ended the run."""
        return self.progress.steps >= self.schedule.steps or self.progress.stopped is not None

    def step(self, step: int) -> tuple[dict[str, Any], int, Counts]:
        """One optimizer step.

        Returns its log line, the strongest signal request of all ranks, and how many weights
        changed.
        """
        started = time.monotonic()
        self.seed_dropout(step)
        example_ids = [self.data.train[i] for i in self.schedule.indices(step)]
        computed = self.forward_backward(example_ids)
        norm, rate = self.update(step)
        ranks = self.gather(
            computed.tokens,
            computed.flops,
            self.peak,
            memory(self.device),
            self.requests.wanted,
            self.saver.failed,
            *self.sample.count().tolist(),
            *computed.means,
        )
        means = -len(computed.means)
        counts = Counts(*ranks[:, 6:means].sum(0).tolist())
        tokens, work = ranks[:, :2].sum(0).tolist()
        whole = Computed(tokens, work, tuple(ranks[:, means:].sum(0).tolist()))
        if ranks[:, 5].any():
            self.saver.wait()  # raises, on every rank
        if not (math.isfinite(whole.loss) and math.isfinite(norm)):
            raise UserError(
                f"Step {step + 1}: the loss is {whole.loss}, the gradient's norm {norm}.",
                "Lower --learning_rate and run the same command again: a run resumes from its last "
                "checkpoint, which is from before this step.",
            )
        seconds = time.monotonic() - started
        rates = {
            "grad_norm": norm,
            "lr": rate,
            "step_seconds": round(seconds, 4),
            "tokens_per_second": round(whole.tokens / seconds, 1),
            "mfu": round(whole.flops / seconds / float(ranks[:, 2].sum()), 4),
            "memory": int(ranks[:, 3].max()),
        }
        line = {**self.log_line(step, example_ids, whole, counts), **rates}
        return line, int(ranks[:, 4].max()), counts

    def seed_dropout(self, step: int) -> None:
        """Let what a step drops at random depend on the step and the rank, not on earlier steps."""
        torch.manual_seed((self.flags.seed * 1_000_003 + step) * 65_536 + dist.get_rank())

    def forward_backward(self, example_ids: Sequence[int]) -> Computed:
        """Add up the gradients of a step's loss, pack by pack; returns this rank's results."""
        corpus = self.data.corpus
        count = self.objective.count(corpus, example_ids)
        total: torch.Tensor | float = 0.0
        tokens, work = 0, 0.0
        packs = self.packs(corpus, example_ids)
        for number, members in enumerate(packs, start=1):
            pack = self.pack(corpus, members, example_ids)
            if self.reduces_once:
                cast(FSDPModule, self.module).set_requires_gradient_sync(number == len(packs))
            means = self.objective.sums(self.module, pack, self.device, self.lengths) / count
            # FSDP averages gradients over ranks, but the loss is a sum over them.
            (means[0] * dist.get_world_size()).backward()
            total = total + means.detach()
            tokens += pack.tokens
            counted = pack if self.flags.packing else packing.build(corpus, members)
            work += self.model_flops.of_pack(counted)
            if self.objective.pairs:
                work += self.model_flops.of_reference(counted)
        assert isinstance(total, torch.Tensor)  # every rank has packs
        return Computed(tokens, work, tuple(total.tolist()))

    def update(self, step: int) -> tuple[float, float]:
        """Clip the gradients and run AdamW's step; returns their norm and the learning rate."""
        norm = clip(self.module, self.flags.max_grad_norm)
        rate = self.schedule.learning_rate(step)
        optimizer.set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, rate

    def log_line(
        self, step: int, example_ids: Sequence[int], computed: Computed, counts: Counts
    ) -> dict[str, Any]:
        """The log line of a step, without its rates."""
        corpus = self.data.corpus
        real = sum(sum(corpus.alone(i)) for i in example_ids)
        batch = self.flags.per_device_train_batch_size
        return {
            "step": step + 1,
            "total_steps": self.schedule.steps,
            **self.objective.named(computed.means),
            "tokens": int(computed.tokens),
            "target_tokens": sum(corpus.targets(i) for i in example_ids),
            "padded_tokens": packing.padded_tokens(corpus, example_ids, batch),
            "prefix_tokens_saved": max(0, real - int(computed.tokens)),
            "masters_changed": round(counts.masters / counts.sampled, 6),
            "weights_changed": round(counts.computed / counts.sampled, 6),
            "weights_due": round(counts.due / counts.sampled, 6),
        }

    def packs(self, corpus: Corpus, example_ids: Sequence[int]) -> list[list[int]]:
        """The examples of each of this rank's packs."""
        flags, ranks = self.flags, dist.get_world_size()
        if flags.packing:
            by_rank = packing.distribute(corpus, example_ids, flags.pack_tokens, ranks)
        else:
            by_rank = packing.batches(example_ids, flags.per_device_train_batch_size, ranks)
        return by_rank[dist.get_rank()]

    @cached_property
    def held_out_packs(self) -> list[list[int]]:
        """The packs of an evaluation; cached, because packing thousands of examples is slow."""
        return self.packs(self.data.other, self.data.held_out)

    def pack(
        self, corpus: Corpus, members: Sequence[int], example_ids: Sequence[int]
    ) -> packing.Pack:
        """Build a pack; a rank without examples gets an idle one, to join every collective."""
        if members:
            return packing.build(corpus, members, padded=not self.flags.packing)
        return packing.idle(corpus, example_ids[0])

    def evaluate(self, run_log: RunLog) -> None:
        """Log the held-out loss and sample answers, if there are held-out examples."""
        means = self.held_out_means()
        if means is None:
            return
        line = {"step": self.progress.steps, **self.objective.named(means, "eval_")}
        run_log.write(line)
        self.progress = self.progress.evaluated(means[0])
        if self.samples is not None:
            wanted = self.samples
            made = self.answers(wanted.prompts, wanted.codec.eos, wanted.limit)
            run_log.write(wanted.line(self.progress.steps, made))
        self.stop_early(run_log)

    def stop_early(self, run_log: RunLog) -> None:
        """End the run, and say why, after too many evaluations without a new lowest loss."""
        reason = self.progress.lacks_lower_loss(self.flags.early_stopping_patience)
        if reason is not None and not self.ended:
            self.progress = dataclasses.replace(self.progress, stopped=reason)
            run_log.write({"step": self.progress.steps, "stopped": reason})
            run_log.say(f"stopped early after step {self.progress.steps}: {reason}")

    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the lowest held-out loss; None without one. A collective call."""
        folder, best = self.flags.output_dir, self.progress.best_step
        return on_first_rank(lambda: checkpoint.of_step(folder, best) if best else None)

    def take_best(self) -> None:
        """With `--save_best`, load the weights that it keeps, for the export; a collective call."""
        steps, best = self.progress.steps, self.progress.best_step
        kept = self.best_checkpoint() if self.flags.save_best and best != steps else None
        if self.flags.save_best and kept is None and best != steps and dist.get_rank() == 0:
            print(
                "train: no checkpoint has the lowest held-out loss: the last weights are exported"
            )
        sharding.reshard(self.module)
        if kept is not None and checkpoint.resumable(kept):
            checkpoint.load_weights(kept, self.module)
        elif kept is not None:
            export.load(self.module.model, kept)
        exported = steps if kept is None else best
        self.progress = dataclasses.replace(self.progress, exported_step=exported)

    def measure_export(self, folder: Path) -> Progress:
        """The run's progress with the held-out loss of its exported weights; a collective call.

        The exported weights are loaded into the sharded model and replace its masters. Nothing is
        measured if there are no held-out examples, or if a host does not see the folder.
        """
        seen = bool(self.gather(float(any(folder.glob("*.safetensors")))).all())
        if not self.data.held_out or not seen:
            return self.progress
        export.load(self.module.model, folder)
        means = self.held_out_means()
        return dataclasses.replace(self.progress, eval_loss_exported=means[0] if means else None)

    @torch.no_grad()
    def held_out_means(self) -> list[float] | None:
        """The held-out examples' mean loss and measures; None where none are held out."""
        corpus, members = self.data.other, self.data.held_out
        if not members:
            return None
        self.module.eval()
        totals = [0.0] * (1 + len(self.objective.measures))
        for pack_members in self.held_out_packs:
            pack = self.pack(corpus, pack_members, members)
            sums = self.objective.sums(self.module, pack, self.device, self.lengths)
            totals = [total + more for total, more in zip(totals, sums.tolist(), strict=True)]
        self.module.train()
        count = self.objective.count(corpus, members)
        return [total / count for total in self.gather(*totals).sum(0).tolist()]

    def answers(self, prompts: Sequence[list[int]], eos: int, limit: int) -> list[list[int]]:
        """Up to `limit` greedy tokens after each prompt; a collective call."""
        self.module.eval()
        made = answers.greedy(self.module, prompts, eos, limit, self.flags.pack_tokens, self.device)
        self.module.train()
        return made

    def tracker(self, *, resumed: bool) -> Tracker | None:
        """The tracker that rank 0 also logs to, if any."""
        if dist.get_rank():
            return None
        flags = self.flags
        return open_tracker(
            flags.report_to, flags.output_dir, self.meta.get("run", {}), resumed=resumed
        )

    @staticmethod
    def evaluated(meta: dict[str, Any]) -> Any:
        """SHA-256 of the held-out data that a run evaluates on."""
        return meta.get("run", {}).get("eval_data_sha256")

    def saves(self, wanted: int) -> bool:
        """Whether a checkpoint is due after the steps done so far; `wanted` as `step` returns it.

        The last step is saved whatever the period, because the export may still fail. Only a model
        would be what the export writes.
        """
        flags = self.flags
        if flags.save_only_model and self.ended:
            return False
        last = flags.save_strategy != "no"
        if wanted or self.due(flags.save_strategy, flags.save_steps, last=last):
            return True
        is_best = self.progress.best_step == self.progress.steps
        return flags.save_best and is_best and not self.ended  # the last one is exported as it is

    def save(self, *, wait: bool) -> None:
        """Write a checkpoint of the steps done so far, while training goes on unless `wait`."""
        best = self.progress.best_step if self.flags.save_best else None
        if self.flags.save_only_model:
            assert self.write_model is not None
            folder, keep = self.flags.output_dir, self.flags.save_total_limit
            steps = self.progress.steps
            checkpoint.write_model(folder, steps, self.write_model, keep, best=best)
            return
        meta = {**self.meta, "progress": dataclasses.asdict(self.progress)}
        steps = self.progress.steps
        self.saver.save(steps, self.module, self.optimizer, meta, best=best, wait=wait)

    def due(self, strategy: str, every: int, *, last: bool = False) -> bool:
        """Whether `strategy` is due after the steps done so far; `last`: always at the end."""
        period = rules.period(strategy, every, self.schedule.steps_per_epoch)
        done = self.progress.steps
        return bool(period and done % period == 0) or (last and self.ended)

    def gather(self, *values: float) -> torch.Tensor:
        """The values of every rank, on the CPU: (ranks, values), fp64."""
        mine = torch.tensor(values, device=self.device, dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        return torch.stack(every).cpu()


def clip(module: torch.nn.Module, limit: float) -> float:
    """Scale gradients down to a global norm of `limit` (0: no limit); returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), limit or math.inf)
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return float(whole.item())


def memory(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes: allocated on the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
