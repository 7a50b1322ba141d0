"""From a source to a finished folder: complete and verified, or absent.

The folder grows as `.NAME.partial` with a journal of finished shards and their hashes. After a
kill, shards whose hash still holds are kept and the rest is written again. The final name appears
when the sources have passed their checks and every byte written has been read back.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from alpaca import atomic, passport
from alpaca.convert import shards
from alpaca.convert.checksums import check_file, stamp
from alpaca.convert.expected import check_fit
from alpaca.convert.shards import Shard
from alpaca.convert.source import DTYPES, SHORT_NAMES, Source
from alpaca.errors import UserError
from alpaca.model import free_disk
from alpaca.prompt import template_hash

JOURNAL = "journal.json"
MADE_BY = "convert"
SLACK = 64 << 20  # bytes beside the tensors: tokenizer, headers, the file system's own


def convert(source: Source, output: Path, dtype: torch.dtype, *, force: bool = False) -> Path:
    """Write `source` to `output`/NAME and its tokenizer to `output`/tokenizer.

    Returns the model folder. Does nothing when it is there already, made from the same files.

    Raises:
        UserError: a folder is in the way, the disk is full or too small, a source file is damaged.
    """
    final = output / source.name
    made_from = fingerprint(source, dtype)
    atomic.recover(final)
    if not force and final.exists():
        _check_same(final, made_from)
        print(f"{final} is complete already, made from the same files.")
    else:
        _write_folder(source, final, dtype, made_from)
    write_tokenizer(source, output / "tokenizer")
    return final


def fingerprint(source: Source, dtype: torch.dtype) -> str:
    """A hash of what shapes the output: the files read, the options, the layout, the templates."""
    parts = [
        stamp(list(source.files)),
        source.config,
        SHORT_NAMES[dtype],
        [(tensor.name, tensor.shape) for tensor in source.tensors],
        template_hash(),
        passport.versions(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check_same(final: Path, made_from: str) -> None:
    held = passport.read(final)
    if held is None or held.get("made_from") != made_from:
        raise UserError(
            f"{final} exists already, and was not made from these files with these options.",
            "Give --force to replace it, or another --output_dir.",
        )


def _write_folder(source: Source, final: Path, dtype: torch.dtype, made_from: str) -> None:
    check_fit(source)
    planned = shards.plan(source.tensors, dtype)
    with (
        _plain_disk_errors(final),
        atomic.folder(final, keep_partial=True) as partial,
        _lock(partial),
    ):
        journal = _Journal(partial, made_from)
        kept = journal.keep(planned)
        _check_disk(planned, kept, final)
        sources = _write_shards(source, planned, kept, journal)
        journal.remove()
        _write_texts(source, partial, planned, dtype)
        facts = {**source.facts, "dtype": SHORT_NAMES[dtype], "sources": sources}
        written = passport.write(partial, MADE_BY, made_from=made_from, **facts)
        _check_written(partial, planned, journal.hashes, written["files"])


class _Journal:
    """Which shards of a partial folder are finished, and the SHA-256 each must have."""

    def __init__(self, partial: Path, made_from: str) -> None:
        """Read what an interrupted run left; clear it where it was made from something else."""
        self.path, self.made_from = partial / JOURNAL, made_from
        self.hashes: dict[str, str] = {}
        held = _read_journal(self.path)
        if held.get("made_from") == made_from:
            self.hashes = held["shards"]
        else:
            for path in partial.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def keep(self, planned: list[Shard]) -> set[str]:
        """Names of the finished shards whose content still has its hash."""
        for shard in planned:
            path = self.path.parent / shard.name
            if shard.name in self.hashes and not (
                path.is_file() and passport.sha256(path) == self.hashes[shard.name]
            ):
                del self.hashes[shard.name]
        if self.hashes:
            print(f"Going on: {len(self.hashes)} of {len(planned)} shards are finished.")
        return set(self.hashes)

    def add(self, name: str, digest: str) -> None:
        """Note a shard as finished; it must be synced before."""
        self.hashes[name] = digest
        held = {"made_from": self.made_from, "shards": self.hashes}
        atomic.write_text(self.path, json.dumps(held, indent=1))

    def remove(self) -> None:
        """Delete the file: the folder is about to be complete."""
        self.path.unlink(missing_ok=True)


def _read_journal(path: Path) -> dict[str, Any]:
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held


def _write_shards(
    source: Source, planned: list[Shard], kept: set[str], journal: _Journal
) -> dict[str, Any]:
    """Write what is missing while the source files are hashed beside it; return their hashes."""
    total = sum(shard.data_bytes for shard in planned)
    done = sum(shard.data_bytes for shard in planned if shard.name in kept)
    with ThreadPoolExecutor(max_workers=1) as pool, _bar(total, done) as bar:
        checks = {path: pool.submit(check_file, path, md5) for path, md5 in source.files.items()}
        try:
            for shard in planned:
                if shard.name not in kept:
                    journal.add(shard.name, shards.write(shard, journal.path.parent, bar.update))
                _raise_first(checks)
            return {path.name: check.result() for path, check in checks.items()}
        finally:
            pool.shutdown(cancel_futures=True)


def _raise_first(checks: dict[Path, Future[dict[str, Any]]]) -> None:
    """Stop at once when a source file has failed its check."""
    for check in checks.values():
        if check.done():
            check.result()


def _bar(total: int, done: int) -> "tqdm[Any]":
    return tqdm(
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        desc="converting",
        file=sys.stderr,
        mininterval=0.5,
    )


def _write_texts(source: Source, partial: Path, planned: list[Shard], dtype: torch.dtype) -> None:
    ids = source.vocabulary.ids()
    name = DTYPES[SHORT_NAMES[dtype]][2]
    _write_json(partial / "config.json", {**source.config, **ids, "torch_dtype": name})
    _write_json(partial / "generation_config.json", ids)
    if len(planned) > 1:
        _write_json(partial / shards.INDEX, shards.index(planned))
    source.vocabulary.write(partial, source.config["max_position_embeddings"])


def _write_json(path: Path, value: dict[str, Any]) -> None:
    kept = {key: entry for key, entry in value.items() if entry is not None}
    atomic.write_text(path, json.dumps(kept, indent=2) + "\n")


def _check_written(
    partial: Path, planned: list[Shard], meant: dict[str, str], read: dict[str, str]
) -> None:
    """Compare what was read back from the disk with what was meant to be written."""
    shards.check(planned, partial)
    for shard in planned:
        if read[shard.name] != meant[shard.name]:
            (partial / shard.name).unlink()
            raise UserError(
                f"{shard.name} did not read back as it was written: the disk or memory is faulty.",
                "Run the same command again, on another disk if it happens twice.",
            )


def write_tokenizer(source: Source, folder: Path) -> None:
    """Put the tokenizer where the command lines of 2023 look for it.

    It is the one of the model converted last; a folder that this program did not write stays.
    """
    if folder.exists() and passport.read(folder) is None:
        print(f"{folder} was not made by this program and stays as it is.")
        return
    with atomic.folder(folder) as partial:
        source.vocabulary.write(partial, source.config["max_position_embeddings"])
        passport.write(partial, MADE_BY, model=source.name)


def _check_disk(planned: list[Shard], kept: set[str], final: Path) -> None:
    needed = sum(shard.size for shard in planned if shard.name not in kept) + SLACK
    free = free_disk(final)
    if free < needed:
        raise UserError(
            f"{final} needs {needed / 1e9:,.1f} GB more; {free / 1e9:,.1f} GB are free.",
            "Free some space, or name a folder on another disk with --output_dir.",
        )


@contextmanager
def _plain_disk_errors(final: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"The disk of {final} is full.",
            "Free some space and run the same command again; finished shards are kept.",
        ) from None


@contextmanager
def _lock(partial: Path) -> Iterator[None]:
    """Hold the partial folder against a second conversion of the same model."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(
            f"Another conversion is writing {partial}.", "Wait until it has ended."
        ) from None
    finally:
        os.close(descriptor)
