"""The difference of a tuned model folder from its base; with the base it is the folder again.

A diff is a zip file of parts, compressed with zstandard. A tensor that the base holds with the same
name and type is stored as the exclusive or of both; the bytes of a number's equal places lie
together, so that the places that training does not change compress to nothing. All else is stored
as it is. A diff is no model: no program loads it.

    diff.json        what it is of: SHA-256 of each tensor, in the base and in the tuned folder
    header/FILE      the header of a weight file, as it is
    tensor/NAME      pieces: 4 bytes of length, one zstandard frame
    file/NAME        any other file of the tuned folder

The last 64 bytes, the zip's comment, are the SHA-256 of all before them.
"""

import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import zstandard
from tqdm import tqdm

from alpaca import atomic, passport, stored
from alpaca.errors import UserError
from alpaca.folder import explained_disk_errors
from alpaca.layout import ITEM_BYTES
from alpaca.release.streams import Digest, Later, ahead, in_order
from alpaca.stored import Entry

FORMAT = 1
INDEX = "diff.json"
PIECE = 1 << 20  # bytes of a tensor that are compressed at a time
MOST_PIECE = 64 << 20
LEVEL = 1  # of zstandard; on the low bits of weights, 3 takes twice as long and writes 10% more
DIGEST = 64  # characters of a SHA-256
# by the bytes of a number
NUMBERS: dict[int, Any] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}
DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
    OSError,
)  # what zipfile, and an index that is not one, raise
LARGEST_FILE = stored.LONGEST_HEADER  # bytes of a header or another file
AGAIN = "Free some space and run the same command again."


@dataclass(frozen=True)
class Part:
    """A tensor in a diff.

    base: SHA-256 of the base's bytes that it is the difference from, None if it is stored whole;
    common: how many bytes of both it is the difference of; the rest, new rows, is stored whole.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    sha256: str
    base: str | None
    common: int


@dataclass(frozen=True)
class Made:
    """A finished diff: its size, and the bytes of the tensors it is of."""

    path: Path
    size: int
    whole: int


def make(tuned: Path, base: Path, path: Path) -> Made:
    """Write the diff of a tuned folder from its base; the file is complete or absent.

    Raises:
        UserError: a folder is no model, or nothing of the base is in the tuned model.
    """
    ours, theirs = stored.tensors(tuned), stored.tensors(base)
    pairs = {name: theirs.get(name) for name in ours}
    if not any(_common(ours[name], other) for name, other in pairs.items()):
        raise UserError(
            f"No tensor of {tuned} has the name, type and width of one in {base}.",
            "Name the folder that it was trained from, in the type that was trained.",
        )
    partial = atomic.partial_path(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with explained_disk_errors(path.parent, AGAIN):
            with _Hashed(partial) as file, _zip(file) as bundle:
                bundle.comment = b"0" * DIGEST
                _put_files(bundle, tuned, ours)
                parts = list(_put_tensors(bundle, ours, theirs))
                index = {
                    "format": FORMAT,
                    "made_by": passport.versions(),
                    "base": base.resolve().name,
                    "piece": PIECE,
                    "tensors": [asdict(part) for part in parts],
                }
                _put(bundle, INDEX, json.dumps(index, indent=1).encode())
            _seal(partial, file.digest())
            os.replace(partial, path)
            atomic.sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    return Made(path, path.stat().st_size, sum(part.size for part in parts))


def apply(base: Path, path: Path, tuned: Path) -> dict[str, Any]:
    """Write the tuned folder, bit for bit, from its base and the diff; returns the diff's index.

    The diff and the base's tensors are hashed before anything is written.

    Raises:
        UserError: the diff is damaged, or the base is not the one that it was made from; the
            message names the part or the tensors.
    """
    with _opened(path) as (bundle, index):
        parts = {part.name: part for part in _parts(index)}
        held = stored.entries(base)
        _check_base(base, held, list(parts.values()), path)
        with explained_disk_errors(tuned, AGAIN), atomic.folder(tuned) as partial:
            _write_weights(bundle, index["piece"], parts, held, partial)
            for name in _below(bundle, "file/"):
                atomic.write_bytes(partial / name, _get(bundle, f"file/{name}"))
            wrong = _differing(list(parts.values()), partial)
            if wrong:
                raise UserError(
                    f"{partial} reads back differently from the tuned folder: {_some(wrong)}.",
                    "The disk or memory is failing; write to another disk.",
                )
    return index


def _common(ours: Entry, theirs: Entry | None) -> int:
    """Bytes of a tensor that can be compared with the base's: rows of the same type and width."""
    if theirs is None or ours.dtype != theirs.dtype or ours.shape[1:] != theirs.shape[1:]:
        return 0
    return min(ours.size, theirs.size)


