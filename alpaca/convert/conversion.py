"""Write a source to a model folder, which is either complete and verified or absent.

The folder is written as `.NAME.partial`, next to a manifest of finished shards and their hashes.
After a kill, the next run keeps the shards whose hash still matches and rewrites the rest. The
folder gets its final name after the sources have passed their checks and every byte written has
been read back.
"""

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig

from alpaca import atomic, description, golden, passport, rounding, shards
from alpaca.atomic import free_disk
from alpaca.convert.checksums import DamagedFileError, check_file, stamp
from alpaca.convert.expected import check_fit
from alpaca.convert.manifest import Manifest
from alpaca.convert.source import Source, Tensor
from alpaca.errors import UNLOCKED, UserError
from alpaca.folder import explained_disk_errors
from alpaca.layout import INDEX, SHARD_BYTES
from alpaca.prompt import template_hash
from alpaca.shards import SHORT_NAMES, Shard

MADE_BY = "convert"
AGAIN = "Free some disk space and run the same command again; finished shards are kept."
SLACK = 64 << 20  # bytes besides the tensors: tokenizer, headers, file system metadata


@dataclass(frozen=True)
class Layout:
    """The user's choices: the type of the weights (None keeps it), and the largest file size."""

    dtype: torch.dtype | None = None
    shard_bytes: int = SHARD_BYTES


def convert(source: Source, output: Path, layout: Layout, *, force: bool = False) -> Path:
    """Write `source` to `output`/NAME and return that folder.

    Does nothing if the folder exists already and was made from the same files.

    Raises:
        UserError: another folder has that name, the disk is full or too small, or a source file is
            damaged.
    """
    final = output / source.name
    made_from = fingerprint(source, layout)
    atomic.recover(final)
    if not force and final.exists():
        _check_same(final, made_from)
        print(f"{final} is already complete, made from the same files.")
    else:
        _write_folder(source, final, layout, made_from)
    return final


