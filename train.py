"""Fine-tune a base model on Alpaca-format data.

One process:  python train.py --model_name_or_path weights/llama-7b --data_path alpaca_data.json
Many:         torchrun --nproc_per_node=8 train.py ...       (the command of 2023 works unchanged)
Over HTTP:    `train` below, which Cog serves as POST /trainings
"""

import os
import sys
from pathlib import Path as LocalPath
from typing import NoReturn

from cog import Input, Path, Secret

from alpaca import heap
from alpaca.errors import exit_code
from alpaca.recipe import arguments, fsdp_config
from alpaca.training import uploads

ROOT = LocalPath(__file__).resolve().parent
# Cog imports this file as a module for its training API; as a program it reads what it is told.
DOWNLOADS = None if __name__ == "__main__" else uploads.protect()
LARGEST = 9007199254740991  # 2^53 - 1: larger integers may be rounded in JSON


async def train(
    data: Path = Input(description="Alpaca-format examples, JSON or JSONL."),
    base: str = Input(
        description="Folder of the base model, or its name on the Hugging Face Hub, OWNER/NAME.",
        default="weights/smollm2-135m",
    ),
    epochs: float = Input(description="Passes over the data.", default=3.0, ge=0.01, le=100),
    learning_rate: float | None = Input(
        description="Peak learning rate; left out, 2e-5, and 2e-4 for an adapter.",
        default=None,
        ge=0,
        le=1,
    ),
    batch_size: int = Input(description="Examples per device in one batch.", default=4, ge=1),
    accumulation: int = Input(description="Batches per optimizer step.", default=8, ge=1),
    max_length: int = Input(description="Longest example in tokens.", default=512, ge=16),
    seed: int = Input(
        description="Random seed for the order of the data.", default=42, ge=0, le=LARGEST
    ),
    lora_rank: int = Input(
        description="Train a LoRA adapter of this rank, megabytes; 0 trains all weights.",
        default=0,
        ge=0,
        le=1024,
    ),
    quantize_base: str = Input(
        description="Hold an adapter's frozen base in fewer bits: no, nf4 or int8.", default="no"
    ),
    hf_token: Secret | None = Input(
        description="Token for a gated or private base of the Hub.", default=None
    ),
    wandb_api_key: Secret | None = Input(
        description="Also report the run to Weights & Biases, with this key.", default=None
    ),
) -> Path:
    """Fine-tune on all GPUs (or two CPU ranks); returns a tar file for `setup(weights)`.

    The model is also kept in alpaca_out/, or in the folder that the variable ALPACA_OUT names. With
    `lora_rank`, both hold the adapter alone.
    """
    from alpaca.folder import pack
    from alpaca.training import job

    assert DOWNLOADS is not None
    data = Path(uploads.check(LocalPath(data), DOWNLOADS))  # Cog leaves a path a string
    out = ROOT / os.environ.get("ALPACA_OUT", "alpaca_out")
    token, key = (secret and secret.get_secret_value() for secret in (hf_token, wandb_api_key))
    flags = {
        "model_name_or_path": await job.fetched(base, ROOT, {"HF_TOKEN": token} if token else {}),
        "data_path": data,
        "output_dir": out,
        "overwrite_output_dir": True,
        "num_train_epochs": epochs,
        **({} if learning_rate is None else {"learning_rate": learning_rate}),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "model_max_length": max_length,
        "seed": seed,
        "bf16": True,
        "lora_rank": lora_rank,
        "quantize_base": quantize_base,
        **({"report_to": "wandb"} if key else {}),
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    await job.launch(words, ROOT, {"WANDB_API_KEY": key} if key else {})
    return Path(pack(out, out.with_name(f"{out.name}.tar")))


def train_from_command_line() -> None:
    """Read the flags and train."""
    parsed, notices = arguments.parse(sys.argv[1:])
    arguments.check_packages(parsed)
    parsed, more = fsdp_config.apply(parsed)
    first = os.environ.get("RANK", "0") == "0"
    for notice in [*notices, *more] if first else ():
        print(f"train: {notice}")
    from alpaca.release import mergecommand
    from alpaca.training import inputs  # no torch yet, which takes seconds to import

    if parsed.merge and first:
        mergecommand.before_training(parsed.output_dir)
    given = inputs.read(parsed)
    from alpaca.training import command

    command.run(parsed, given)
    if parsed.merge and first:
        folder, base = parsed.output_dir, parsed.model_name_or_path
        mergecommand.after_training(folder, base, parsed.export_dtype)


def end(code: int) -> NoReturn:
    """End the process at once, without Python's shutdown.

    If a torch thread releases a Python object while Python 3.11 shuts down, the process sometimes
    aborts after all work is done ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    heap.replace()
    try:
        end(exit_code("train", train_from_command_line))
    except SystemExit as asked:  # by argparse, or by a signal after its checkpoint
        end(asked.code if isinstance(asked.code, int) else int(asked.code is not None))
