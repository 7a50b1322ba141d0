"""Which run this is, and whether it may continue what its output folder holds.

A run is its data, base model, template and recipe. Most settings decide which numbers a checkpoint
holds, so a checkpoint of a run with others is refused. A few only say how training continues from
there, and may change when it is resumed. The number of ranks is not a setting: the examples of a
step stay the same, so accumulation follows the ranks.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alpaca import passport
from alpaca.errors import UserError
from alpaca.folder import finish_install, holds_model
from alpaca.passport import sha256
from alpaca.prompt import template_hash
from alpaca.recipe.arguments import Arguments
from alpaca.recipe.steps import Schedule
from alpaca.tokens import Codec
from alpaca.training import checkpoint, weights

# Fields of an identity that may differ from the checkpoint's, and what a user calls them. Derived
# are `steps` (from epochs, examples and batch) and `warmup` (from `steps`).
CHANGEABLE = {
    "peak": "--learning_rate",
    "steps": "steps",
    "warmup": "warm-up steps",
    "eval_data_sha256": "--eval_data_path",
    "save_best": "--save_best",
    "early_stopping_patience": "--early_stopping_patience",
}
# What a user calls the others, where it differs from the field's name.
FLAGS = {
    "data_sha256": "--data_path",
    "base_sha256": "--model_name_or_path",
    "tokenizer_sha256": "tokenizer",
    "template_sha256": "template",
    "compute": "compute type",
    "batch": "examples per step",
    "shape": "--lr_scheduler_type",
    "settings": "--lr_scheduler_kwargs",
    "moments": "--optim",
    "lora": "adapter (--lora_rank and its kin)",
    "dpo": "loss (--loss, --dpo_beta, --dpo_label_smoothing)",
    "adam": "AdamW's betas and epsilon",
}
# Beginnings of the names that a run deletes or replaces in its output folder.
REPLACED = (checkpoint.PREFIX, ".")
Identity = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """A setting that differs from the checkpoint's, `step` steps into the run."""

    step: int
    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """One clause of a notice."""
        if self.name.endswith("sha256"):
            return f"{CHANGEABLE[self.name]} (other examples, or none)"
        old, new = ("off" if value is None else value for value in (self.old, self.new))
        return f"{CHANGEABLE[self.name]} {new} (was {old})"