def _put_files(bundle: zipfile.ZipFile, tuned: Path, ours: dict[str, Entry]) -> None:
    """The headers of the weight files, and every other file of the folder but checkpoints."""
    weights = {entry.path.name for entry in ours.values()}
    for name in sorted(weights):
        entries = [entry for entry in ours.values() if entry.path.name == name]
        start, end = min(e.start for e in entries), max(e.start + e.size for e in entries)
        if end != (tuned / name).stat().st_size or sum(e.size for e in entries) != end - start:
            raise UserError(f"{tuned / name} holds bytes that belong to no tensor.")
        with open(tuned / name, "rb") as file:
            _put(bundle, f"header/{name}", file.read(start))
    for path in sorted(tuned.iterdir()):
        if not path.is_file() or path.name in weights or path.name.startswith("."):
            continue
        if path.stat().st_size > passport.SMALL:
            print(f"note: {path.name} is no part of the model and is left out")
        else:
            _put(bundle, f"file/{path.name}", path.read_bytes())


def _put_tensors(
    bundle: zipfile.ZipFile, ours: dict[str, Entry], theirs: dict[str, Entry]
) -> Iterator[Part]:
    total = sum(entry.size for entry in ours.values())
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="diff", disable=None) as bar,
    ):
        for name, entry in ours.items():
            with bundle.open(_member(f"tensor/{name}"), "w", force_zip64=True) as out:
                yield _put_tensor(pool, out, name, entry, theirs.get(name))
            bar.update(entry.size)


def _put_tensor(
    pool: ThreadPoolExecutor, out: IO[bytes], name: str, entry: Entry, other: Entry | None
) -> Part:
    common, width = _common(entry, other), _width(entry.dtype)
    own, of_base = Digest(), Digest()

    def pieces() -> Iterator[tuple[bytes, bytes, int]]:
        theirs = _bytes(other, common) if other is not None else iter(())
        for piece in _bytes(entry, entry.size):
            base = next(theirs, b"")
            own.update(piece)
            of_base.update(base)
            yield piece, base, width

    with Later(out.write) as write:
        for frame in in_order(pool, _compress, ahead(pieces())):
            write(struct.pack("<I", len(frame)) + frame)
    base = of_base.hexdigest() if common else None
    return Part(name, entry.dtype, entry.shape, entry.size, own.hexdigest(), base, common)


def _width(dtype: str) -> int:
    """Bytes of a number; 1 for the types that weights do not have, of which buffers may be."""
    return ITEM_BYTES.get(dtype, 1)


def _bytes(entry: Entry, size: int, most: int = PIECE) -> Iterator[bytes]:
    """The first `size` bytes of a tensor, at most `most` at a time."""
    with open(entry.path, "rb") as file:
        file.seek(entry.start)
        for start in range(0, size, most):
            wanted = min(most, size - start)
            piece = file.read(wanted)
            if len(piece) != wanted:
                raise UserError(f"{entry.path} is cut short.", "Fetch or train it again.")
            yield piece


def _compress(job: tuple[bytes, bytes, int]) -> bytes:
    """A piece, its base and the width of a number, as a zstandard frame.

    It holds the exclusive or: the first byte of every number, then the second, and so on.
    """
    piece, base, width = job
    numbers = _exclusive_or(piece, base).view(NUMBERS[width])
    planes = [(numbers >> 8 * place).astype(np.uint8) for place in range(width)]
    frame: bytes = zstandard.ZstdCompressor(level=LEVEL).compress(np.concatenate(planes).tobytes())
    return frame


