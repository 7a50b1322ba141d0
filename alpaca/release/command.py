"""`python -m alpaca export FOLDER --to ...`: a model folder in the form another program takes."""

import argparse
import math
from pathlib import Path

from alpaca.convert.command import shard_size
from alpaca.errors import UserError
from alpaca.release import outputs, streams

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
CARRIED = ("run", "ranks", "changes", "checkpoint", "base", "result")


def parser() -> argparse.ArgumentParser:
    """Flags of the verb."""
    made = argparse.ArgumentParser(
        description="Write a model folder in the form that another program takes.",
        epilog="forms:\n" + "\n".join(f"  {name:<8}{line}" for name, line in FORMS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("folder", type=Path, help="a model folder; for tar, an adapter's too")
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
    from alpaca import model, passport, stored
    from alpaca.adapter import Adapter

    source: Path = arguments.folder
    is_folder = arguments.to not in ("gguf", "tar")
    outputs.check(arguments.output, [source], force=arguments.force, folder=is_folder)
    if arguments.to == "tar" and stored.is_adapter(source):
        Adapter(source)  # refuses a damaged one
    else:
        model.check_weights(source)
    passport.check_loaded(source)
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
        print(f"  llama-server -m {arguments.output}")


def _gguf(source: Path, output: Path, kind: str | None) -> None:
    from alpaca.release import gguf

    kind = kind or gguf.own_type(source)
    if kind not in gguf.TYPES and not gguf.K_QUANT.fullmatch(kind):
        raise UserError(f"--type {kind} is not known.", f"Give one of {', '.join(gguf.TYPES)}.")
    written = gguf.write(source, output, kind)
    far = "" if math.isnan(written.rounding) else f", {_far(written.rounding)}"
    print(f"{written.path.name}: {kind}, {written.size / 1e9:.2f} GB{far}")
    print(f"  sha256 {written.sha256}")


def _weights(arguments: argparse.Namespace) -> None:
    """Write a model folder in another type, as the converter does, with where it comes from."""
    from dataclasses import replace

    from alpaca import card, passport, prompt, stored
    from alpaca.convert.conversion import Layout, convert
    from alpaca.convert.huggingface import open_folder
    from alpaca.shards import DTYPES

    source, output = arguments.folder, arguments.output
    found = open_folder(source, output.name)
    print("\n".join(found.notes), end="\n" if found.notes else "")
    recorded = passport.read(source) or {}
    own = stored.read_json(source / "tokenizer_config.json").get("chat_template")
    ours = [prompt.chat_template(adds_bos) for adds_bos in (True, False)]
    if "run" not in recorded and own is not None and own not in ours:
        raise UserError(
            f"{source} has a chat template of its own, which the written folder would not have.",
            "Export models that were trained here, or --to gguf, which keeps it.",
        )
    carried = {key: recorded[key] for key in CARRIED if key in recorded}
    if "result" in carried:  # measured on other numbers
        carried["result"] = {**carried["result"], "eval_loss_exported": None}
    if "run" in carried:
        before = recorded.get("export", {})
        rounding = "none" if arguments.to == "fp32" else "nearest"
        same = before.get("dtype") == arguments.to
        carried["export"] = before if same else {"dtype": arguments.to, "rounding": rounding}
    found = replace(found, facts={**found.facts, **carried})
    layout = Layout(DTYPES[arguments.to], arguments.max_shard_size)
    convert(found, output.parent, layout, force=True)
    if "result" in carried:
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
    print(f"{arguments.output} is ready.")
    print(f"  cd {arguments.output} && ollama create NAME -f Modelfile && ollama run NAME")
