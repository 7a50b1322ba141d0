"""Finds the model folder to serve, and its adapters.

Sources, in this order: the argument that Cog passes to `setup(weights)` (fine-tuned weights: a
folder or a tar file), the environment variable ALPACA_WEIGHTS, and `alpaca_out/`, the output folder
of training. A tar file is unpacked once into `.cache/weights/`. If the folder holds an adapter,
ALPACA_BASE or the adapter's settings name the model. ALPACA_ADAPTERS names more adapters.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from alpaca import atomic, passport, stored
from alpaca.errors import UserError
from alpaca.folder import explained_disk_errors
from alpaca.serving import archives

VARIABLE = "ALPACA_WEIGHTS"
BASE = "ALPACA_BASE"
ADAPTERS = "ALPACA_ADAPTERS"
TRAINED = "alpaca_out"
CACHE = Path(".cache/weights")


@dataclass(frozen=True)
class Weights:
    """A model folder, and a description of where it was named.

    adapters: folders by name. default: the name of the one that answers requests without a name.
    """

    folder: Path
    origin: str
    adapters: Mapping[str, Path] = field(default_factory=dict)
    default: str = ""


def locate(given: Path | None, environment: Mapping[str, str], root: Path) -> Weights:
    """Find the model folder and the adapters; relative paths start at `root`.

    Raises:
        UserError: there are no weights, or a source names a path that does not exist.
    """
    found = _with_base(_named(given, environment, root), environment, root)
    adapters = dict(found.adapters)
    for name, path in _listed(environment.get(ADAPTERS, "")):
        if name in adapters:
            raise UserError(f"Two adapters are named {name}.", f"Give one of {ADAPTERS} another.")
        adapters[name] = _folder(path, root)
        if not stored.is_adapter(adapters[name]):
            raise UserError(
                f"{ADAPTERS}: {adapters[name]} is not an adapter's folder.",
                f"Name one with {stored.ADAPTER} and {stored.ADAPTER_WEIGHTS}.",
            )
    return replace(found, adapters=adapters)


def of(folder: Path, origin: str, environment: Mapping[str, str], root: Path) -> Weights:
    """A folder that the user names, of a model or of an adapter."""
    return _with_base(Weights(folder, origin), environment, root)


def _named(given: Path | None, environment: Mapping[str, str], root: Path) -> Weights:
    if given is not None:
        return Weights(_folder(given, root), f"the weights given to setup ({given})")
    if named := environment.get(VARIABLE):
        return Weights(_folder(Path(named), root), f"{VARIABLE}={named}")
    if _holds_weights(root / TRAINED):
        return Weights(root / TRAINED, f"{TRAINED}/")
    raise UserError(
        "There are no weights to serve.",
        f"Do one of these: train a model into {TRAINED}/; set {VARIABLE} to a model folder, for "
        f"example {VARIABLE}=demo/alpaca_out, a small one that ./script/demo makes; or hand Cog "
        "trained weights (COG_WEIGHTS, a URL, folder or tar file).",
    )


def _with_base(found: Weights, environment: Mapping[str, str], root: Path) -> Weights:
    """If the folder holds an adapter: its base, with it as the default adapter."""
    if not stored.is_adapter(found.folder):
        if unused := environment.get(BASE):
            print(f"note: {BASE}={unused} is not used: {found.folder} is no adapter", flush=True)
        return found
    name = found.folder.name
    if given := environment.get(BASE):
        base = _folder(Path(given), root)
    else:
        remedy = f"Set {BASE} to the model's folder that it was trained on (serve: --base FOLDER)."
        base = passport.find_base(found.folder, remedy, root).resolve()
    return Weights(base, f"the base of the adapter {found.origin}", {name: found.folder}, name)


def _listed(text: str) -> list[tuple[str, Path]]:
    """The names and paths in `name=FOLDER,name2=FOLDER2`."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, path = part.partition("=")
        if not (equals and name.strip() and path.strip()):
            raise UserError(f"{ADAPTERS} holds {part!r}.", "Write it as NAME=FOLDER,NAME2=FOLDER2.")
        found.append((name.strip(), Path(path.strip())))
    return found


def _holds_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() or stored.is_adapter(folder)


def _folder(path: Path, root: Path) -> Path:
    path = root / path
    if path.is_dir():
        return _inner(path)
    if not path.is_file():
        raise UserError(
            f"The weights {path} do not exist.",
            "Name the folder of a model (config.json and *.safetensors) or an adapter, or a tar "
            "file of one.",
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
    """The folder itself or, for `tar -cf x.tar folder/`, the only model or adapter in it."""
    inner = [path for path in folder.iterdir() if _holds_weights(path)]
    return inner[0] if not _holds_weights(folder) and len(inner) == 1 else folder
