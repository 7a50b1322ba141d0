"""What a model folder is made of, and the refusal when it does not match.

`passport.json` lies in every folder this project writes: how it was made, from what, with which
templates, and the SHA-256 of every file in it. Serving and resuming read it before they trust a
folder; a folder without one (made elsewhere) loads with a notice.
"""

import hashlib
import json
import platform
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from alpaca import __version__, atomic
from alpaca.errors import UserError
from alpaca.prompt import template_hash

NAME = "passport.json"
FORMAT = 1


def write(folder: Path, made_by: str, **facts: Any) -> dict[str, Any]:
    """Hash every file of `folder`, write its passport, and return it.

    `facts` are the maker's own: source files, recipe, counts. They must be JSON values.
    """
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != NAME
    )
    passport = {
        "format": FORMAT,
        "made_by": made_by,
        **facts,
        "template_sha256": template_hash(),
        "versions": versions(),
        "files": dict(zip(names, hash_files([folder / name for name in names]), strict=True)),
    }
    atomic.write_text(folder / NAME, json.dumps(passport, indent=1, ensure_ascii=False) + "\n")
    return passport


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
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}", "Write the folder again.") from None
    return passport


def check_template(folder: Path, passport: dict[str, Any] | None) -> None:
    """Refuse a folder that was trained on other templates than this program renders."""
    if passport is not None and passport["template_sha256"] != template_hash():
        raise UserError(
            f"{folder} was made with other prompt templates than this program's.",
            "Serve it with the version that trained it, or train it again.",
        )


def sha256(path: Path) -> str:
    """SHA-256 of one file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: list[Path]) -> list[str]:
    """SHA-256 of many files at once; hashing releases the interpreter lock."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(sha256, paths))


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
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
            with open(path, "rb") as file:
                head = hashlib.sha256(file.read(65536)).hexdigest()
            parts.append([path.name, path.stat().st_size, head])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
