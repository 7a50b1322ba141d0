"""Unpacks a model from a tar file that someone else may have made.

The unpacked folder is complete or absent. Every file is hashed while it is written and compared
with the passport in the archive, and a compressed archive is read to its end, where its checksum
is. What no packed model does (links, devices, paths that lead outside, a thousandfold of its size)
is refused.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from alpaca import atomic, passport
from alpaca.errors import UserError

OPENERS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
PIECE = 1 << 20  # bytes
MOST_FILES = 10_000
# Weights do not compress to a tenth of their size; an archive that does would fill the disk.
MOST_GROWTH = 10
SMALL = 256 << 20  # bytes that any archive may unpack to
DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


class _Bounded(io.RawIOBase):
    """An archive's decompressed bytes, up to a number of them, whatever asks for more."""

    def __init__(self, stream: IO[bytes], tar: Path, most: int) -> None:
        super().__init__()
        self.stream, self.tar, self.left = stream, tar, most

    def read(self, size: int = -1) -> bytes:
        if size > self.left:
            raise _hostile(self.tar, f"it unpacks to more than {MOST_GROWTH} times its size")
        piece = self.stream.read(size)
        self.left -= len(piece)
        return piece

    def close(self) -> None:
        self.stream.close()
        super().close()


def unpack(tar: Path, target: Path) -> None:
    """Unpack `tar` to the folder `target`, replacing it.

    Raises:
        UserError: the archive is damaged, differs from its passport, or holds what no model does.
        OSError: the disk is full.
    """
    try:
        with atomic.folder(target) as partial:
            hashes = _extract(tar, partial)
            _compare(tar, partial, hashes)
        atomic.write_text(_record(target), json.dumps(_stats(target)))
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's; a damaged archive's has no number
        raise UserError(
            f"{tar} is not a whole tar file: {error}",
            "Pack the model folder again: tar -cf weights.tar -C FOLDER .",
        ) from None
    finally:
        atomic.remove(atomic.partial_path(target))


def unchanged(folder: Path) -> bool:
    """Whether an unpacked folder is as it was written.

    Files of the recorded sizes and times count as unchanged. Without a record, or with other times,
    as in a copy, the passport's hashes decide.
    """
    try:
        if json.loads(_record(folder).read_text()) == _stats(folder):
            return True
    except (OSError, ValueError, RecursionError):
        pass
    if not _matches_passport(folder):
        return False
    with suppress(OSError):  # a file system that can only be read
        atomic.write_text(_record(folder), json.dumps(_stats(folder)))
    return True


def _matches_passport(folder: Path) -> bool:
    found = [path.parent for path in folder.rglob(passport.NAME)]
    if len(found) != 1:
        return False
    try:
        recorded = passport.read(found[0])
        assert recorded is not None
        paths = [found[0] / name for name in recorded["files"]]
        return passport.hash_files(paths) == list(recorded["files"].values())
    except (OSError, UserError):
        return False


def _extract(tar: Path, folder: Path) -> dict[str, str]:
    """Write the archive's files below `folder`; returns the SHA-256 of each by its path."""
    most = max(SMALL, MOST_GROWTH * tar.stat().st_size)
    hashes: dict[str, str] = {}
    with _Bounded(_opened(tar), tar, most + SMALL) as stream:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for count, member in enumerate(_checked(tar, archive, folder)):
                if count > MOST_FILES:
                    raise _hostile(tar, f"it has more than {MOST_FILES:,} files")
                if member.size < 0 or (most := most - member.size) < 0:
                    raise _hostile(tar, f"it unpacks to more than {MOST_GROWTH} times its size")
                path = folder / member.name
                if member.isdir():
                    path.mkdir(parents=True, exist_ok=True)
                    continue
                source = archive.extractfile(member)
                assert source is not None
                hashes[path.relative_to(folder).as_posix()] = _write(source, path, member.size)
        while stream.read(PIECE):  # the checksum of a compressed archive is at its end
            pass
    return hashes


def _opened(tar: Path) -> IO[bytes]:
    with open(tar, "rb") as file:
        start = file.read(8)
    opener = next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), open)
    stream: IO[bytes] = opener(tar, "rb")
    return stream


def _checked(tar: Path, archive: tarfile.TarFile, folder: Path) -> Iterator[tarfile.TarInfo]:
    """The files and folders in an archive, with their filtered names."""
    for member in archive:
        try:
            filtered = tarfile.data_filter(member, str(folder))
        except tarfile.FilterError as error:
            raise _hostile(tar, str(error)) from None
        if not (filtered.isreg() or filtered.isdir()):
            raise _hostile(tar, f"{member.name!r} is a link")
        yield filtered


def _write(source: IO[bytes], path: Path, size: int) -> str:
    """Copy a file of `size` bytes; returns its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        while piece := source.read(PIECE):
            digest.update(piece)
            file.write(piece)
    if path.stat().st_size != size:
        raise EOFError(f"{path.name} is cut short")
    return digest.hexdigest()


def _compare(tar: Path, folder: Path, hashes: dict[str, str]) -> None:
    """Refuse files that differ from the passport next to them."""
    for name in hashes:
        if Path(name).name != passport.NAME:
            continue
        parent = (folder / name).parent
        recorded = passport.read(parent)
        assert recorded is not None
        for file, wanted in recorded["files"].items():
            found = hashes.get((Path(name).parent / file).as_posix())
            if found != wanted:
                raise UserError(
                    f"{tar}: {file} {'is missing' if found is None else 'differs'} "
                    f"from what the passport in the archive says.",
                    "Fetch the archive again, or pack the model folder again.",
                )


def _stats(folder: Path) -> dict[str, Any]:
    """Size and time of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _record(folder: Path) -> Path:
    """Where the sizes and times of an unpacked folder are kept."""
    return folder.with_name(f".{folder.name}.json")


def _hostile(tar: Path, reason: str) -> UserError:
    return UserError(
        f"{tar} is not an archive of a model: {reason}.", "Do not use it; ask where it came from."
    )
