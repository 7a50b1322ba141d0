"""Record what a model folder was made from, and refuse a folder that does not match its record.

This project writes a `passport.json` into every model folder: how and from what it was made, the
hash of the templates, the SHA-256 of every file, and a seal (a hash of the passport itself).
Serving and resuming check it before they use a folder. A folder without a passport, made by another
program, loads with a notice. `python -m alpaca verify` checks everything.
"""

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from alpaca import __version__, atomic, stored
from alpaca.errors import UserError
from alpaca.prompt import template_hash

NAME = "passport.json"
FORMAT = 1
SEAL = "seal"
EXTRAS = ("beside", "accepted")
PIECE = 1 << 18  # bytes read at a time: small enough to be hashed from a core's cache
SAMPLED = 4096  # bytes of a tensor, at three places
SMALL = 64 << 20  # files up to this size are hashed before the model is loaded


def write(folder: Path, made_by: str, **facts: Any) -> dict[str, Any]:
    """Hash every file of `folder`, write its passport, and return it.

    `facts` come from the program that made the folder: source files, recipe, counts. They must be
    JSON values; NaN and infinity, which JSON does not have, become null.
    """
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != NAME
    )
    passport = {
        "format": FORMAT,
        "made_by": made_by,
        **json_numbers(facts),
        "template_sha256": template_hash(),
        "versions": versions(),
        "files": dict(zip(names, hash_files([folder / name for name in names]), strict=True)),
    }
    passport[SEAL] = seal(passport)
    atomic.write_text(folder / NAME, render(passport))
    return passport


