"""The trainer's flags: one frozen dataclass, and the flag names in use since 2023.

The flags are those of the published command, which the Hugging Face Trainer of 2023 defined.
Renamed flags are accepted under both names. Flags without effect are accepted with one line of
notice. An unknown flag is refused, and the error names its nearest match.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from alpaca.errors import UserError
from alpaca.recipe import schedules
from alpaca.recipe.schedules import SHAPES

# adamw_hf and adamw_torch, the defaults of 2023, are the same optimizer
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adamw_hf", "adamw_8bit")
QUANTIZED = ("nf4", "int8")
ALL_LINEAR = ("all-linear", "all")
ADAPTER_RATE = 2e-4  # --learning_rate of adapters: ten times that of all weights
ADAPTER_RANK = 16  # where a flag of another trainer asks for LoRA and names no rank
PREFERENCE_RATE = 5e-6  # with --loss dpo: LLaMA-Factory's in its examples of DPO with LoRA
SHARDINGS = ("full_shard", "shard_grad_op", "hybrid_shard", "no_shard")


def flag(default: Any, text: str, *choices: str) -> Any:
    """A field with its `--help` text ("": another flag's text names it) and its allowed values."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Seed:
    """What every random choice depends on: the order of examples, held-out ones, dithering."""

    seed: int = flag(42, "random seed for the order of the data")


@dataclass(frozen=True)
class Compilation:
    """Whether layers are compiled; packs are then padded to one of a few lengths."""

    torch_compile: bool = flag(False, "compile the decoder layers (packs get one of eight lengths)")


@dataclass(frozen=True)
class DataFlags(Seed):
    """Which examples are read, and how they become tokens."""

    model_name_or_path: Path = flag(Path("weights/smollm2-135m"), "folder with the base model")
    data_path: Path = flag(Path("data/seed_tasks.jsonl"), "Alpaca-format JSON or JSONL")
    loss: str = flag("sft", "learn answers (sft), or which of two is preferred (dpo)", "sft", "dpo")
    tokenizer_name_or_path: Path | None = flag(None, "tokenizer folder, if not the model's")
    model_max_length: int = flag(512, "longest example in tokens; more is cut off and counted")
    joint_tokenization: bool = flag(False, "tokenize prompt and answer as one text, as in 2023")
    eval_data_path: Path | None = flag(None, "held-out examples")
    eval_fraction: float = flag(0.0, "share of data_path to hold out instead")
    eval_generations: int = flag(
        0, "at evaluations, log answers of --eval_generation_tokens to so many tasks"
    )
    eval_generation_tokens: int = flag(128, "")


@dataclass(frozen=True)
class PackingFlags(DataFlags, Compilation):
    """How the examples of a step are divided into forward passes."""

    per_device_train_batch_size: int = flag(4, "examples per device in one batch")
    packing: bool = flag(True, "pack examples without padding; False pads as in 2023")
    max_tokens_per_pack: int = flag(0, "0: per_device_train_batch_size x model_max_length")

    @property
    def longest_example(self) -> int:
        """The most tokens that one example takes in a pack: a pair has two answers."""
        return self.model_max_length * (2 if self.loss == "dpo" else 1)

    @property
    def pack_tokens(self) -> int:
        """The most tokens in one forward pass; this bounds the memory."""
        return self.max_tokens_per_pack or self.per_device_train_batch_size * self.longest_example


@dataclass(frozen=True)
class OptimizerFlags:
    """AdamW's settings."""

    optim: str = flag("adamw_torch_fused", "optimizer", *OPTIMIZERS)
    learning_rate: float = flag(2e-5, "peak learning rate")
    weight_decay: float = flag(0.0, "AdamW's weight decay (not on norms and biases)")
    adam_beta1: float = flag(0.9, "AdamW's; as --adam_beta2 [0.999] and --adam_epsilon [1e-08]")
    adam_beta2: float = flag(0.999, "")
    adam_epsilon: float = flag(1e-8, "")
    max_grad_norm: float = flag(1.0, "clip gradients to this norm; 0: do not clip")

    @property
    def moments_8bit(self) -> bool:
        """Whether AdamW's moments take 8 bits each, not 32."""
        return self.optim == "adamw_8bit"


@dataclass(frozen=True)
class ScheduleFlags(PackingFlags, OptimizerFlags):
    """How many steps a run takes, of how many examples, at which learning rates."""

    num_train_epochs: float = flag(3.0, "passes over the data")
    max_steps: int = flag(-1, "stop after this many optimizer steps instead")
    gradient_accumulation_steps: int = flag(8, "batches per optimizer step")
    lr_scheduler_type: str = flag(
        "cosine", "schedule; settings: --lr_scheduler_kwargs JSON", *SHAPES
    )
    lr_scheduler_kwargs: str = flag("", "")
    warmup_ratio: float = flag(0.03, "share of all steps in which the learning rate rises")
    warmup_steps: float = flag(0.0, "overrides warmup_ratio: a number of steps, or a share below 1")

    @property
    def schedule_settings(self) -> dict[str, Any]:
        """The settings in `lr_scheduler_kwargs`; raises UserError if the schedule rejects them."""
        return schedules.settings(
            self.lr_scheduler_type, self.lr_scheduler_kwargs, self.learning_rate
        )


@dataclass(frozen=True)
class ShardingFlags(Compilation):
    """How weights, gradients and moments are spread over ranks, and what is kept in memory."""

    fsdp: str = flag("full_shard auto_wrap", "how to shard; see below")
    fsdp_transformer_layer_cls_to_wrap: str = flag("", "")
    fsdp_config: str = flag("", "JSON file or text with FSDP settings, as transformers reads it")
    gradient_checkpointing: bool = flag(False, "compute activations again to save memory")
    ddp_timeout: int = flag(600, "seconds after which a rank that does not answer is given up")

    @property
    def sharding(self) -> str:
        """The sharding strategy: the one word of `fsdp` that names it."""
        words = [word for word in self.fsdp.split() if word in SHARDINGS]
        return words[0] if words else SHARDINGS[0]

    @property
    def offload(self) -> bool:
        """Whether weights, gradients and moments are kept in host memory."""
        return "offload" in self.fsdp.split()


@dataclass(frozen=True)
class PrecisionFlags(Seed):
    """The number types of the computation, the master weights and the exported model."""

    bf16: bool | None = flag(
        None, "compute in bf16 where the hardware is fast at it (default: on such GPUs)"
    )
    dither_masters: bool = flag(True, "with bf16: keep updates that are too small for bf16")
    export_dtype: str = flag("bf16", "type of the exported weights", "bf16", "fp16", "fp32")
    tf32: bool = flag(False, "allow TF32 matrix products (Ampere and newer GPUs)")


@dataclass(frozen=True)
class AdapterFlags(Seed):
    """LoRA: what is trained in place of all weights, and how the frozen base is held."""

    lora_rank: int = flag(0, "train a LoRA adapter of this rank; 0: train all weights")
    lora_alpha: float = flag(
        0.0, "its scale is alpha / rank [0: twice the rank]; also: --lora_dropout [0.0]"
    )
    lora_dropout: float = flag(0.0, "")
    lora_target_modules: str = flag("all-linear", "adapt these layers, such as q_proj,v_proj")
    lora_use_rslora: bool = flag(False, "")
    use_dora: bool = flag(
        False, "also train the rows' lengths (DoRA); --lora_use_rslora: alpha / sqrt(rank)"
    )
    quantize_base: str = flag("no", "hold the frozen base in 4 or 8 bits (QLoRA)", "no", *QUANTIZED)
    merge: bool = flag(False, "also write base and adapter merged, beside output_dir: NAME-merged")

    @property
    def alpha(self) -> float:
        """LoRA's alpha, given or derived from the rank."""
        return self.lora_alpha or 2.0 * self.lora_rank

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the layers to adapt; empty: all linear layers of the decoder."""
        if self.lora_target_modules in ALL_LINEAR:
            return ()
        return tuple(re.split(r"[,\s]+", self.lora_target_modules.strip(", ")))


@dataclass(frozen=True)
class PreferenceFlags:
    """DPO: how strongly the model may leave its base, and how sure the preferences are."""

    dpo_beta: float = flag(0.1, "higher keeps DPO nearer to the base; also --dpo_label_smoothing")
    dpo_label_smoothing: float = flag(0.0, "")


@dataclass(frozen=True)
class SavingFlags:
    """When checkpoints are written, and how many are kept."""

    save_strategy: str = flag("steps", "when to write a checkpoint", "no", "steps", "epoch")
    save_steps: int = flag(500, "steps between checkpoints")
    save_total_limit: int = flag(1, "how many checkpoints to keep")
    save_best: bool = flag(
        False, "also keep the weights with the lowest held-out loss; export those"
    )
    save_only_model: bool = flag(False, "checkpoints are models to load, not states to resume from")
    keep_last_checkpoint: bool = flag(False, "keep the last one after the export: for more epochs")


@dataclass(frozen=True)
class ReportingFlags:
    """When the held-out loss is measured, and where the log goes."""

    eval_strategy: str = flag("no", "when to evaluate", "no", "steps", "epoch")
    eval_steps: int = flag(500, "steps between evaluations")
    early_stopping_patience: int = flag(
        0, "stop after this many evaluations without a new lowest loss; 0: never"
    )
    logging_steps: int = flag(1, "steps between lines of log.jsonl")
    report_to: str = flag("none", "also log to these", "none", "tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class LoopFlags(PackingFlags, OptimizerFlags, PreferenceFlags, SavingFlags, ReportingFlags):
    """What the training loop reads."""

    output_dir: Path = flag(Path("alpaca_out"), "folder for the trained model")


@dataclass(frozen=True)
class Arguments(LoopFlags, ScheduleFlags, ShardingFlags, PrecisionFlags, AdapterFlags):
    """All settings of a training run; the defaults are the published recipe.

    Each part of the trainer names in its signature the class above that holds what it reads.
    """

    overwrite_output_dir: bool = flag(False, "replace another run's model in output_dir")
    skip_plan: bool = flag(False, "start even if the plan says that the run cannot fit")


# The order of --help.
PARTS = (
    DataFlags,
    LoopFlags,
    Arguments,
    ScheduleFlags,
    OptimizerFlags,
    PackingFlags,
    Seed,
    ReportingFlags,
    AdapterFlags,
    PreferenceFlags,
    PrecisionFlags,
    ShardingFlags,
    Compilation,
    SavingFlags,
)

# Values that need a package which the image lacks, and the extra of pyproject.toml that pins it.
OPTIONAL = {
    "optim": ("optim", {"adamw_8bit": "torchao"}),
    "report_to": (
        "report", {"tensorboard": "tensorboard", "trackio": "trackio"},
    ),
}  # fmt: skip

# Other names of a field: of 2023, and of LLaMA-Factory, axolotl and TRL.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "load_best_model_at_end": "save_best",
    "lora_r": "lora_rank",
    "lora_target": "lora_target_modules",
    "use_rslora": "lora_use_rslora",
    "peft_use_rslora": "lora_use_rslora",
    "peft_use_dora": "use_dora",
    "beta": "dpo_beta",
    "pref_beta": "dpo_beta",
}

# Their flags that stand for others: what each value means here. Flags given beside them win.
LORA = {"lora_rank": ADAPTER_RANK}
TRANSLATED: dict[str, dict[str, dict[str, Any]]] = {
    "finetuning_type": {"full": {}, "lora": LORA},
    "adapter": {"lora": LORA, "qlora": {**LORA, "quantize_base": "nf4"}},
    "use_peft": {"true": LORA, "false": {}},
    "load_in_4bit": {"true": {"quantize_base": "nf4"}, "false": {}},
    "load_in_8bit": {"true": {"quantize_base": "int8"}, "false": {}},
    "quantization_bit": {"4": {"quantize_base": "nf4"}, "8": {"quantize_base": "int8"}},
    "lora_target_linear": {"true": {"lora_target_modules": "all-linear"}, "false": {}},
    "stage": {"sft": {}, "dpo": {"loss": "dpo"}},
    "rl": {"dpo": {"loss": "dpo"}},
    "pref_loss": {"sigmoid": {}},
    "loss_type": {"sigmoid": {}},
}

# Flags of the published commands that change nothing here, each with the reason.
WITHOUT_EFFECT = {
    "cache_dir": "nothing is downloaded",
    "dataloader_num_workers": "the data is tokenized once and memory-mapped",
    "ddp_find_unused_parameters": "sharding is FSDP's in every mode",
    "fp16": "with --bf16 True it computes in bf16, which needs no loss scaling",
    "group_by_length": "packs hold no padding, whatever the order",
    "logging_dir": "log.jsonl and the plots are in output_dir",
    "logging_strategy": "--logging_steps decides",
    "greater_is_better": "of held-out losses the lowest is the best",
    "metric_for_best_model": "the held-out loss decides (eval_loss)",
    "per_device_eval_batch_size": "evaluation packs examples as training does",
    "remove_unused_columns": "other keys are not read",
    "resume_from_checkpoint": "a run always resumes from its newest checkpoint",
}


def parser() -> argparse.ArgumentParser:
    """The command line of train.py."""
    made = argparse.ArgumentParser(
        prog="train.py",
        usage="train.py [--FLAG VALUE ...]",
        description="Fine-tune a LLaMA-family model: python train.py --data_path alpaca_data.json",
        epilog=f"--fsdp: one of {', '.join(SHARDINGS)}; with offload, weights stay in CPU memory; "
        "--fsdp_transformer_layer_cls_to_wrap is checked against the model's own layer class\n"
        f"--lr_scheduler_type: one of {', '.join(SHAPES)}\n"
        "Also accepted: "
        + ", ".join(f"--{name}" for name in [*RENAMED, *TRANSLATED, *WITHOUT_EFFECT]),
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    for name, kind, spec in _flags():
        made.add_argument(
            f"--{name}",
            **_reader(kind),
            default=spec.default,
            choices=spec.metadata["choices"] or None,
            metavar=name.rpartition("_")[2].upper(),
            help=f"{spec.metadata['help']} [{spec.default}]"
            if spec.metadata["help"]
            else argparse.SUPPRESS,
        )
    return made


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """One line per flag, so that all flags fit on one screen."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=48, width=124)


def _flags() -> list[tuple[str, Any, dataclasses.Field[Any]]]:
    """Name, type and description of each flag, in the order of `--help`."""
    hints = get_type_hints(Arguments)
    described = {spec.name: spec for spec in dataclasses.fields(Arguments)}
    names = [name for part in PARTS for name in part.__annotations__]
    return [(name, hints[name], described[name]) for name in names]


def _reader(kind: Any) -> dict[str, Any]:
    """How argparse reads a field of this type; `--flag` alone means True, as in 2023."""
    inner = [part for part in get_args(kind) if part is not type(None)] or [kind]
    if inner[0] is bool:
        return {"type": _truth, "nargs": "?", "const": True}
    return {"type": inner[0]}


def _truth(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return words[text.lower()]


def parse(argv: list[str]) -> tuple[Arguments, list[str]]:
    """Read a command line; returns the arguments and the notices to print once.

    Raises:
        UserError: an unknown flag, or values that cannot work together. A value of the wrong
            type ends in argparse's own message, exit code 2.
    """
    known = {name for name, _, _ in _flags()}
    argv, kept = _translated(argv)
    notices: list[str] = []
    ignoring = False
    for word in argv:
        if not word.startswith("--"):
            if not ignoring:
                kept.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = RENAMED.get(name, name)
        ignoring = name in WITHOUT_EFFECT
        if ignoring:
            notices.append(f"--{name} has no effect: {WITHOUT_EFFECT[name]}")
            continue
        if name not in known | {"help"}:
            raise UserError(f"train.py has no flag --{name}.", _nearest(name, known))
        kept.append(f"--{name}{equals}{value}")
    arguments = Arguments(**vars(parser().parse_args(kept)))
    if arguments.lora_rank and not any(
        word.partition("=")[0] == "--learning_rate" for word in kept
    ):
        preference = arguments.loss == "dpo"
        rate, flags = (
            (PREFERENCE_RATE, "--loss dpo") if preference else (ADAPTER_RATE, "--lora_rank")
        )
        arguments = dataclasses.replace(arguments, learning_rate=rate)
        notices.append(f"--learning_rate {rate}, the default with {flags}")
    check(arguments)
    if arguments.lr_scheduler_type in schedules.WITHOUT_WARMUP:
        notices += [
            f"{word} has no effect: --lr_scheduler_type {arguments.lr_scheduler_type} has no "
            "warm-up; constant_with_warmup has one"
            for word in (word.partition("=")[0] for word in kept)
            if word.startswith("--warmup_")
        ]
    return arguments, notices


def _translated(argv: list[str]) -> tuple[list[str], list[str]]:
    """The other words of a command line, and the flags that its `TRANSLATED` ones stand for."""
    words, meant = [], []
    left = list(argv)
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in TRANSLATED:
            words.append(word)
            continue
        if not equals:
            value = left.pop(0) if left and not left[0].startswith("--") else "true"
        values = TRANSLATED[name]
        if value.lower() not in values:
            raise UserError(f"--{name} {value} is not known here.", f"Give {', '.join(values)}.")
        meant += [f"--{other}={chosen}" for other, chosen in values[value.lower()].items()]
    return words, meant


def _nearest(name: str, known: set[str]) -> str:
    if name == "deepspeed":
        return "Use --fsdp full_shard, which shards as ZeRO stage 3 does."
    match = difflib.get_close_matches(name, [*known, *RENAMED, *TRANSLATED, *WITHOUT_EFFECT], n=1)
    return f"Did you mean --{match[0]}?" if match else "python train.py --help lists all of them."


def check(arguments: Arguments) -> None:
    """Raise UserError where a value, or two together, cannot work."""
    for name in (
        "model_max_length",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "save_steps",
        "save_total_limit",
        "eval_steps",
        "logging_steps",
        "ddp_timeout",
        "eval_generation_tokens",
    ):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(arguments, name)}.")
    _check_numbers(arguments)
    words = arguments.fsdp.split()
    unknown = set(words) - {*SHARDINGS, "auto_wrap", "offload"}
    if unknown or len(set(words) & set(SHARDINGS)) > 1:
        raise UserError(
            f"--fsdp {arguments.fsdp!r} is not valid.",
            f"Give one of {', '.join(SHARDINGS)}, optionally with auto_wrap and offload.",
        )
    if not 0 <= arguments.eval_fraction < 1:
        raise UserError(f"--eval_fraction must be in [0, 1), not {arguments.eval_fraction}.")
    if arguments.eval_fraction and arguments.eval_data_path:
        raise UserError(
            "--eval_fraction and --eval_data_path cannot be combined.", "Give only one."
        )
    _check_evaluation(arguments)
    if arguments.pack_tokens < arguments.longest_example:
        what = "two answers" if arguments.loss == "dpo" else "one example"
        raise UserError(
            f"--max_tokens_per_pack {arguments.max_tokens_per_pack} cannot hold {what} of "
            f"--model_max_length {arguments.model_max_length}.",
            "Raise the first or lower the second.",
        )
    _check_adapter(arguments)
    _check_preference(arguments)
    if arguments.max_steps == 0 or (arguments.max_steps < 0 and arguments.num_train_epochs <= 0):
        raise UserError("Nothing to train: --num_train_epochs and --max_steps give no steps.")


def _check_evaluation(arguments: Arguments) -> None:
    """Refuse flags that need held-out examples, or evaluations while training, without those."""
    strategy, compared = arguments.eval_strategy, compares_evaluations(arguments)
    needing = [
        f"--eval_strategy {strategy}" if strategy != "no" else None,
        f"--eval_generations {arguments.eval_generations}" if arguments.eval_generations else None,
        compared,
    ]
    wanted = next(filter(None, needing), None)
    if wanted and not (arguments.eval_fraction or arguments.eval_data_path):
        raise UserError(
            f"{wanted}: there is nothing to evaluate on.",
            "Give --eval_data_path or --eval_fraction.",
        )
    if compared and strategy == "no":
        raise UserError(
            f"{compared} compares evaluations while training, and --eval_strategy no has none.",
            "Give --eval_strategy steps (and --eval_steps) or --eval_strategy epoch.",
        )


def _check_adapter(arguments: Arguments) -> None:
    """Refuse adapter settings that cannot be trained, or that are given without an adapter."""
    default = AdapterFlags()
    for name in AdapterFlags.__annotations__:
        if not arguments.lora_rank and getattr(arguments, name) != getattr(default, name):
            raise UserError(
                f"--{name} {getattr(arguments, name)}: without an adapter it means nothing.",
                f"Give --lora_rank too, such as --lora_rank {ADAPTER_RANK}.",
            )
    if arguments.lora_dropout >= 1:
        raise UserError(f"--lora_dropout must be in [0, 1), not {arguments.lora_dropout}.")
    if arguments.use_dora and arguments.quantize_base != "no":
        raise UserError(
            f"--use_dora with --quantize_base {arguments.quantize_base}: the row lengths of "
            "quantized weights would be trained, and served with other weights.",
            "Leave one of them out.",
        )


def _check_preference(arguments: Arguments) -> None:
    """Refuse DPO without what it needs, and its settings without it."""
    default = PreferenceFlags()
    if arguments.loss != "dpo":
        for name in PreferenceFlags.__annotations__:
            if getattr(arguments, name) != getattr(default, name):
                raise UserError(
                    f"--{name} {getattr(arguments, name)}: it is a setting of DPO.",
                    "Give --loss dpo too, or leave it out.",
                )
        return
    if not arguments.lora_rank:
        raise UserError(
            "--loss dpo without an adapter: the reference it compares with is the base model, "
            "with the adapter switched off.",
            f"Give --lora_rank too, such as --lora_rank {ADAPTER_RANK}.",
        )
    if arguments.joint_tokenization:
        raise UserError(
            "--joint_tokenization with --loss dpo: a token over the end of the prompt would differ "
            "between the two answers, which share their prompt.",
            "Leave one of them out.",
        )
    if not arguments.dpo_beta > 0:
        raise UserError(f"--dpo_beta must be above 0, not {arguments.dpo_beta}.")
    if not 0 <= arguments.dpo_label_smoothing < 0.5:
        raise UserError(
            f"--dpo_label_smoothing must be in [0, 0.5), not {arguments.dpo_label_smoothing}."
        )


def compares_evaluations(flags: LoopFlags) -> str | None:
    """The flag that needs several evaluations, with its value; None if none is given."""
    if flags.save_best:
        return "--save_best True"
    patience = flags.early_stopping_patience
    return f"--early_stopping_patience {patience}" if patience else None


def _check_numbers(arguments: Arguments) -> None:
    """Refuse NaN and infinite numbers, and negative ones where they make no sense."""
    for name, kind, _ in _flags():
        if kind is float and not math.isfinite(getattr(arguments, name)):
            raise UserError(f"--{name} must be a finite number, not {getattr(arguments, name)}.")
    for name in (
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "seed",
        "warmup_steps",
        "max_tokens_per_pack",
        "adam_epsilon",
        "eval_generations",
        "early_stopping_patience",
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
    ):
        if getattr(arguments, name) < 0:
            raise UserError(f"--{name} must not be negative: {getattr(arguments, name)}.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be in [0, 1), not {getattr(arguments, name)}.")
    assert isinstance(arguments.schedule_settings, dict)
    if not 0 <= arguments.warmup_ratio <= 1:
        raise UserError(f"--warmup_ratio must be in [0, 1], not {arguments.warmup_ratio}.")


def check_packages(arguments: Arguments) -> None:
    """Raise UserError where a flag needs a package that is not installed here."""
    for name, (extra, packages) in OPTIONAL.items():
        package = packages.get(getattr(arguments, name))
        if package and importlib.util.find_spec(package) is None:
            raise UserError(
                f"--{name} {getattr(arguments, name)} needs the package {package}.",
                f"pip install -e '.[{extra}]'",
            )
