"""`python -m alpaca convert`: convert published weights to a clean Hugging Face folder."""

import argparse
import re
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        description="Convert Meta checkpoints, GGUF files or old Hugging Face folders. "
        "Without options, it converts the one model in unconverted-weights/.",
        epilog="Writes OUTPUT_DIR/llama-7b for a folder named 7B, else a folder of the same name "
        "in lower case (Llama-2-7b: llama-2-7b), and OUTPUT_DIR/tokenizer. "
        "If it is interrupted, run it again: finished shards are kept.",
    )
    options.add_argument(
        "--input_dir",
        type=Path,
        default=Path("unconverted-weights"),
        help="folder that holds models, or one model's own folder (default: %(default)s)",
    )
    options.add_argument("--model_size", help="folder below --input_dir, for example 7B")
    options.add_argument(
        "--output_dir", type=Path, default=Path("weights"), help="(default: %(default)s)"
    )
    options.add_argument(
        "--dtype",
        choices=["bf16", "fp16", "fp32", "keep"],
        default="keep",
        help="type of the written weights (default: the source's; bf16 for quantized ones)",
    )
    options.add_argument(
        "--instruct",
        action=argparse.BooleanOptionalAction,
        help="Llama 3 from Meta: whether it is a chat model (default: by the folder's name)",
    )
    options.add_argument(
        "--max_shard_size",
        type=shard_size,
        default="5GB",
        metavar="SIZE",
        help="largest output file, for example 500MB (default: 5GB)",
    )
    options.add_argument(
        "--tokenizer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write OUTPUT_DIR/tokenizer, the path in the command of 2023 (default: yes)",
    )
    options.add_argument("--force", action="store_true", help="replace an existing folder")
    return options


def shard_size(text: str) -> int:
    """Parse `500MB` or `5GB` to bytes, in powers of ten as transformers does."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text.upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 500MB or 5GB")
    return int(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]


def run(arguments: argparse.Namespace) -> None:
    """Find the model, print what was found, convert it."""
    # Imported here because they import torch and transformers, which would slow down --help.
    from alpaca.convert.conversion import Layout, convert, write_tokenizer
    from alpaca.convert.find import find, open_source
    from alpaca.shards import DTYPES

    folder = find(arguments.input_dir, arguments.model_size)
    source = open_source(arguments.input_dir, folder, instruct=arguments.instruct)
    print("\n".join([source.found, *source.notes]), flush=True)
    layout = Layout(DTYPES.get(arguments.dtype), arguments.max_shard_size)
    final = convert(source, arguments.output_dir, layout, force=arguments.force)
    if arguments.tokenizer:
        write_tokenizer(source, arguments.output_dir / "tokenizer")
    print(f"{final} is ready.")
