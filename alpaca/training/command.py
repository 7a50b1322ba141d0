"""What `train.py` does, from parsed flags to a finished model folder."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from alpaca import atomic, card, passport
from alpaca.errors import UNLOCKED, UserError
from alpaca.folder import explained_disk_errors
from alpaca.model import compute_dtype
from alpaca.plan import devices, planner, report
from alpaca.plan.plan import Plan
from alpaca.recipe import rules, steps
from alpaca.recipe.arguments import Arguments
from alpaca.recipe.progress import Progress
from alpaca.recipe.steps import Schedule
from alpaca.tokens import Codec
from alpaca.training import (
    checkpoint,
    compatibility,
    identity,
    inputs,
    rendezvous,
    run_log,
    sharding,
)
from alpaca.training.answers import Samples
from alpaca.training.export import Beside, Rounding, export, rehearse
from alpaca.training.identity import Start
from alpaca.training.inputs import Data, Task
from alpaca.training.loop import Trainer
from alpaca.training.loss import TargetLoss
from alpaca.training.rendezvous import on_first_rank
from alpaca.training.signals import StoppedError
from alpaca.training.weights import Dither

AGAIN = "Free some space and run the same command again: a run resumes from its last state."


@dataclass(frozen=True)
class Run:
    """A run before its first step: everything decided, ranks connected, the model not loaded."""

    start: Start
    codec: Codec
    data: Data
    tasks: Sequence[Task]
    schedule: Schedule
    mesh: DeviceMesh
    device: torch.device
    compute: torch.dtype

    @property
    def arguments(self) -> Arguments:
        """The flags, as they apply to this number of ranks."""
        return self.start.arguments

    @property
    def beside(self) -> Beside | None:
        """The base that an adapter is written for; None: all weights are trained."""
        flags = self.arguments
        return Beside(flags, flags.model_name_or_path) if flags.lora_rank else None

    @property
    def rounding(self) -> Rounding:
        """How the weights are rounded for the export; an adapter's are not."""
        if self.beside is not None:
            return Rounding(torch.float32)
        return Rounding.of(self.arguments.export_dtype, self.compute, self.arguments.seed)


