"""A file or folder is complete or absent: write beside it, sync, rename.

Everything in this project that leaves something on disk goes through here. A folder is
written as `.NAME.partial` next to its final place; a crash leaves only that, and the next run
clears it or, where the writer knows how, goes on with it.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_path(final: Path) -> Path:
    """Where `final` is written before it is complete."""
    return final.with_name(f".{final.name}.partial")


@contextmanager
def folder(final: Path, *, keep_partial: bool = False) -> Iterator[Path]:
    """Give a folder to write into; on a clean exit it takes the place of `final`.

    What stood at `final` stays until the new folder is synced, and is then replaced.
    `keep_partial` hands over what an earlier, interrupted writer left instead of clearing it.
    """
    partial = partial_path(final)
    if partial.exists() and not keep_partial:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    yield partial
    sync_tree(partial)
    replace_folder(partial, final)


def replace_folder(new: Path, final: Path) -> None:
    """Rename `new` to `final`; a folder already there is moved aside first and then deleted.

    Between the two renames `final` is absent, never half there; `recover` mends that gap.
    """
    aside = final.with_name(f".{final.name}.old")
    if final.exists():
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(final, aside)
    os.rename(new, final)
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover(final: Path) -> None:
    """Put back a folder that a crash between the two renames of `replace_folder` left aside."""
    aside = final.with_name(f".{final.name}.old")
    if aside.exists() and not final.exists():
        os.rename(aside, final)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file, or nothing: a reader sees the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 text file, or nothing."""
    write_bytes(path, text.encode())


def sync(path: Path) -> None:
    """Flush one file or folder entry to the disk."""
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