def json_numbers(value: Any) -> Any:
    """Replace NaN and infinity in a JSON value by null."""
    if isinstance(value, dict):
        return {name: json_numbers(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_numbers(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_extras(folder: Path, names: list[str], kind: str = "beside") -> None:
    """Add the hashes of files that came after the model to its passport.

    They are of one of the `EXTRAS`: `beside` are log and plots, `accepted` the owner's files. They
    are optional: a copy of the folder may lack them, but a changed one is detected.
    """
    passport = read(folder)
    assert passport is not None
    present = [name for name in names if (folder / name).is_file()]
    hashes = hash_files([folder / name for name in present])
    added = dict(zip(present, hashes, strict=True))
    passport[kind] = {**passport.get(kind, {}), **added}
    passport[SEAL] = seal(passport)
    atomic.write_text(folder / NAME, render(passport))


def forget_extras(folder: Path) -> None:
    """Remove log and plots from the passport, because they are about to change."""
    passport = read(folder)
    if passport is not None and passport.pop("beside", None):
        passport[SEAL] = seal(passport)
        atomic.write_text(folder / NAME, render(passport))


def render(passport: dict[str, Any]) -> str:
    """The exact text of a passport file."""
    return json.dumps(passport, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def seal(passport: dict[str, Any]) -> str:
    """SHA-256 of everything in a passport except its seal."""
    rest = {name: value for name, value in passport.items() if name != SEAL}
    return text_sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False))


def read(folder: Path) -> dict[str, Any] | None:
    """The passport of a model folder, or None if it has none.

    Raises:
        UserError: the passport is damaged or has a newer format.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        passport: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if passport["format"] > FORMAT:
            raise UserError(
                f"{path} has format {passport['format']}; this program reads up to {FORMAT}.",
                "Use the version of the program that wrote it, or a newer one.",
            )
        _check(passport)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is damaged: {reason}", "Write the folder again.") from None
    return passport


def _check(passport: dict[str, Any]) -> None:
    """Raise KeyError or ValueError if a part is missing or names a file outside the folder."""
    for name in ("made_by", "template_sha256", SEAL):
        if not isinstance(passport[name], str):
            raise ValueError(f"{name} is not text")
    extras = [entry for kind in EXTRAS for entry in passport.get(kind, {}).items()]
    for name, value in [*passport["files"].items(), *extras]:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not isinstance(value, str):
            raise ValueError(f"{name!r} is not a file of a model folder")


def check_template(folder: Path, passport: dict[str, Any] | None) -> None:
    """Refuse a folder that was trained with other templates than this program's."""
    if passport is not None and passport["template_sha256"] != template_hash():
        raise UserError(
            f"{folder} was made with prompt templates that differ from this program's.",
            "Serve it with the version that trained it, or train it again.",
        )


def check_loaded(folder: Path) -> dict[str, Any] | None:
    """Check, before a folder is loaded, that its files exist and small ones are unchanged.

    Large weight files are not hashed, because that takes as long as reading them; `alpaca verify`
    does it. Returns the passport, or None after a notice if present is none.

    Raises:
        UserError: a file is missing, or a file of up to `SMALL` bytes was changed.
    """
    passport = read(folder)
    if passport is None:
        print(f"note: {folder} has no passport, so how it was made is unknown", flush=True)
        return None
    for name, wanted in passport["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing.", "Copy or write the folder again.")
        if path.stat().st_size <= SMALL and sha256(path) != wanted:
            raise UserError(
                f"{path} was changed after it was written.",
                f"See what else changed: python -m alpaca verify {folder}",
            )
    return passport


def sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """SHA-256 of one file, in hex; `progress` is called with the size of each piece read.

    The kernel reads ahead, so reading and hashing overlap.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(PIECE))
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


def text_sha256(text: str) -> str:
    """SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_files(paths: list[Path], progress: Callable[[int], object] | None = None) -> list[str]:
    """SHA-256 of many files, in parallel threads; hashing releases the interpreter lock."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda path: sha256(path, progress), paths))


def versions() -> dict[str, str]:
    """Versions of the programs that affect the content of a model folder."""
    found = {"alpaca-cog": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def fingerprint(folder: Path) -> str:
    """One hash that identifies a model folder's weights.

    It is computed from the passport's hashes. Without a passport, it is computed from config.json,
    the size and header of each weight file, and 4 KiB at the beginning, the middle and the end of
    each tensor, because hashing 13 GB would take a minute at every start.
    """
    found = read(folder)
    if found is not None:
        parts: Any = sorted(found["files"].items())
    else:
        parts = [_sampled(path) for path in [folder / "config.json", *stored.weight_files(folder)]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _sampled(path: Path) -> list[Any]:
    """Name, size and a hash of parts of a file; of one that is not safetensors, its beginning."""
    digest = hashlib.sha256()
    tensors = stored.header(path).values() if path.suffix == ".safetensors" else ()
    with open(path, "rb") as file:
        digest.update(file.read(65536))
        for one in sorted(tensors, key=lambda entry: entry.start):
            for start in (0, one.size // 2, max(0, one.size - SAMPLED)):
                file.seek(one.start + start)
                digest.update(file.read(min(SAMPLED, one.size - start)))
    return [path.name, path.stat().st_size, digest.hexdigest()]


def find_base(
    adapter: Path, remedy: str = "Give its folder: --base FOLDER.", root: Path = Path()
) -> Path:
    """The folder of an adapter's base model, where its settings or its passport mean it.

    What they name is looked for as it is, next to the adapter's folder, and in `root` and its
    `weights/`.

    Raises:
        UserError: there is no such folder; `remedy` says how to name it.
    """
    named = stored.read_json(adapter / stored.ADAPTER).get("base_model_name_or_path")
    recorded = (read(adapter) or {}).get("base", {}).get("folder")
    names = [str(name) for name in (named, recorded) if name]
    beside = adapter.resolve().parent
    for name in names:
        last = Path(name).name
        weights = root / "weights"
        for folder in (
            Path(name), beside / name, beside / last, root / name, weights / last,
            weights / last.lower(),
        ):  # fmt: skip
            if (folder / "config.json").is_file():
                return folder
    raise UserError(
        f"{adapter} holds an adapter ({stored.ADAPTER}), and its base was not found"
        + (f" ({names[0]})." if names else ": it does not name one."),
        remedy,
    )
