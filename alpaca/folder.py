"""A model folder: written complete, checked before it is used, its tokenizer loaded. No torch.

A folder is what transformers reads: `config.json`, safetensors shards, a tokenizer. Importing torch
takes seconds, which a wrong path or a damaged folder should not wait for.
"""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from alpaca import atomic, stored
from alpaca.errors import FULL, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAGING = ".model.partial"
READY = ".ready"
# One of them makes a folder a model's or an adapter's, so one takes the place of the other.
KINDS = ("config.json", "adapter_config.json")


def staging(folder: Path) -> Path:
    """Create an empty folder inside `folder` to write a model into; `install` then moves its files.

    A training folder also holds a log and checkpoints, so it can't be replaced as a whole.
    """
    inner = folder / STAGING
    atomic.remove(inner)
    inner.mkdir(parents=True)
    return inner


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model, or an adapter of one."""
    return any((folder / name).exists() for name in KINDS)


def install(inner: Path, folder: Path) -> None:
    """Move a complete model from its staging folder to `folder`, replacing an older one.

    Until it has finished, `check_folder` refuses `folder`. An interrupted move can be repeated.
    """
    ready = inner / READY
    if not ready.exists():
        atomic.sync_tree(inner)
        atomic.write_text(ready, "\n".join(path.name for path in inner.iterdir()))
    # of the whole model: a repeated move finds only what is left
    listed = ready.read_text(encoding="utf-8").split("\n")
    names = set(filter(None, listed)) or {path.name for path in inner.iterdir()} - {READY}
    kinds = [folder / name for name in KINDS] if names & set(KINDS) else []
    for old in [*folder.glob("*.safetensors*"), *kinds]:
        if old.name not in names:
            old.unlink(missing_ok=True)
    for name in sorted(names):
        if (inner / name).exists():
            (inner / name).replace(folder / name)
    atomic.sync(folder)
    atomic.remove(inner)


def finish_install(folder: Path) -> None:
    """Repeat an interrupted `install`; delete a staging folder whose model is incomplete."""
    inner = folder / STAGING
    if (inner / READY).exists():
        install(inner, folder)
    else:
        atomic.remove(inner)


def check_folder(folder: Path, what: str = "model") -> dict[str, stored.Entry]:
    """Raise UserError unless `folder` is a complete model folder; returns its tensors."""
    if (folder / STAGING / READY).exists():
        raise UserError(
            f"{folder} was being replaced when training stopped.",
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


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model or tokenizer folder; raises UserError if there is none.

    It is loaded as tokenizer.json defines it. For some model types, AutoTokenizer of transformers 5
    would use its own class instead: a Qwen2 model with DeepSeek's tokenizer would get Qwen2's word
    splitting and EOS.
    """
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"There is no tokenizer in {folder} (no tokenizer.json).",
            "Run ./convert_weights.sh, which writes one into the model folder "
            "and into weights/tokenizer.",
        )
    stored.check_pointer(folder / "tokenizer.json")
    from transformers import PreTrainedTokenizerFast  # a second, for a folder that is there

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exceptions for a damaged file
        raise UserError(
            f"The tokenizer in {folder} cannot be read: {error}",
            "Fetch or convert the folder again.",
        ) from None


def pack(folder: Path, path: Path) -> Path:
    """Pack a model folder's files (not its log and checkpoints) as a tar file; returns `path`.

    It is complete or absent, and what `COG_WEIGHTS` takes.
    """
    partial = atomic.partial_path(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(partial, "w", dereference=True) as tar:
            for file in sorted(folder.iterdir()):
                if file.is_file() and file.suffix != ".jsonl":
                    tar.add(file, arcname=file.name)
        atomic.sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@contextmanager
def explained_disk_errors(folder: Path, remedy: str) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into a UserError with the folder and `remedy`."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"The disk of {folder} is full.", remedy) from None
