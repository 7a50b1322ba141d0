"""What `train.py` does, from parsed flags to a finished model folder."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from alpaca import passport
from alpaca.errors import UserError
from alpaca.model import (
    check_folder,
    compute_dtype,
    explained_disk_errors,
    finish_install,
    load_tokenizer,
)
from alpaca.passport import sha256
from alpaca.plan import devices, planner, report
from alpaca.plan.plan import Plan
from alpaca.prompt import template_hash
from alpaca.recipe import rules, steps
from alpaca.recipe.arguments import Arguments
from alpaca.recipe.corpus import Corpus, open_corpus, split
from alpaca.recipe.steps import Schedule
from alpaca.tokens import Codec
from alpaca.training import checkpoint, compatibility, run_log, sharding
from alpaca.training.export import Rounding, export, rehearse
from alpaca.training.loop import Data, Trainer
from alpaca.training.loss import TargetLoss
from alpaca.training.rendezvous import on_first_rank
from alpaca.training.signals import StoppedError

AGAIN = "Free some space and run the same command again: it goes on from the last checkpoint."


def run(arguments: Arguments) -> None:
    """Run the training job of one process; ends with exit code 143 or 130 when a signal stops it.

    Raises:
        UserError: whatever is wrong with data, model or hardware, before the first step.
    """
    main = os.environ.get("RANK", "0") == "0"
    device = _device()
    dtype = _dtype(arguments, device, main)
    check_folder(arguments.model_name_or_path)
    codec = Codec(load_tokenizer(arguments.tokenizer_name_or_path or arguments.model_name_or_path))
    compatibility.check(arguments, codec.tokenizer)
    data = _split(arguments, codec)
    # Counted from the environment: everything a user can mend is found before ranks meet.
    schedule = steps.schedule(arguments, len(data.train), int(os.environ.get("WORLD_SIZE", "1")))
    identity = _identity(arguments, codec, schedule, dtype)
    mesh = sharding.start(device, arguments.sharding)
    try:
        if on_first_rank(lambda: _already_done(arguments, identity)):
            if main:
                _illustrate(arguments.output_dir)  # where a run was killed just before it
                print(f"train: {arguments.output_dir} already holds the model of exactly this run")
            return
        plan = on_first_rank(lambda: _plan(arguments, data, dtype))
        if main:
            _tell(arguments, data, schedule, dtype, codec)
        rounded = Rounding.of(arguments.export_dtype, dtype, arguments.seed)
        module = sharding.build(arguments.model_name_or_path, mesh, dtype, device, arguments)
        once = sharding.reduces_once(module, mesh, arguments)
        trainer = Trainer(
            arguments, module, data, schedule, device, dtype, identity, reduces_once=once
        )
        newest = on_first_rank(lambda: checkpoint.newest(arguments.output_dir, identity))
        if newest is None:
            _rehearse(arguments, module, codec, rounded)
        with explained_disk_errors(arguments.output_dir, AGAIN):
            result = trainer.train(newest)

            def facts(written: Path) -> dict[str, Any]:
                nonlocal result
                result = trainer.measure_export(written)
                return {
                    "run": identity, "base": _base(arguments), "result": dataclasses.asdict(result),
                }  # fmt: skip

            sharding.reshard(module)
            export(module.model, codec, arguments.output_dir, rounded, facts)
        sample = _sample(trainer, codec)
        if main:
            _illustrate(arguments.output_dir)
            print(sample)
            print(run_log.summary(result, dist.get_world_size(), arguments.output_dir))
            if (warning := run_log.changed_by_export(result, rounded.facts)) is not None:
                print(warning)
            print("\n".join(report.compare(plan, result)))
    except StoppedError as stopped:
        if main:
            print(f"train: {stopped}; run the same command again to go on", file=sys.stderr)
        sys.exit(stopped.exit_code)
    finally:
        dist.destroy_process_group()


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
        notice(f"--tf32 has no effect: {name} is older than Ampere, which brought it")
    elif arguments.tf32:
        torch.set_float32_matmul_precision("high")
    fast = compute_dtype(device)
    if arguments.bf16 and fast is not torch.bfloat16:
        lacks = "compute capability 8.0" if gpu else "AMX or AVX512-BF16"
        notice(f"--bf16 has no effect: {name} lacks {lacks} and only emulates bf16; fp32 is faster")
    half = rules.computes_bf16(arguments.bf16, fast=fast == torch.bfloat16, cuda=gpu)
    return torch.bfloat16 if half else torch.float32


def _open(arguments: Arguments, data: Path, codec: Codec) -> Corpus:
    return open_corpus(
        data, codec, planner.CACHE, arguments.model_max_length, joint=arguments.joint_tokenization
    )


def _split(arguments: Arguments, codec: Codec) -> Data:
    """The data set, with what is held out of it or read beside it."""
    corpus = _open(arguments, arguments.data_path, codec)
    train, held_out = split(corpus, arguments.eval_fraction, arguments.seed)
    if not train:
        raise _without_targets(arguments, arguments.data_path)
    if arguments.eval_data_path:
        other = _open(arguments, arguments.eval_data_path, codec)
        evaluated, _ = split(other, 0.0, arguments.seed)
        if not evaluated:
            raise _without_targets(arguments, arguments.eval_data_path)
        return Data(corpus, train, other, evaluated)
    return Data(corpus, train, corpus, held_out)


def _without_targets(arguments: Arguments, data: Path) -> UserError:
    return UserError(
        f"No example of {data} has an answer token left after truncation.",
        f"Raise --model_max_length (now {arguments.model_max_length}).",
    )


def _identity(
    arguments: Arguments, codec: Codec, schedule: Schedule, dtype: torch.dtype
) -> dict[str, Any]:
    """What makes two runs the same run, whatever the number of ranks and the paths."""
    tokenizer = codec.tokenizer.backend_tokenizer.to_str()
    held_out = arguments.eval_data_path
    planned = dataclasses.asdict(schedule)
    # Settings that came later are named where they are not what they were before: older runs of the
    # same recipe stay the same runs.
    later = {
        "settings": planned.pop("settings") or None,
        "adam": None if _usual_adam(arguments) else [
            arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon
        ],
        "dither_masters": sharding.Dither.of(arguments, dtype) is not None or None,
    }  # fmt: skip
    return {
        "data_sha256": sha256(arguments.data_path),
        "eval_data_sha256": sha256(held_out) if held_out else None,
        "base_sha256": passport.fingerprint(arguments.model_name_or_path),
        "tokenizer_sha256": passport.text_sha256(tokenizer),
        "template_sha256": template_hash(),
        "compute": str(dtype).removeprefix("torch."),
        **planned,
        "eval_fraction": arguments.eval_fraction,
        "model_max_length": arguments.model_max_length,
        "joint_tokenization": arguments.joint_tokenization,
        "weight_decay": arguments.weight_decay,
        "max_grad_norm": arguments.max_grad_norm,
        "moments": "8bit" if arguments.moments_8bit else "fp32",
        **{name: value for name, value in later.items() if value is not None},
    }


def _usual_adam(arguments: Arguments) -> bool:
    usual = Arguments()
    names = ("adam_beta1", "adam_beta2", "adam_epsilon")
    return all(getattr(arguments, name) == getattr(usual, name) for name in names)


def _plan(arguments: Arguments, data: Data, dtype: torch.dtype) -> Plan | None:
    """The plan of this run, printed; refuses one that cannot fit, unless --skip_plan is given."""
    passport.check_loaded(arguments.model_name_or_path)
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    case = planner.of_run(
        arguments, data.corpus, data.train,
        [devices.recognized(card.name, card.total_memory) for card in cards],
        half=dtype == torch.bfloat16,
    )  # fmt: skip
    if case is None:
        return None
    plan = case.plan() if arguments.skip_plan else planner.check(case)
    print("\n".join(report.lines(case, plan, price=None)), flush=True)
    return plan


def _already_done(arguments: Arguments, identity: dict[str, Any]) -> bool:
    """Whether output_dir holds this run's model; refuses to train over another run's."""
    folder = arguments.output_dir
    finish_install(folder)
    found = passport.read(folder)
    if found is not None and found.get("run") == identity:
        held = found.get("export", {}).get("dtype", "bf16")
        if held == arguments.export_dtype:
            return True
    if arguments.overwrite_output_dir:
        if not _resumable(folder, identity):
            checkpoint.clear(folder)
        return False
    if (folder / "config.json").exists():
        raise UserError(
            f"{folder} already holds another model.",
            "Choose another --output_dir, or give --overwrite_output_dir to replace it.",
        )
    checkpoint.newest(folder, identity)  # refuses one of another run
    return False


def _resumable(folder: Path, identity: dict[str, Any]) -> bool:
    try:
        return checkpoint.newest(folder, identity) is not None
    except UserError:
        return False


def _illustrate(folder: Path) -> None:
    """Draw the losses beside a finished model, and take log and drawing into its passport, once."""
    found = passport.read(folder)
    if found is not None and "beside" not in found and (folder / "log.jsonl").is_file():
        run_log.draw(folder)
        passport.add_beside(folder, ["log.jsonl", "loss.png", "loss.svg"])


def _base(arguments: Arguments) -> dict[str, Any]:
    folder = arguments.model_name_or_path
    found = passport.read(folder)
    if found is not None:
        return {"folder": folder.name, "files": found["files"]}
    paths = (
        sorted(path for path in folder.iterdir() if path.is_file()) if dist.get_rank() == 0 else []
    )
    hashes = passport.hash_files(paths)
    names = [path.name for path in paths]
    return {"folder": folder.name, "files": dict(zip(names, hashes, strict=True))}


def _rehearse(arguments: Arguments, module: TargetLoss, codec: Codec, rounded: Rounding) -> None:
    """Refuse now what would fail at the end: no permission to write, or no space for the model."""
    folder = arguments.output_dir
    try:
        with explained_disk_errors(folder, AGAIN):
            rehearse(module.model, codec, folder, rounded)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error}", "Name another --output_dir."
        ) from None


def _sample(trainer: Trainer, codec: Codec) -> str:
    """What the trained model answers, greedily, to one instruction of the data."""
    data = trainer.data
    corpus, members = (data.other, data.held_out) if data.held_out else (data.corpus, data.train)
    ids = [int(token) for token in corpus.example(members[0])]
    prompt = ids[: int(corpus.prompt_lengths[members[0]])]
    made = trainer.answer(prompt, codec.eos)
    return f"--- the model's greedy answer to\n{codec.decode(prompt)}{codec.decode(made)}\n"


def _tell(
    arguments: Arguments, data: Data, schedule: Schedule, dtype: torch.dtype, codec: Codec
) -> None:
    corpus = data.corpus
    for notice in dict.fromkeys([*corpus.notices, *data.other.notices]):
        print(f"train: {notice}")
    for kind, name in enumerate(("without input", "with input")):
        shown = next((i for i in data.train if corpus.kinds[i] == kind), None)
        if shown is not None:
            text = run_log.show_example(corpus, shown, codec)
            print(f"--- an example {name}, as it is trained on\n{text}\n")
    print(
        f"train: {len(data.train)} examples, {schedule.steps} steps of {schedule.batch}, "
        f"{dist.get_world_size()} rank(s), computing in {str(dtype).removeprefix('torch.')}; "
        f"{corpus.truncated} example(s) cut at {arguments.model_max_length} tokens, "
        f"{corpus.without_targets} of them left without an answer token (not trained on)",
        flush=True,
    )
    if data.other is not corpus and data.other.without_targets:
        print(
            f"train: {data.other.without_targets} of {len(data.other)} examples of "
            f"{arguments.eval_data_path} have no answer token left (not evaluated)",
            flush=True,
        )
    if corpus.empty_outputs:
        print(
            f"train: {corpus.empty_outputs} example(s) have an empty output and teach to answer "
            "with nothing, as in 2023; a copy without them: python -m alpaca audit "
            f"{arguments.data_path} --leave_out empty_output --write-clean clean.json",
            flush=True,
        )
    if arguments.save_strategy == "steps" and arguments.save_steps >= schedule.steps:
        print(
            f"train: no checkpoint is due before the last of {schedule.steps} steps: a lost "
            "machine loses the run; --save_steps 100 saves it every 100 steps",
            flush=True,
        )