def fingerprint(source: Source, layout: Layout) -> str:
    """A hash of everything that determines the output: source files, layout, templates."""
    parts = [
        stamp(list(source.files)),
        source.config,
        source.generation,
        [layout.dtype and SHORT_NAMES[layout.dtype], layout.shard_bytes],
        [(tensor.name, tensor.shape) for tensor in source.tensors],
        template_hash(),
        passport.FORMAT,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check_same(final: Path, made_from: str) -> None:
    existing = passport.read(final)
    if existing is None or existing.get("made_from") != made_from:
        raise UserError(
            f"{final} already exists, but was not made from these files with these options.",
            "Use --force to replace it, or choose another --output_dir.",
        )


def _write_folder(source: Source, final: Path, layout: Layout, made_from: str) -> None:
    check_fit(source)
    dtype = layout.dtype or source.dtype
    others = {} if layout.dtype else _own_types(source)
    planned = shards.plan(source.tensors, dtype, layout.shard_bytes, others)
    manifest_path = final.with_name(f".{final.name}.journal.json")
    with (
        explained_disk_errors(final, AGAIN),
        _locked(final),
        atomic.folder(final, keep_partial=True) as partial,
    ):
        manifest = Manifest(manifest_path, partial, made_from)
        kept = manifest.keep(planned)
        _check_disk(planned, kept, final)
        error = rounding.Error()
        sources = _write_shards(source, planned, kept, manifest, error)
        if error.relative:
            print(
                f"Rounded to {SHORT_NAMES[dtype]}, which changed the weights by "
                f"{error.relative:.2%} (relative norm of the difference)."
            )
        _write_texts(source, partial, planned, dtype)
        facts = {**source.facts, "dtype": SHORT_NAMES[dtype], "sources": sources}
        facts |= {"made_from": made_from, "golden": golden.record(partial)}
        written = passport.write(partial, MADE_BY, **facts)
        _check_written(partial, planned, manifest.hashes, written["files"])
    manifest_path.unlink(missing_ok=True)


def _own_types(source: Source) -> dict[str, torch.dtype]:
    """The tensors that keep their own type because the folder's main type would round them."""
    types = {tensor.name: tensor.exact(source.dtype) for tensor in source.tensors}
    others = {name: dtype for name, dtype in types.items() if dtype != source.dtype}
    if others:
        kinds = " and ".join(sorted({SHORT_NAMES[dtype] for dtype in others.values()}))
        print(
            f"{len(others)} tensor(s) (first: {min(others)}) are kept in {kinds}: "
            f"{SHORT_NAMES[source.dtype]} would round them (--dtype sets one type for all)."
        )
    return others


def _write_shards(
    source: Source,
    planned: list[Shard[Tensor]],
    kept: set[str],
    manifest: Manifest,
    error: rounding.Error,
) -> dict[str, Any]:
    """Write the missing shards while the source files are hashed; return the source hashes.

    `error` accumulates the rounding error of the shards written by this call.
    """

    def value(tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
        return tensor.value(dtype, error)

    total = sum(shard.data_bytes for shard in planned)
    done = sum(shard.data_bytes for shard in planned if shard.name in kept)
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pool, _bar(total, done) as bar:
        checks = {
            path: pool.submit(check_file, path, md5, stop.is_set)
            for path, md5 in source.files.items()
        }
        try:
            for shard in planned:
                if shard.name not in kept:
                    sha256 = shards.write(shard, manifest.partial, value, bar.update)
                    manifest.add(shard.name, sha256)
                _results(checks, only_done=True)
            return _results(checks)
        except UserError:
            cause = _damage(checks)
            if cause is None:
                raise
            manifest.clear()  # the shards were made from wrong numbers
            raise cause from None
        finally:
            stop.set()  # so that Ctrl-C does not wait until 13 GB are hashed
            pool.shutdown(cancel_futures=True)


def _damage(checks: dict[Path, Future[dict[str, Any]]]) -> DamagedFileError | None:
    """The damaged source file that caused an error, if there is one; waits for all checks."""
    for check in checks.values():
        error = check.exception()
        if isinstance(error, DamagedFileError):
            return error
    return None


def _results(
    checks: dict[Path, Future[dict[str, Any]]], *, only_done: bool = False
) -> dict[str, Any]:
    """Results of the source file checks, by file name; raises the error of a failed check."""
    return {
        path.name: check.result() for path, check in checks.items() if check.done() or not only_done
    }


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


def _write_texts(
    source: Source, partial: Path, planned: list[Shard[Tensor]], dtype: torch.dtype
) -> None:
    if len(planned) > 1:
        atomic.write_text(partial / INDEX, shards.index(planned))
    # A deep copy, because transformers modifies the dictionaries it is given.
    config = AutoConfig.for_model(**deepcopy(source.config))
    description.write(partial, config, source.vocabulary, dtype, source.generation)


def _check_written(
    partial: Path, planned: list[Shard[Tensor]], expected: dict[str, str], read_back: dict[str, str]
) -> None:
    """Compare the hashes of what was read back from the disk with those of what was written."""
    shards.check(planned, partial)
    for shard in planned:
        if read_back[shard.name] != expected[shard.name]:
            (partial / shard.name).unlink()
            raise UserError(
                f"{shard.name} reads back differently from what was written: "
                "the disk or memory is faulty.",
                "Run the same command again; if it happens twice, use another disk.",
            )


def write_tokenizer(source: Source, folder: Path) -> None:
    """Write the tokenizer where the command lines of 2023 expect it.

    The model converted last replaces it. A folder that this program did not write is left alone.
    """
    if folder.exists() and passport.read(folder) is None:
        print(f"{folder} was not made by this program, so it was left unchanged.")
        return
    with atomic.folder(folder) as partial:
        source.vocabulary.write(partial, source.config["max_position_embeddings"])
        passport.write(partial, MADE_BY, model=source.name)


def _check_disk(planned: list[Shard[Tensor]], kept: set[str], final: Path) -> None:
    needed = sum(shard.size for shard in planned if shard.name not in kept) + SLACK
    free = free_disk(final)
    if free < needed:
        raise UserError(
            f"{final} needs {needed / 1e9:,.1f} GB more; {free / 1e9:,.1f} GB are free.",
            "Free some disk space, or choose a folder on another disk.",
        )


@contextmanager
def _locked(final: Path) -> Iterator[None]:
    """Let no second conversion of the same model write at the same time."""
    busy = UserError(f"Another conversion is writing {final}.", "Wait until it has finished.")
    with atomic.locked(final.with_name(f".{final.name}.lock"), busy) as held:
        if not held:
            print(UNLOCKED.format(final.parent))
        yield
