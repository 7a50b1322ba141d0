"""Finds the model folder to serve.

Sources, in this order: the argument that Cog passes to `setup(weights)` (fine-tuned weights: a
folder or a tar file), the environment variable ALPACA_WEIGHTS, and `alpaca_out/`, the output folder
of training. A tar file is unpacked once into `.cache/weights/`.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alpaca import atomic
from alpaca.errors import UserError
from alpaca.folder import explained_disk_errors
from alpaca.serving import archives

VARIABLE = "ALPACA_WEIGHTS"
TRAINED = "alpaca_out"
CACHE = Path(".cache/weights")


@dataclass(frozen=True)
class Weights:
    """A model folder, and a description of where it was named."""

    folder: Path
    origin: str


def locate(given: Path | None, environment: Mapping[str, str], root: Path) -> Weights:
    """Find the model folder; relative paths start at `root`.

    Raises:
        UserError: there are no weights, or a source names a path that does not exist.
    """
    if given is not None:
        return Weights(_folder(given, root), f"the weights given to setup ({given})")
    if named := environment.get(VARIABLE):
        return Weights(_folder(Path(named), root), f"{VARIABLE}={named}")
    if (root / TRAINED / "config.json").is_file():
        return Weights(root / TRAINED, f"{TRAINED}/")
    raise UserError(
        "There are no weights to serve.",
        f"Do one of these: train a model into {TRAINED}/; set {VARIABLE} to a model folder, for "
        f"example {VARIABLE}=demo/alpaca_out, a small one that ./script/demo makes; or hand Cog "
        "trained weights (COG_WEIGHTS, a URL, folder or tar file).",
    )


def _folder(path: Path, root: Path) -> Path:
    path = root / path
    if path.is_dir():
        return _inner(path)
    if not path.is_file():
        raise UserError(
            f"The weights {path} do not exist.",
            "Name a model folder (config.json and *.safetensors), or a tar file of one.",
        )
    return _inner(_unpack(path, root))


def _unpack(tar: Path, root: Path) -> Path:
    """Unpack a tar file into the cache, unless one with the same content is already there."""
    with open(tar, "rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    target = root / CACHE / name
    while not _is_unpacked(target):
        try:
            with (
                explained_disk_errors(target.parent, "Free some space and start again."),
                atomic.locked(target.with_name(f".{name}.lock"), _UnpackingError()),
            ):
                if not _is_unpacked(target):  # by a server that held the lock until now
                    if target.exists():
                        print(
                            f"note: {target} was changed since; unpacking {tar} again", flush=True
                        )
                    archives.unpack(tar, target)
        except _UnpackingError:
            time.sleep(1)  # another server unpacks it
    return target


def _is_unpacked(target: Path) -> bool:
    return target.exists() and archives.unchanged(target)


class _UnpackingError(Exception):
    """Another process unpacks the same archive."""


def _inner(folder: Path) -> Path:
    """The folder itself or, for `tar -cf x.tar folder/`, the only model folder in it."""
    inner = [path for path in folder.iterdir() if (path / "config.json").is_file()]
    if not (folder / "config.json").is_file() and len(inner) == 1:
        return inner[0]
    return folder