def _expand(job: tuple[bytes, bytes, int, int]) -> bytes:
    """Undo `_compress`; raises ValueError unless the frame holds as many bytes as the last says."""
    frame, base, width, size = job
    planes = _decompress(frame, size)
    if len(planes) != size:
        raise ValueError(f"{len(planes)} bytes instead of {size}")
    parts = np.frombuffer(planes, dtype=np.uint8).reshape(width, -1)
    numbers = np.zeros(size // width, dtype=NUMBERS[width])
    for part in parts[::-1]:
        numbers <<= 8
        numbers |= part
    return _exclusive_or(numbers.data, base).tobytes()


def _exclusive_or(piece: Any, base: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """`piece` changed by `base`, which may be shorter."""
    mixed = np.array(np.frombuffer(piece, dtype=np.uint8))
    mixed[: len(base)] ^= np.frombuffer(base, dtype=np.uint8)
    return mixed


def _zip(file: Any) -> zipfile.ZipFile:
    return zipfile.ZipFile(file, "w", allowZip64=True)


def _member(name: str) -> zipfile.ZipInfo:
    """A part without the time, so that the same folders give the same diff."""
    return zipfile.ZipInfo(name)


def _put(bundle: zipfile.ZipFile, name: str, content: bytes) -> None:
    bundle.writestr(_member(name), zstandard.ZstdCompressor(level=LEVEL).compress(content))


def _get(bundle: zipfile.ZipFile, name: str) -> bytes:
    if bundle.getinfo(name).file_size > LARGEST_FILE:
        raise ValueError(f"{name} has {bundle.getinfo(name).file_size} bytes")
    return _decompress(bundle.read(name), LARGEST_FILE)


def _decompress(frame: bytes, most: int) -> bytes:
    """The content of a zstandard frame; raises ValueError if it is damaged, or above `most`."""
    try:
        if not 0 <= (size := zstandard.frame_content_size(frame)) <= most:
            raise ValueError(f"a frame of {size} bytes")
        content: bytes = zstandard.ZstdDecompressor().decompress(frame)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    return content


def _below(bundle: zipfile.ZipFile, prefix: str) -> list[str]:
    """Names of the parts below a prefix; each must be a plain file name."""
    names = [name.removeprefix(prefix) for name in bundle.namelist() if name.startswith(prefix)]
    for name in names:
        if Path(name).name != name or name in ("", ".."):
            raise UserError(f"The diff holds {name!r}, which is not a file of a model folder.")
    return names


class _Hashed:
    """A file to write a zip into, which hashes all but its last `DIGEST` bytes."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._digest, self._held = Digest(), b""

    def write(self, content: bytes) -> int:
        """Write, and hash what is no longer among the last bytes."""
        known = self._held + content
        self._digest.update(known[:-DIGEST])
        self._held = known[-DIGEST:]
        return self._file.write(content)

    def digest(self) -> str:
        """SHA-256 of all but the last bytes."""
        return self._digest.hexdigest()

    def flush(self) -> None:
        """As of a file; without `seek`, the zip is written in one go."""
        self._file.flush()

    def __enter__(self) -> "_Hashed":
        """Close the file at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self._file.close()


def _seal(path: Path, digest: str) -> None:
    """Write the digest over the zip's comment, and check that the disk holds what was written."""
    with open(path, "r+b") as file:
        file.seek(-DIGEST, os.SEEK_END)
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not _sealed(path):
        raise UserError(
            f"{path} reads back differently from what was written.",
            "The disk is failing; write to another one.",
        )


def _sealed(path: Path) -> bool:
    digest, left = hashlib.sha256(), path.stat().st_size - DIGEST
    with open(path, "rb") as file:
        while left > 0 and (piece := file.read(min(PIECE, left))):
            digest.update(piece)
            left -= len(piece)
        return file.read().decode(errors="replace") == digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, Any]]]:
    """An intact diff and its index; raises UserError where it is damaged, and names the part."""
    if not path.is_file():
        raise UserError(f"There is no diff {path}.", "Give the file that `diff make` wrote.")
    intact = _sealed(path)
    try:
        with zipfile.ZipFile(path) as bundle:
            if not intact:
                raise _damaged(path, bundle.testzip() or "its directory")
            if any(part.compress_type != zipfile.ZIP_STORED for part in bundle.infolist()):
                raise _damaged(path, "its parts are compressed twice")
            index: dict[str, Any] = json.loads(_get(bundle, INDEX))
            if index["format"] > FORMAT:
                raise UserError(
                    f"{path} has format {index['format']}; this program reads up to {FORMAT}.",
                    "Use the version of the program that wrote it, or a newer one.",
                )
            if not 0 < index["piece"] <= MOST_PIECE:
                raise _damaged(path, f"pieces of {index['piece']} bytes")
            yield bundle, index
    except DAMAGED as error:
        if intact and isinstance(error, OSError):
            raise
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged or is no diff ({what}).", "Fetch it again.")


