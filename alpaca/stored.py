"""What a model folder holds: which files are its weights, and what each says of its tensors.

Every program asks here, so that none trains, plans, serves or converts other weights than the
rest, or than transformers. Reads config.json and file headers only, and imports no torch: a plan
and a refusal come at once.
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpaca.errors import UserError

INDEX = "model.safetensors.index.json"
FLOATS = ("BF16", "F16", "F32")
LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
POINTER = b"version https://git-lfs.github.com/spec/"
# Stored by older programs; the model computes them itself, and transformers skips them.
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: its type as safetensors spells it, its shape, and its first byte."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def weight_files(folder: Path, stem: str = "model", ending: str = ".safetensors") -> list[Path]:
    """The files that hold a folder's weights: those of the index, else the single file.

    Where both are there, transformers loads the single file and vLLM those of the index, so
    that is refused unless they are the same. `pytorch_model` and `.bin` ask for old files.

    Raises:
        UserError: there is neither, or both, or the index is damaged, or names a missing file.
    """
    single, index = folder / f"{stem}{ending}", folder / f"{stem}{ending}.index.json"
    if not index.is_file():
        if single.is_file():
            return [single]
        raise _no_weights(folder, single.name, index.name, ending)
    listed = _listed(index, ending)
    if single.is_file() and listed != [single.name]:
        raise UserError(
            f"{folder} holds two sets of weights: {single.name}, which transformers loads, and "
            f"{index.name} with {_several(listed)}, which vLLM loads.",
            f"Delete the one that is not meant: {single.name}, or {index.name} and its files.",
        )
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{index} names {len(listed)} files: {_several(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing.",
            f"Put what is missing into {folder}.",
        )
    return [folder / name for name in listed]


def _listed(index: Path, ending: str) -> list[str]:
    """The files that an index names, sorted."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{index} lists no files (weight_map).", "Fetch the file again.")
    for name in table.values():
        if not isinstance(name, str) or not name.endswith(ending) or "\0" in name:
            raise UserError(f"{index} names {name!r}, which is no file.", "Fetch the file again.")
        if Path(name).name != name:
            raise UserError(f"{index} names {name!r}, which leads out of {index.parent}.",
                            "Fetch the file again.")  # fmt: skip
    return sorted(set(table.values()))


def _several(names: Iterable[str], shown: int = 4) -> str:
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more


def _no_weights(folder: Path, single: str, index: str, ending: str) -> UserError:
    found = sorted(path.name for path in folder.glob(f"*{ending}"))
    if not found:
        return UserError(
            f"{folder} holds no *{ending} files.",
            f"Convert it first: python -m alpaca convert --input_dir {folder}",
        )
    return UserError(
        f"{folder} holds {_several(found)}, but neither {single} nor {index}, so which of them "
        "are the weights is not known.",
        f"Fetch {index} as well; a single file with all weights must be named {single}.",
    )


def foreign_files(folder: Path) -> list[str]:
    """Names of weight files in a folder that are none of its weights: another program's may be."""
    own = {path.name for path in weight_files(folder)}
    kinds = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.gguf", "*.safetensors.index.json")
    if len(own) > 1 or (folder / INDEX).is_file():
        own.add(INDEX)
    return sorted({path.name for kind in kinds for path in folder.glob(kind)} - own)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises UserError where it is none."""
    check_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path} is damaged: {error}", "Fetch the file again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object.", "Fetch the file again.")
    return value


def check_pointer(path: Path) -> None:
    """Refuse a file that is Git LFS's note about the file that should be here."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(
                f"{path} is a Git LFS pointer: a note about the file, not the file.",
                f"Fetch the file itself: git -C {path.parent} lfs pull",
            )


def tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder's weights, by name, from the files' headers.

    Raises:
        UserError: see `weight_files` and `header`; or two files hold the same tensor.
    """
    found: dict[str, Entry] = {}
    for path in weight_files(folder):
        for name, entry in header(path).items():
            if name in found:
                raise UserError(
                    f"{found[name].path.name} and {path.name} in {folder} both hold {name}.",
                    f"Delete {INDEX} and the files of the model that is not meant.",
                )
            found[name] = entry
    return found


def header(path: Path) -> dict[str, Entry]:
    """The tensors of one file: name to entry (huggingface/safetensors, README, "Format").

    Raises:
        UserError: the file is cut short, damaged, or a Git LFS pointer.
    """
    check_pointer(path)
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(LONGEST_HEADER, size):
                raise ValueError("it is cut short, or no safetensors file")
            held = json.loads(file.read(length))
        found = {}
        for name, entry in held.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
                raise ValueError(f"{name} has an impossible shape or place")
            found[name] = Entry(path, str(entry["dtype"]), shape, 8 + length + start, end - start)
        wanted = max((entry.start + entry.size for entry in found.values()), default=8 + length)
        if wanted != size:
            raise ValueError(f"it has {size:,} bytes, its header says {wanted:,}")
    except (struct.error, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        told = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is damaged: {told}.", "Copy or convert it again.") from None
    return found
