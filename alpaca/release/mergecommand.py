"""`python -m alpaca merge ADAPTER -o FOLDER`: a LoRA adapter and its base as one model folder."""

import argparse
from pathlib import Path

from alpaca.convert.command import shard_size
from alpaca.errors import UserError
from alpaca.release import outputs

TYPES = ("base", "bf16", "fp16", "fp32")


def parser() -> argparse.ArgumentParser:
    """Flags of the verb."""
    made = argparse.ArgumentParser(
        description="Write a LoRA adapter (PEFT's format) and its base model as one model folder. "
        "Golden prompts are answered with base + adapter, merged in fp32 and as written; the "
        "largest logit difference is printed and kept in the passport.",
        epilog="The base is checked against the hashes in the adapter's passport, if it has one.",
    )
    made.add_argument("adapter", type=Path, help="the adapter's folder")
    made.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    made.add_argument(
        "--base",
        type=Path,
        help="the base model's folder (default: the one that the adapter names, also looked for "
        "next to the adapter and in weights/)",
    )
    made.add_argument(
        "--dtype", choices=TYPES, default="base", help="type to write (default: the base's own)"
    )
    made.add_argument(
        "--rounding",
        choices=["nearest", "stochastic"],
        help="how numbers become 16-bit ones (default: stochastic, which was nearer to base + "
        "adapter: docs/adapters.md)",
    )
    made.add_argument(
        "--base_weights",
        choices=["trained", "own"],
        default="trained",
        help="of an adapter over a quantized base: merge into those weights, as it was trained "
        "(default), or into the base's own",
    )
    made.add_argument(
        "--max_shard_size",
        type=shard_size,
        default="5GB",
        metavar="SIZE",
        help="largest file of the folder, for example 500MB (default: 5GB)",
    )
    made.add_argument(
        "--proof",
        choices=["auto", "always", "never"],
        default="auto",
        help="compare the logits: auto does where each of three passes takes under a minute",
    )
    made.add_argument("--force", action="store_true", help="replace what is there")
    return made


def run(arguments: argparse.Namespace) -> None:
    """Check adapter and base, write the merge, say what it is."""
    # Imported here because they import torch and transformers, which would slow down --help.
    from alpaca import atomic, merging, passport
    from alpaca.adapter import Adapter
    from alpaca.release import merge
    from alpaca.shards import DTYPES

    output: Path = arguments.output
    atomic.recover(output)
    outputs.check(output, [arguments.adapter], force=arguments.force, folder=True)
    if not arguments.adapter.is_dir():
        raise UserError(f"There is no folder {arguments.adapter}.", "Name an adapter's folder.")
    adapter = Adapter(arguments.adapter)
    passport.check_template(adapter.folder, adapter.passport)
    base = arguments.base or passport.find_base(adapter.folder)
    outputs.check(output, [base], force=arguments.force, folder=True)
    own = arguments.base_weights == "own"
    if adapter.quantized is not None:
        told = "the base's own weights, with which it was not trained" if own else "those"
        print(
            f"note: {adapter.folder} was trained over {adapter.quantized} weights of its base; it "
            f"is merged into {told}"
        )
    chosen = merge.Layout(
        DTYPES.get(arguments.dtype),
        arguments.rounding or merging.ROUNDING,
        arguments.max_shard_size,
        None if own else adapter.quantized,
    )
    found = merge.merge(adapter, base, output, chosen, proving=arguments.proof)
    print(merge.summary(adapter, base, output, found))


def merged_folder(folder: Path) -> Path:
    """Where the merge of a run's adapter goes: beside its folder."""
    whole = folder.resolve()
    return whole.with_name(f"{whole.name}-merged")


def before_training(folder: Path) -> None:
    """Raise UserError if something else than an earlier merge of this folder is in its way."""
    from alpaca import atomic, passport

    output = merged_folder(folder)
    atomic.recover(output)
    held = (passport.read(output) if output.is_dir() else None) or {}
    if output.exists() and held.get("adapter", {}).get("folder") != folder.resolve().name:
        raise UserError(
            f"--merge writes {output}, and something else is there.",
            "Move it away, or choose another --output_dir.",
        )


def after_training(folder: Path, base: Path, dtype: str) -> None:
    """Write the merge of a run's adapter beside its folder, unless it is there already.

    The merge of an earlier adapter of the same folder is replaced.

    Raises:
        UserError: as `merge.merge`; or another folder is in the way.
    """
    from alpaca import adapter as adapters
    from alpaca import passport
    from alpaca.release import merge
    from alpaca.shards import DTYPES

    before_training(folder)
    output = merged_folder(folder)
    adapter = adapters.Adapter(folder)
    held = passport.read(output) if output.is_dir() else None
    if held is not None:
        weights, same = adapters.WEIGHTS, passport.hash_files([folder / adapters.WEIGHTS])
        is_this = held["adapter"]["files"].get(weights) == same[0]
        if is_this and held["export"]["dtype"] == dtype:
            print(f"train: {output} already holds the merge of this adapter")
            return
    outputs.check(output, [folder, base], force=True, folder=True)
    layout = merge.Layout(DTYPES[dtype], quantized=adapter.quantized)
    found = merge.merge(adapter, base, output, layout)
    print(merge.summary(adapter, base, output, found))