def _parts(index: dict[str, Any]) -> list[Part]:
    return [Part(**{**part, "shape": tuple(part["shape"])}) for part in index["tensors"]]


def _check_base(base: Path, held: dict[str, Entry], parts: list[Part], path: Path) -> None:
    """Raise UserError unless the base holds every tensor that the diff was made from."""
    needed = [part for part in parts if part.base]

    def differs(part: Part) -> bool:
        entry = held.get(part.name)
        if entry is None or entry.dtype != part.dtype or entry.size < part.common:
            return True
        return _sha256(entry, part.common) != part.base

    wrong = _found(needed, differs, "checking the base")
    if wrong:
        raise UserError(
            f"{base} is not the base that {path.name} was made from: {len(wrong)} of "
            f"{len(needed)} tensors differ: {_some(wrong)}",
            "Give the folder that was trained, in the same type; nothing was written.",
        )


def _differing(parts: list[Part], folder: Path) -> list[str]:
    """Names of the tensors that a written folder does not hold as they were."""
    held = stored.entries(folder)

    def differs(part: Part) -> bool:
        return _sha256(held[part.name], part.size) != part.sha256

    return _found(parts, differs, "reading back")


def _found(parts: list[Part], differs: Callable[[Part], bool], what: str) -> list[str]:
    """Names of the parts that differ; the largest are looked at first, in all threads."""
    ordered = sorted(parts, key=lambda part: -part.size)
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(ordered), desc=what, disable=None) as bar,
    ):
        wrong = []
        for part, bad in zip(ordered, pool.map(differs, ordered), strict=True):
            bar.update()
            if bad:
                wrong.append(part.name)
    return sorted(wrong)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


def _sha256(entry: Entry, size: int) -> str:
    digest = hashlib.sha256()
    for piece in _bytes(entry, size):
        digest.update(piece)
    return digest.hexdigest()


def _write_weights(
    bundle: zipfile.ZipFile,
    most: int,
    parts: dict[str, Part],
    held: dict[str, Entry],
    folder: Path,
) -> None:
    """Write the weight files to the disk, and drop them from the page cache."""
    total = sum(part.size for part in parts.values())
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="applying", disable=None) as bar,
    ):
        for name in _below(bundle, "header/"):
            header = _get(bundle, f"header/{name}")
            with open(folder / name, "wb") as file, Later(file.write) as write:
                write(header)
                for tensor in _order(header):
                    for piece in _rebuilt(pool, bundle, most, parts[tensor], held.get(tensor)):
                        write(piece)
                        bar.update(len(piece))
                write.wait()
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _order(header: bytes) -> list[str]:
    """Names of a weight file's tensors in the order of their bytes."""
    table = json.loads(header[8:])
    names = [name for name in table if name != "__metadata__"]
    return sorted(names, key=lambda name: table[name]["data_offsets"])


def _rebuilt(
    pool: ThreadPoolExecutor, bundle: zipfile.ZipFile, most: int, part: Part, base: Entry | None
) -> Iterator[bytes]:
    """The pieces of a tuned tensor, `most` bytes each."""
    width = _width(part.dtype)

    def pieces() -> Iterator[tuple[bytes, bytes, int, int]]:
        theirs = _bytes(base, part.common, most) if base is not None else iter(())
        with bundle.open(f"tensor/{part.name}") as file:
            for start in range(0, part.size, most):
                (length,) = struct.unpack("<I", file.read(4))
                if length > 2 * most + 1024:
                    raise ValueError(f"a piece of {length} bytes")
                yield file.read(length), next(theirs, b""), width, min(most, part.size - start)

    return in_order(pool, _expand, ahead(pieces()))
