"""Load and save a model folder.

A folder is what transformers reads: `config.json`, safetensors shards, a tokenizer. Weights are
opened with safetensors only, never as pickles, and no code from a folder is ever run.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from alpaca import atomic, stored
from alpaca.errors import UserError
from alpaca.recipe import rules

STAGING = ".model.partial"
READY = ".ready"
TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}  # by safetensors' names


def staging(folder: Path) -> Path:
    """An empty folder inside `folder` to write a model into before `install` puts it in place.

    A training folder also holds a log and checkpoints, so it can't be replaced as a whole.
    """
    inner = folder / STAGING
    if inner.exists():
        shutil.rmtree(inner)
    inner.mkdir(parents=True)
    return inner


def install(inner: Path, folder: Path) -> None:
    """Move a complete, synced model from its staging folder to `folder`, replacing an older one.

    Until it ends, `check_folder` refuses `folder`; a move that was cut short can be repeated.
    """
    atomic.sync_tree(inner)
    (inner / READY).touch()
    atomic.sync(inner)
    names = {path.name for path in inner.iterdir()} - {READY}
    for old in folder.glob("*.safetensors*"):
        if old.name not in names:
            old.unlink()
    for name in sorted(names):
        (inner / name).replace(folder / name)
    atomic.sync(folder)
    shutil.rmtree(inner)


def finish_install(folder: Path) -> None:
    """Repeat an `install` that was cut short; drop a staging folder that never became ready."""
    inner = folder / STAGING
    if (inner / READY).exists():
        install(inner, folder)
    elif inner.exists():
        shutil.rmtree(inner)


def check_folder(folder: Path, what: str = "model") -> dict[str, stored.Entry]:
    """Raise UserError unless `folder` is a complete model folder; returns what its files hold."""
    if (folder / STAGING / READY).exists():
        raise UserError(
            f"{folder} was being replaced when its writer was stopped.",
            "Run the same training command again: it finishes at once.",
        )
    if not folder.is_dir():
        raise UserError(
            f"There is no {what} folder {folder}.",
            "Put base weights into unconverted-weights/ and run ./convert_weights.sh; "
            "./script/demo makes a small one to try.",
        )
    stored.check_adapter(folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is not a model folder: it has no config.json.",
            "Name the folder that holds config.json and the *.safetensors files.",
        )
    return stored.tensors(folder)


def check_weights(folder: Path) -> dict[str, stored.Entry]:
    """Raise UserError unless a folder holds each tensor that its config.json asks for, and no more.

    Returns them.

    The model is built on the meta device, which takes no memory.
    """
    held = check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a wrong entry makes transformers say
        raise UserError(
            f"{folder / 'config.json'} describes no model that transformers can build: {error}",
            "Fetch the file again.",
        ) from None
    model.tie_weights()
    wanted = {name: tuple(value.shape) for name, value in model.named_parameters()}
    skipped = "|".join(model._keys_to_ignore_on_load_unexpected or ()) or "(?!)"
    stored.check_fit(folder, held, wanted, skipped)
    return held


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model or tokenizer folder; raises UserError if there is none.

    As tokenizer.json says. AutoTokenizer of transformers 5 would take the class it has for some
    model types instead: a Qwen2 model with DeepSeek's tokenizer gets Qwen2's words and ends.
    """
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"There is no tokenizer in {folder} (no tokenizer.json).",
            "Run ./convert_weights.sh, which writes one into the model folder "
            "and into weights/tokenizer.",
        )
    stored.check_pointer(folder / "tokenizer.json")
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def load_model(
    folder: Path, dtype: torch.dtype | None, device_map: str | None = None
) -> PreTrainedModel:
    """Load a model folder in evaluation mode, to CPU memory or by `device_map`.

    `dtype` is the type of the weights in memory; None stands for the one they have in the files,
    fp32 where that differs from tensor to tensor. config.json's may be another, and rounds them.
    `device_map` is a device, to which the weights go straight from disk, or "auto" to spread
    them over all GPUs.
    """
    held = check_weights(folder)
    kinds = {entry.dtype for name, entry in held.items() if not name.endswith(stored.BUFFERS)}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype or (TYPES[kinds.pop()] if len(kinds) == 1 else torch.float32),
        device_map=device_map,
        local_files_only=True,
        use_safetensors=True,
    )


def compute_dtype(device: torch.device) -> torch.dtype:
    """The type to compute in: bf16 where the hardware multiplies it fast, else fp32."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        fast = rules.cpu_multiplies_bf16()
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def explained_disk_errors(folder: Path, remedy: str) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into a UserError that says where, with `remedy`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"The disk of {folder} is full.", remedy) from None