@dataclass(frozen=True)
class Start:
    """How a run begins.

    arguments: with the accumulation that keeps the global batch; checkpoint: what to continue from;
    changes: all that changed since the run first began, oldest first; notices: lines to print;
    finished: the folder holds this run's model, so nothing is left to do; ranks: with as many of
    them the flags, as given, make the batch.
    """

    arguments: Arguments
    identity: Identity
    checkpoint: Path | None = None
    changes: tuple[Change, ...] = ()
    notices: tuple[str, ...] = ()
    finished: bool = False
    ranks: int = 1

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint or passport holds of it; JSON values."""
        changes = [dataclasses.asdict(change) for change in self.changes]
        return {
            "run": self.identity,
            "ranks": self.ranks,
            **({"changes": changes} if changes else {}),
        }


def hash_inputs(arguments: Arguments, codec: Codec) -> Identity:
    """SHA-256 of what a run reads; the same whatever the number of ranks."""
    tokenizer = codec.tokenizer.backend_tokenizer.to_str()
    held_out = arguments.eval_data_path
    return {
        "data_sha256": sha256(arguments.data_path),
        "eval_data_sha256": sha256(held_out) if held_out else None,
        "base_sha256": passport.fingerprint(arguments.model_name_or_path),
        "tokenizer_sha256": passport.text_sha256(tokenizer),
        "template_sha256": template_hash(),
    }


def describe(
    hashes: Identity, arguments: Arguments, schedule: Schedule, compute: torch.dtype
) -> Identity:
    """What makes two runs the same run, whatever the number of ranks and the paths.

    `hashes` is what `hash_inputs` returned.
    """
    planned = dataclasses.asdict(schedule)
    # Settings that came later are named only where they are not the defaults, so that a run begun
    # by an earlier version is recognized.
    later = {
        "settings": planned.pop("settings") or None,
        "adam": None
        if _default_adam(arguments)
        else [arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon],
        "dither_masters": weights.Dither.of(arguments, compute) is not None or None,
        "lora": _adapter(arguments),
        "dpo": _preference(arguments),
        "save_best": arguments.save_best or None,
        "early_stopping_patience": arguments.early_stopping_patience or None,
    }
    return {
        **hashes,
        "compute": str(compute).removeprefix("torch."),
        **planned,
        "eval_fraction": arguments.eval_fraction,
        "model_max_length": arguments.model_max_length,
        "joint_tokenization": arguments.joint_tokenization,
        "weight_decay": arguments.weight_decay,
        "max_grad_norm": arguments.max_grad_norm,
        "moments": "8bit" if arguments.moments_8bit else "fp32",
        **{name: value for name, value in later.items() if value is not None},
    }


def _adapter(arguments: Arguments) -> dict[str, Any] | None:
    """The settings that decide which adapter is trained, and over which numbers; None: none is."""
    if not arguments.lora_rank:
        return None
    return {
        "rank": arguments.lora_rank,
        "alpha": arguments.alpha,
        "dropout": arguments.lora_dropout,
        "targets": sorted(arguments.targets) or "all-linear",
        "rslora": arguments.lora_use_rslora,
        "dora": arguments.use_dora,
        "base": arguments.quantize_base,
    }


def _preference(arguments: Arguments) -> dict[str, float] | None:
    """The settings of DPO; None: answers are learned."""
    if arguments.loss != "dpo":
        return None
    return {"beta": arguments.dpo_beta, "label_smoothing": arguments.dpo_label_smoothing}


def _default_adam(arguments: Arguments) -> bool:
    default = Arguments()
    names = ("adam_beta1", "adam_beta2", "adam_epsilon")
    return all(getattr(arguments, name) == getattr(default, name) for name in names)


def check_output(arguments: Arguments) -> None:
    """Refuse to write the trained model over the base model, even with --overwrite_output_dir."""
    folder, base = arguments.output_dir, arguments.model_name_or_path
    inside = base.resolve().relative_to(folder.resolve()) if _contains(folder, base) else None
    if inside is not None and (not inside.parts or inside.parts[0].startswith(REPLACED)):
        raise UserError(
            f"--output_dir {folder} holds the base model where training would replace it.",
            "Name another --output_dir.",
        )


def _contains(folder: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def begin(arguments: Arguments, ranks: int, described: Callable[[Arguments], Identity]) -> Start:
    """Look at the output folder and decide how the run begins; for the first rank.

    `described` gives the identity of a run with other flags.

    Raises:
        UserError: the folder holds another run's checkpoint or model, or the number of ranks
            cannot keep the global batch; the message says what to give.
    """
    folder = arguments.output_dir
    finish_install(folder)
    model = passport.read(folder)
    newest = checkpoint.newest(folder)
    meta = checkpoint.meta(newest) if newest else None
    held = meta or model or {}
    kept, notices = keep_batch(arguments, ranks, held.get("run"), held.get("ranks"), described)
    identity = _as_json(described(kept))
    # The ranks for which the flags say this batch: an adjusted run is still that of the first.
    first = ranks if kept is arguments else _ranks_of(identity, arguments)
    start = Start(kept, identity, ranks=first, notices=notices)
    if _is_finished(model, start):
        return dataclasses.replace(start, finished=True)
    if arguments.overwrite_output_dir:
        if newest and meta and meta["run"] == identity:
            return _continued(start, newest, meta)
        checkpoint.clear(folder)
        if model is not None:
            _set_log_aside(folder)
        return Start(arguments, _as_json(described(arguments)), ranks=ranks)
    if newest is None or meta is None:
        _check_starts(start, model)
        return start
    _check_continues(start, newest, meta, model)
    if model is not None:
        passport.forget_extras(folder)  # the log is about to grow
    return _continued(start, newest, meta)


def _set_log_aside(folder: Path) -> None:
    """Keep the log of a model that is about to be replaced: it stays if the new run fails."""
    passport.forget_extras(folder)
    log = folder / "log.jsonl"
    if log.is_file():
        log.replace(folder / "log.previous.jsonl")


def _is_finished(model: dict[str, Any] | None, start: Start) -> bool:
    """Whether the passport `model` is of exactly this run's export."""
    if model is None or model.get("run") != start.identity or checkpoint.STEP in model:
        return False
    exported: str = model.get("export", {}).get("dtype", "bf16")
    flags = start.arguments
    return exported == ("fp32" if flags.lora_rank else flags.export_dtype)


def _check_starts(start: Start, model: dict[str, Any] | None) -> None:
    """Refuse to start from the base model where another model, or other checkpoints, would go."""
    folder, identity = start.arguments.output_dir, start.identity
    if holds_model(folder):
        refused, changed = differences((model or {}).get("run", {}), identity)
        if model is not None and not refused and changed:
            raise UserError(
                f"{folder} holds the model of this run with other settings, and no checkpoint to "
                "continue from:\n    " + "\n    ".join(changed),
                "Choose another --output_dir, or give --overwrite_output_dir to train it again "
                "from the base model. --keep_last_checkpoint True keeps the checkpoint next time.",
            )
        raise _another_model(folder, [])
    for path in checkpoint.models(folder):
        refused, changed = differences((passport.read(path) or {}).get("run", {}), identity)
        if refused or changed:
            raise _another_run(path, refused + changed)


