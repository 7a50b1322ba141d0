"""Open `.pth` and `.bin` files without running code in them.

A pickle is a program. torch's restricted unpickler (`weights_only=True`) builds tensors and nothing
else. The opcodes are scanned first, so that the refusal can name the functions that a file calls.
Tensors are memory-mapped: opening a 16 GB file costs nothing until they are read.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from alpaca.errors import UserError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def open_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file, memory-mapped, by name.

    Raises:
        UserError: the file is truncated or damaged, calls functions, or holds no tensors.
    """
    if not is_zip(path):
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) is not a complete PyTorch file: "
            "it is cut short, damaged, or older than PyTorch 1.6.",
            "Fetch it again; if it is that old, save it again with a newer PyTorch.",
        )
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        if not wanted:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # on a damaged pickle, the unpickler can raise anything
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged: {reason}", "Fetch it again.") from None
    if wanted:
        raise UserError(
            f"{path} was refused: opening it would run {', '.join(sorted(wanted))}.",
            "Weights need no code. Do not open this file with anything else; get another copy.",
        )
    return _check_tensors(path, content)


def is_zip(path: Path) -> bool:
    """Whether a file is a ZIP archive, judged by its last bytes."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it looks like one but is inconsistent
        return False


def _check_tensors(path: Path, content: object) -> dict[str, torch.Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise UserError(
            f"{path} does not hold a dictionary of tensors.", "Check that it is a weights file."
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path} holds {name!r}, which is not a tensor.")
    return dict(content)


def check_type(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raise UserError unless a tensor holds plain floating-point numbers."""
    if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"{path}: {name} is {kind}; weights are fp16, bf16 or fp32.",
            "Quantized checkpoints can be converted only from GGUF.",
        )


def saved_as(path: Path) -> str:
    """The name under which PyTorch wrote a file, without its suffix ("archive" in older files).

    Raises:
        UserError: the directory of the ZIP archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()[0].split("/")[0]
    except (zipfile.BadZipFile, ValueError, IndexError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged: {error}", "Fetch it again.") from None