def run(arguments: Arguments, given: inputs.Inputs | None = None) -> None:
    """Run the training job of one process; ends with exit code 143 or 130 when a signal stops it.

    `given`: what `inputs.read` returned for the same arguments, else it is read now.

    Raises:
        UserError: whatever is wrong with data, model or hardware, before the first step.
    """
    try:
        with ExitStack() as held:
            prepared = prepare(arguments, given or inputs.read(arguments), held)
            if prepared.start.finished:
                if dist.get_rank() == 0:
                    folder = arguments.output_dir
                    # where a run was killed just before it
                    _illustrate(folder, arguments.model_name_or_path)
                    print(f"train: {folder} already holds the model of exactly this run")
                return
            execute(prepared)
    except StoppedError as stopped:
        if dist.get_rank() == 0:
            print(f"train: {stopped}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except RuntimeError as error:
        raise rendezvous.lost_rank(error) or error from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def prepare(arguments: Arguments, given: inputs.Inputs, held: ExitStack) -> Run:
    """Check everything that can be checked, connect the ranks, lock the output folder.

    The folder is locked until `held` is closed, or this process ends.

    Raises:
        UserError: see `run`.
    """
    device = _device()
    compute = _dtype(arguments, device, main=os.environ.get("RANK", "0") == "0")
    codec, data = given.codec, given.data
    compatibility.check(arguments, codec.tokenizer)
    identity.check_output(arguments)
    # Up to here each rank is alone: a mistake in flags or data ends it before it waits for others.
    mesh = sharding.start(device, arguments)
    ranks = dist.get_world_size()

    def schedule(arguments: Arguments) -> Schedule:
        return steps.schedule(arguments, len(data.train), ranks)

    compatibility.check_schedule(arguments, schedule(arguments))

    def begin() -> Start:
        _lock(arguments.output_dir, held)
        hashes = identity.hash_inputs(arguments, codec)

        def described(other: Arguments) -> dict[str, Any]:
            return identity.describe(hashes, other, schedule(other), compute)

        return identity.begin(arguments, ranks, described)

    start = on_first_rank(begin)
    return Run(start, codec, data, given.tasks, schedule(start.arguments), mesh, device, compute)


def execute(run: Run) -> None:
    """Train, export, and say what was done.

    Raises:
        UserError: the run cannot fit, the disk fills up, or the loss is no longer a number.
        StoppedError: a signal asked for it; a checkpoint was written.
    """
    arguments, codec, main = run.arguments, run.codec, dist.get_rank() == 0
    plan = on_first_rank(lambda: _plan(run))
    if main:
        _announce(run)
    dither = Dither.of(arguments, run.compute)
    base = arguments.model_name_or_path
    module = sharding.build(
        base, run.mesh, run.compute, run.device, arguments, dither, adapter=arguments
    )
    once = sharding.reduces_once(module, run.mesh, arguments)
    trainer = Trainer(
        arguments,
        module,
        run.data,
        run.schedule,
        run.device,
        run.compute,
        run.start.meta,
        write_model=partial(_write_model, run, module),
        samples=Samples(run.tasks, codec, arguments.eval_generation_tokens) if run.tasks else None,
        reduces_once=once,
    )
    if run.start.checkpoint is None:
        _rehearse(run, module)
    with explained_disk_errors(arguments.output_dir, AGAIN):
        trainer.train(run.start.checkpoint)
        result = _export(run, trainer)
    if not arguments.keep_last_checkpoint:
        on_first_rank(lambda: _remove_checkpoint(run, result.steps))
    sample = _sample(trainer, codec)
    if main:
        _illustrate(arguments.output_dir, arguments.model_name_or_path)
        print(sample)
        print(run_log.summary(result, dist.get_world_size(), arguments.output_dir))
        if (warning := run_log.changed_by_export(result, run.rounding.facts)) is not None:
            print(warning)
        print("\n".join(report.compare(plan, result)))
        name = arguments.output_dir.resolve().name
        print(
            f"train: {arguments.output_dir / card.NAME} is its model card; to publish it all: "
            f'hf upload {name} {arguments.output_dir} --exclude "checkpoint-*" ".*"'
        )


def _export(run: Run, trainer: Trainer) -> Progress:
    """Write the model folder; returns what the run did, with the folder's own held-out loss."""
    trainer.take_best()
    found = trainer.progress

    def facts(written: Path) -> dict[str, Any]:
        nonlocal found
        found = trainer.measure_export(written)
        return {
            **run.start.meta,
            "base": _base(run.arguments.model_name_or_path),
            "result": dataclasses.asdict(found),
        }

    folder = run.arguments.output_dir
    export(trainer.module.model, run.codec, folder, run.rounding, facts, run.beside)
    return found


def _write_model(run: Run, module: TargetLoss, folder: Path, facts: dict[str, Any]) -> None:
    """Write the model of a step before the last to `folder`; a collective call."""
    sharding.reshard(module)
    known = {**run.start.meta, **facts}
    export(
        module.model,
        run.codec,
        folder,
        run.rounding,
        lambda _: {**known, "base": _base(run.arguments.model_name_or_path)},
        run.beside,
    )


def _remove_checkpoint(run: Run, last: int) -> None:
    """Remove what the complete model makes useless, unless more epochs are to follow.

    `last`: the step at which the run ended.
    With a higher --save_total_limit, the checkpoints before the last stay.
    """
    arguments = run.arguments
    for path in checkpoint.found(arguments.output_dir):
        if arguments.save_total_limit == 1 or checkpoint.step_of(path) == last:
            checkpoint.remove(path)
            print(
                f"train: the model is complete, so {path.name} was removed "
                "(--keep_last_checkpoint True keeps it, to train more epochs later)"
            )


def _lock(folder: Path, held: ExitStack) -> None:
    """Let no second run write to the output folder; raises UserError if one does."""
    busy = UserError(
        f"Another run is writing {folder}.",
        "Wait until it has ended, or name another --output_dir.",
    )
    if not held.enter_context(atomic.locked(folder / ".train.lock", busy)):
        print(f"train: {UNLOCKED.format(folder)}", flush=True)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _dtype(arguments: Arguments, device: torch.device, main: bool) -> torch.dtype:
    """The compute type the flags ask for, where the hardware is fast at it."""

    def notice(text: str) -> None:
        if main:
            print(f"train: {text}")

    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else "this CPU"
    if arguments.tf32 and not gpu:
        notice("--tf32 has no effect: it is a mode of NVIDIA GPUs, and there is none here")
    elif arguments.tf32 and torch.cuda.get_device_capability(device) < (8, 0):
        notice(f"--tf32 has no effect: {name} is older than Ampere, which introduced it")
    elif arguments.tf32:
        torch.set_float32_matmul_precision("high")
    fast = compute_dtype(device)
    if arguments.bf16 and fast is not torch.bfloat16:
        lacks = "compute capability 8.0" if gpu else "AMX or AVX512-BF16"
        notice(f"--bf16 has no effect: {name} lacks {lacks} and only emulates bf16; fp32 is faster")
    half = rules.computes_bf16(arguments.bf16, fast=fast == torch.bfloat16, cuda=gpu)
    return torch.bfloat16 if half else torch.float32


def _plan(run: Run) -> Plan | None:
    """The plan of this run, printed; refuses one that cannot fit, unless --skip_plan is given."""
    arguments = run.arguments
    passport.check_loaded(arguments.model_name_or_path)
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    case = planner.of_run(
        arguments,
        run.data.corpus,
        run.data.train,
        [devices.recognized(card.name, card.total_memory) for card in cards],
        half=run.compute == torch.bfloat16,
    )
    if case is None:
        return None
    plan = case.plan() if arguments.skip_plan else planner.check(case)
    print("\n".join(report.lines(case, plan, price=None)), flush=True)
    return plan


def _illustrate(folder: Path, base: Path) -> None:
    """Plot the losses of a finished model, add log and plots to its passport, write its card."""
    found = passport.read(folder)
    if found is not None and "beside" not in found and (folder / "log.jsonl").is_file():
        run_log.draw(folder)
        passport.add_extras(folder, ["log.jsonl", "loss.png", "loss.svg"])
    card.write(folder, base)


@cache
def _base(folder: Path) -> dict[str, Any]:
    found = passport.read(folder)
    if found is not None:
        return {"folder": folder.name, "files": found["files"]}
    paths = (
        sorted(path for path in folder.iterdir() if path.is_file()) if dist.get_rank() == 0 else []
    )
    hashes = passport.hash_files(paths)
    names = [path.name for path in paths]
    return {"folder": folder.name, "files": dict(zip(names, hashes, strict=True))}


def _rehearse(run: Run, module: TargetLoss) -> None:
    """Refuse now what would fail at the end: no permission to write, or no space for the model."""
    folder = run.arguments.output_dir
    try:
        with explained_disk_errors(folder, AGAIN):
            rehearse(module.model, run.codec, folder, run.rounding, run.beside)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error}", "Choose another --output_dir."
        ) from None


