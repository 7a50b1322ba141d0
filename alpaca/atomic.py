"""Atomic writes: write next to the final path, sync, rename. A result is complete or absent.

Everything that this project keeps on disk is written through this module. A folder is first written
as `.NAME.partial` next to its final path. An error deletes it, which would keep a full disk full; a
crash leaves it. The next run deletes it, or resumes from it if the writer supports that.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def partial_path(final: Path) -> Path:
    """Where `final` is written before it is complete."""
    return final.with_name(f".{final.name}.partial")


@contextmanager
def folder(final: Path, *, keep_partial: bool = False) -> Iterator[Path]:
    """Give a folder to write into; on a clean exit it replaces `final`.

    An existing folder at `final` is kept until the new one is synced. With `keep_partial`, the
    partial folder of an earlier, interrupted writer is reused, and that of a failed one is kept.
    """
    partial = partial_path(final)
    if not keep_partial or partial.is_symlink():
        remove(partial)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        sync_tree(partial)
    except BaseException:
        if not keep_partial:
            remove(partial)
        raise
    replace_folder(partial, final)


def replace_folder(new: Path, final: Path) -> None:
    """Rename `new` to `final`; an existing `final` is renamed first and deleted afterwards.

    Between the two renames `final` is absent, never incomplete. If a crash happens there, `recover`
    restores the old folder.
    """
    old = final.with_name(f".{final.name}.old")
    if os.path.lexists(final):
        remove(old)
        os.rename(final, old)
    os.rename(new, final)
    sync(final.parent)
    with suppress(OSError):
        remove(old)


def recover(final: Path) -> None:
    """Restore the old folder after a crash between the two renames of `replace_folder`."""
    old = final.with_name(f".{final.name}.old")
    if old.exists() and not final.exists():
        os.rename(old, final)


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one; of a link only the link, never what it names."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, busy: Exception) -> Iterator[bool]:
    """Hold the lock file `path`, which exists only meanwhile; raises `busy` if a process holds it.

    The system releases the lock when its process ends, however it ends, so there are no stale ones.
    Yields False where the file system has no locks, as some shared disks: then nothing is locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        held = flock(descriptor, busy)
        while held and not _is_file(descriptor, path):  # its holder removed it meanwhile
            removed, descriptor = descriptor, os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            os.close(removed)
            held = flock(descriptor, busy)
        try:
            yield held
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def flock(descriptor: int, busy: Exception) -> bool:
    """Lock an open file until it is closed; raises `busy` if another process has locked it.

    Returns False where the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError:
        return False
    return True


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def sync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Flush a folder and everything below it."""
    for parent, _, names in os.walk(root):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def free_disk(folder: Path) -> int:
    """Bytes free on the disk that `folder` is or will be on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
