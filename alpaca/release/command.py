"""`python -m alpaca export FOLDER --to ...`: a model folder in the form another program takes."""

import argparse
import math
from pathlib import Path

from alpaca.convert.command import shard_size
from alpaca.errors import UserError
from alpaca.release import streams

AGAIN = "Free some space and run the same command again."

FORMS = {
    "gguf": "one file for llama.cpp",
    "ollama": "a GGUF file and the Modelfile that Ollama builds a model from",
    "tar": "one file for COG_WEIGHTS, as the training API returns it",
    "bf16": "a model folder in that type, in files of --max_shard_size",
    "fp16": "",
    "fp32": "",
}
# What a folder in another type keeps of the passport: how the model came to be.
CARRIED = ("run", "ranks", "changes", "base", "result")


def parser() -> argparse.ArgumentParser:
    """Flags of the verb."""
    made = argparse.ArgumentParser(
        description="Write a model folder in the form that another program takes.",
        epilog="forms:\n" + "\n".join(f"  {name:<8}{line}" for name, line in FORMS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("folder", type=Path, help="a model folder")
    made.add_argument("--to", required=True, choices=list(FORMS), help="see below")
    made.add_argument("-o", "--output", type=Path, required=True, help="file or folder to write")
    made.add_argument(
        "--type",
        default=None,
        help="GGUF's type of weights: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0; or a K-quant "
        "such as Q4_K_M, which needs llama.cpp's llama-quantize (default: the folder's own type)",
    )
    made.add_argument(
        "--max_shard_size",
        type=shard_size,
        default="5GB",
        metavar="SIZE",
        help="largest file of a folder, for example 500MB (default: 5GB)",
    )
    made.add_argument("--force", action="store_true", help="replace what is there")
    return made


def run(arguments: argparse.Namespace) -> None:
    """Check the folder, write the export, say what it is."""
    # Imported here because they import torch and transformers, which would slow down --help.
    from alpaca import folder as folders
    from alpaca import passport

    source: Path = arguments.folder
    folders.check_folder(source)
    passport.check_loaded(source)
    if arguments.output.exists() and not arguments.force:
        raise UserError(f"{arguments.output} is already there.", "--force replaces it.")
    streams.keep_freed_memory()
    if arguments.to == "ollama":
        _ollama(arguments)
    elif arguments.to == "tar":
        with folders.explained_disk_errors(arguments.output.parent, AGAIN):
            folders.pack(source, arguments.output)
        print(f"{arguments.output}\n  ./script/serve --weights {arguments.output}")
    elif arguments.to != "gguf":
        _weights(arguments)
    else:
        _gguf(source, arguments.output, arguments.type)


def _gguf(source: Path, output: Path, kind: str | None) -> None:
    from alpaca.release import gguf

    kind = kind or gguf.own_type(source)
    if kind not in gguf.TYPES and not gguf.K_QUANT.fullmatch(kind):
        raise UserError(f"--type {kind} is not known.", f"Give one of {', '.join(gguf.TYPES)}.")
    written = gguf.write(source, output, kind)
    far = "" if math.isnan(written.rounding) else f", {_far(written.rounding)}"
    print(f"{written.path}: {kind}, {written.size / 1e9:.2f} GB{far}")
    print(f"  sha256 {written.sha256}")
    print(f"  llama-server -m {written.path}")


def _weights(arguments: argparse.Namespace) -> None:
    """Write a model folder in another type, as the converter does, with where it comes from."""
    from dataclasses import replace

    from alpaca import card, passport
    from alpaca.convert.conversion import Layout, convert
    from alpaca.convert.huggingface import open_folder
    from alpaca.shards import DTYPES

    source, output = arguments.folder, arguments.output
    found = open_folder(source, output.name)
    recorded = passport.read(source) or {}
    carried = {key: recorded[key] for key in CARRIED if key in recorded}
    if "run" in carried:
        carried["export"] = {"dtype": arguments.to, "rounding": "nearest"}
    found = replace(found, facts={**found.facts, **carried})
    layout = Layout(DTYPES[arguments.to], arguments.max_shard_size)
    convert(found, output.parent, layout, force=True)
    if "run" in carried:
        card.write(output, source)
    print(f"{output} is ready.")


def _far(rounding: float) -> str:
    return f"rounded by {rounding:.2%} (norm)" if rounding else "every number exact"


def _ollama(arguments: argparse.Namespace) -> None:
    from alpaca import atomic
    from alpaca.release import ollama

    with atomic.folder(arguments.output) as partial:
        _gguf(arguments.folder, partial / ollama.MODEL, arguments.type)
        atomic.write_text(partial / "Modelfile", ollama.modelfile(arguments.folder))
    print(f"  cd {arguments.output} && ollama create NAME -f Modelfile && ollama run NAME")
