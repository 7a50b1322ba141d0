"""Hash every source file and compare it with the publisher's MD5 checklist.

Hashing runs in a thread alongside the conversion, which reads the same pages from the page cache.
The output folder gets its final name only after every file has passed.
"""

import hashlib
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alpaca.convert.pickles import is_zip
from alpaca.errors import UserError

PIECE = 16 << 20
LINE = re.compile(r"([0-9a-fA-F]{32}) [ *](.+)")


class DamagedFileError(UserError):
    """A source file is not what its publisher released; anything converted from it is wrong."""


def read_checklist(path: Path) -> dict[str, str]:
    """File name -> MD5 from a `checklist.chk` (output of `md5sum`); empty if there is no file.

    Raises:
        UserError: a line is not an MD5 and a file name, or names a file outside the folder.
    """
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        match = LINE.fullmatch(line.rstrip())
        if match is None:
            raise UserError(
                f"{path}, line {number}: expected an MD5 and a file name, got {line[:80]!r}."
            )
        name = match[2].removeprefix("./")
        if "/" in name or name in ("", ".", ".."):
            raise UserError(f"{path}, line {number}: {name!r} is not a file in this folder.")
        found[name] = match[1].lower()
    return found


def stamp(files: list[Path]) -> list[list[Any]]:
    """Name, size and modification time of each file: equal stamps mean the same source."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def check_file(
    path: Path, md5: str | None, stopped: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Read a whole file and return its size and hash for the passport.

    Without a checklist, the CRC-32 that PyTorch stores for each tensor is checked instead. The
    check is cancelled when `stopped` returns true; it then returns an empty dictionary.

    Raises:
        DamagedFileError: the MD5 differs from the checklist's, or a CRC-32 does not match.
    """
    if md5 is None and is_zip(path):
        _check_crcs(path, stopped)
    algorithm = "sha256" if md5 is None else "md5"
    digest = hashlib.new(algorithm, usedforsecurity=False)
    buffer = memoryview(bytearray(PIECE))
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while not stopped() and (count := file.readinto(buffer)):
            digest.update(buffer[:count])
        size = file.tell()
    if stopped():
        return {}
    if md5 is not None and digest.hexdigest() != md5:
        raise DamagedFileError(
            f"{path} is damaged: its MD5 is {digest.hexdigest()}, the checklist says {md5}.",
            "Fetch the file again.",
        )
    return {"bytes": size, algorithm: digest.hexdigest()}


def _check_crcs(path: Path, stopped: Callable[[], bool]) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile(f"{entry.filename} is compressed")
                if entry.CRC != 0:  # 0: PyTorch did not compute it, or the entry is empty
                    with archive.open(entry) as member:
                        while not stopped() and member.read(PIECE):
                            pass
    except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}", "Fetch the file again.") from None