def _sample(trainer: Trainer, codec: Codec) -> str:
    """What the trained model answers, greedily, to one instruction of the data."""
    data = trainer.data
    corpus, members = (data.other, data.held_out) if data.held_out else (data.corpus, data.train)
    ids = [int(token) for token in corpus.example(members[0])]
    prompt = ids[: int(corpus.prompt_lengths[members[0]])]
    [made] = trainer.answers([prompt], codec.eos, limit=32)
    return f"--- the model's greedy answer to\n{codec.decode([*prompt, *made])}\n"


def _announce(run: Run) -> None:
    """Say what is about to be done, and what is different since an earlier start."""
    arguments, schedule = run.arguments, run.schedule
    for notice in run.start.notices:
        print(f"train: {notice}")
    print(
        f"train: {schedule.steps} steps of {schedule.batch} examples, {dist.get_world_size()} "
        f"rank(s), computing in {str(run.compute).removeprefix('torch.')}",
        flush=True,
    )
    only_last = arguments.save_strategy == "steps" and arguments.save_steps >= schedule.steps
    if only_last and not arguments.save_best:
        print(
            f"train: no checkpoint is written before the last of {schedule.steps} steps, so a "
            "crash loses the whole run; --save_steps 100 writes one every 100 steps",
            flush=True,
        )