def _another_run(found: Path, differing: list[str]) -> UserError:
    return UserError(
        f"{found} belongs to another run:\n    " + "\n    ".join(differing),
        "Choose another --output_dir, or give --overwrite_output_dir to start over.",
    )


def _check_continues(
    start: Start, newest: Path, meta: dict[str, Any], model: dict[str, Any] | None
) -> None:
    """Refuse to continue another run's checkpoint, or to replace another run's model."""
    folder, identity = start.arguments.output_dir, start.identity
    refused, changed = differences(meta["run"], identity)
    left = identity["steps"] - meta["step"]
    if holds_model(folder):
        # A model that this run has made, or would make with fewer steps, is replaced by the longer
        # run's; any other stays.
        other, _ = differences((model or {}).get("run", {}), identity)
        if other or refused or left <= 0:
            raise _another_model(folder, refused + changed)
    if refused:
        raise _another_run(newest, refused + changed)
    if changed and left <= 0:
        raise UserError(
            f"{newest} is at or beyond the last of {identity['steps']} steps, and was trained with "
            "other settings:\n    " + "\n    ".join(changed),
            "Give more steps (--num_train_epochs, --max_steps), or --overwrite_output_dir to start "
            "over.",
        )


def _continued(start: Start, newest: Path, meta: dict[str, Any]) -> Start:
    """The start from a checkpoint, with what has changed since named once."""
    old, new, step = meta["run"], start.identity, meta["step"]
    changes = tuple(
        Change(step, name, old.get(name), new.get(name))
        for name in CHANGEABLE
        if old.get(name) != new.get(name)
    )
    notices = start.notices
    if changes:
        notices += (f"resumed after step {step} with {', '.join(map(str, changes))}",)
    earlier = tuple(Change(**change) for change in meta.get("changes", []))
    return dataclasses.replace(start, checkpoint=newest, changes=earlier + changes, notices=notices)


def keep_batch(
    arguments: Arguments,
    ranks: int,
    earlier: Identity | None,
    earlier_ranks: int | None,
    described: Callable[[Arguments], Identity],
) -> tuple[Arguments, tuple[str, ...]]:
    """The flags with which a step on `ranks` ranks takes as many examples as the earlier run's.

    Only where the ranks are what changed: with other flags the batch is meant to be another.

    Raises:
        UserError: no accumulation can; the message names flags that do.
    """
    size, often = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    if earlier is None or earlier["batch"] == size * often * ranks:
        return arguments, ()
    batch = earlier["batch"]
    if earlier_ranks is not None and batch != size * often * earlier_ranks:
        return arguments, ()
    fitting, rest = divmod(batch, size * ranks)
    other = dataclasses.replace(arguments, gradient_accumulation_steps=max(1, fitting))
    # With the batch of before: are these two the same run otherwise?
    same = {**_as_json(described(other)), "batch": batch}
    refused, _ = differences(earlier, same)
    if refused:
        return arguments, ()
    if rest or not fitting:
        raise UserError(
            f"The run takes {batch} examples per step; {ranks} ranks of "
            f"--per_device_train_batch_size {size} cannot.",
            _fitting_flags(batch, size, ranks),
        )
    before = f"{earlier_ranks} before" if earlier_ranks else "another number before"
    return other, (
        f"{ranks} rank(s), {before}: --gradient_accumulation_steps {fitting} instead of {often} "
        f"keeps {batch} examples per step",
    )


def _ranks_of(run: Identity, arguments: Arguments) -> int:
    """On how many ranks the flags give the run's batch."""
    each = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    found: int = run["batch"] // each
    return found


def _fitting_flags(batch: int, size: int, ranks: int) -> str:
    each, rest = divmod(batch, ranks)
    if rest or not each:
        return (
            f"Use a number of ranks that divides {batch}, or --overwrite_output_dir to start over."
        )
    fitting = max(n for n in range(1, size + 1) if each % n == 0)
    return (
        f"Give --per_device_train_batch_size {fitting} "
        f"--gradient_accumulation_steps {each // fitting}."
    )


def differences(old: Identity, new: Identity) -> tuple[list[str], list[str]]:
    """A line for each field in which two runs differ: those that must match, those that may not."""
    refused: list[str] = []
    changed: list[str] = []
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            called = CHANGEABLE.get(name) or FLAGS.get(name, name)
            line = f"{called}: {old.get(name)} before, {new.get(name)} now"
            (changed if name in CHANGEABLE else refused).append(line)
    return refused, changed


def _another_model(folder: Path, differing: list[str]) -> UserError:
    details = ":\n    " + "\n    ".join(differing) if differing else "."
    return UserError(
        f"{folder} already holds another model{details}",
        "Choose another --output_dir, or give --overwrite_output_dir to replace it.",
    )


def _as_json(identity: Identity) -> Identity:
    found: Identity = json.loads(json.dumps(identity))
    return found
