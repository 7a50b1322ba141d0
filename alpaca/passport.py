"""What a model folder is made of, and the refusal when it does not match.

`passport.json` lies in every folder this project writes: how it was made, from what, with which
templates, and the SHA-256 of every file in it; a seal over the passport itself. Serving and
resuming read it before they trust a folder; a folder without one (made elsewhere) loads with a
notice. `python -m alpaca verify` checks all of it.
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
PIECE = 1 << 18  # bytes read at once: they are hashed while they lie in a core's cache
SMALL = 64 << 20  # files up to this size are hashed before they are served


def write(folder: Path, made_by: str, **facts: Any) -> dict[str, Any]:
    """Hash every file of `folder`, write its passport, and return it.

    `facts` are the maker's own: source files, recipe, counts. They must be JSON values; NaN and
    infinity, which JSON does not have, become null.
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
    """A JSON value with null for NaN and infinity."""
    if isinstance(value, dict):
        return {name: json_numbers(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_numbers(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_beside(folder: Path, names: list[str]) -> None:
    """Put the hashes of files that came after the model (log, drawing) into its passport.

    They may be absent later, a copy of the folder need not hold them; a changed one is found.
    """
    passport = read(folder)
    assert passport is not None
    there = [name for name in names if (folder / name).is_file()]
    hashes = hash_files([folder / name for name in there])
    passport["beside"] = dict(zip(there, hashes, strict=True))
    passport[SEAL] = seal(passport)
    atomic.write_text(folder / NAME, render(passport))


def forget_beside(folder: Path) -> None:
    """Take those files out of the passport, because they are about to change."""
    passport = read(folder)
    if passport is not None and passport.pop("beside", None):
        passport[SEAL] = seal(passport)
        atomic.write_text(folder / NAME, render(passport))


def render(passport: dict[str, Any]) -> str:
    """The text of a passport, byte for byte."""
    return json.dumps(passport, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def seal(passport: dict[str, Any]) -> str:
    """SHA-256 over everything in a passport but its seal."""
    rest = {name: value for name, value in passport.items() if name != SEAL}
    return text_sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False))


def read(folder: Path) -> dict[str, Any] | None:
    """The passport of a model folder, or None where it has none.

    Raises:
        UserError: there is one, and it cannot be understood.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        passport: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if passport["format"] > FORMAT:
            raise UserError(
                f"{path} has format {passport['format']}; this program knows {FORMAT}.",
                "Use the version of the program that wrote it, or a newer one.",
            )
        _check(passport)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        told = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is damaged: {told}", "Write the folder again.") from None
    return passport


def _check(passport: dict[str, Any]) -> None:
    """Raise KeyError or ValueError where a part is missing, or names a file outside the folder."""
    for name in ("made_by", "template_sha256", SEAL):
        if not isinstance(passport[name], str):
            raise ValueError(f"{name} is no text")
    for name, value in [*passport["files"].items(), *passport.get("beside", {}).items()]:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not isinstance(value, str):
            raise ValueError(f"{name!r} is no file of a model folder")


def check_template(folder: Path, passport: dict[str, Any] | None) -> None:
    """Refuse a folder that was trained on other templates than this program renders."""
    if passport is not None and passport["template_sha256"] != template_hash():
        raise UserError(
            f"{folder} was made with other prompt templates than this program's.",
            "Serve it with the version that trained it, or train it again.",
        )


def check_loaded(folder: Path) -> dict[str, Any] | None:
    """What concerns a program that loads the folder: its files are there and as written.

    Weights are not hashed, that takes as long as reading them: `alpaca verify` does it. Returns
    the passport; a folder without one is let through with a notice.

    Raises:
        UserError: a missing file, or a changed one of those that are small.
    """
    passport = read(folder)
    if passport is None:
        print(f"note: {folder} has no passport: how it was made is not known", flush=True)
        return None
    for name, wanted in passport["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing.", "Copy or write the folder again.")
        if path.stat().st_size <= SMALL and sha256(path) != wanted:
            raise UserError(
                f"{path} was changed after it was written.",
                f"See what else was: python -m alpaca verify {folder}",
            )
    return passport


def sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """SHA-256 of one file, in hex; `progress` is told of every piece of bytes.

    The kernel reads ahead, so disk and hash work at the same time.
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
    """SHA-256 of many files at once; hashing releases the interpreter lock."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda path: sha256(path, progress), paths))


def versions() -> dict[str, str]:
    """Versions of what shapes a model folder's content."""
    found = {"alpaca-cog": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def fingerprint(folder: Path) -> str:
    """One hash for a model folder's weights: from its passport, else from sizes and headers.

    Hashing 13 GB at every start would cost a minute, so a folder without a passport is known by
    its config and the first 64 KiB and the size of each weight file.
    """
    found = read(folder)
    if found is not None:
        parts: Any = sorted(found["files"].items())
    else:
        parts = []
        for path in [folder / "config.json", *stored.weight_files(folder)]:
            with open(path, "rb") as file:
                head = hashlib.sha256(file.read(65536)).hexdigest()
            parts.append([path.name, path.stat().st_size, head])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
