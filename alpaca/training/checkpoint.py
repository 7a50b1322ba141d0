"""Checkpoints of a running job: sharded, complete or absent, and only for the same run.

`torch.distributed.checkpoint` writes each rank's shards. The folder gets its final name when all
ranks are done. It records what the run is made of (data, base model, recipe), and the SHA-256 of
each file, which is checked before the checkpoint is loaded: torch reads a damaged one without
complaint. A checkpoint of another run is refused, and the error names the difference. A different
number of ranks can read it.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from alpaca import atomic, passport
from alpaca.atomic import free_disk
from alpaca.errors import UserError
from alpaca.training.rendezvous import on_every_rank, on_first_rank

PREFIX = "checkpoint-"
META = "run.json"
FULL = 1_000_000  # bytes; a disk with less free space counts as full


def save(
    folder: Path,
    step: int,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    meta: dict[str, Any],
    keep: int,
) -> None:
    """Write `checkpoint-STEP` in `folder` and keep the newest `keep`; a collective call.

    Raises:
        UserError: on every rank, when the disk of one of them is full or cannot be written.
            Earlier checkpoints are kept; the partial one is deleted.
    """
    final = folder / f"{PREFIX}{step}"
    partial = atomic.partial_path(final)

    def begin() -> None:
        _clear_partial(folder)
        partial.mkdir(parents=True)

    def finish() -> None:
        recorded = {**meta, "step": step, "files": files}
        recorded[passport.SEAL] = passport.seal(recorded)
        atomic.write_text(partial / META, json.dumps(recorded, indent=1))
        atomic.sync_tree(partial)
        atomic.replace_folder(partial, final)
        for old in found(folder)[:-keep]:
            _remove(old)

    try:
        on_first_rank(begin)
        model, optim = get_state_dict(module, optimizer)
        # One thread: with several, torch drops what a failing one should have written.
        writer = FileSystemWriter(partial, sync_files=False)
        state_dict_saver.save({"model": model, "optimizer": optim}, storage_writer=writer)
        files = _sync_and_hash(partial)
        on_first_rank(finish)
    except (OSError, CheckpointException) as error:
        reason = _disk_error(error, folder)
        if reason is None:
            raise
        dist.barrier()  # every rank has checked the free space before rank 0 frees some
        if dist.get_rank() == 0:
            _clear_partial(folder)
        raise UserError(
            f"{final} could not be written: {reason}.",
            "Free some space and run the same command again; it resumes from the last checkpoint.",
        ) from None


def _sync_and_hash(checkpoint: Path) -> dict[str, str]:
    """Flush the files to the disk, and hash them meanwhile, which does not wait for the disk.

    Each rank flushes its own files, because hosts may have caches of their own.
    """
    own = list(checkpoint.glob(f"__{dist.get_rank()}_*"))
    with ThreadPoolExecutor() as pool:
        flushed = [pool.submit(atomic.sync, path) for path in own]
        files = _hash_shared(checkpoint)
    on_every_rank(lambda: [one.result() for one in flushed])
    return files


def _hash_shared(checkpoint: Path) -> dict[str, str]:
    """Name and SHA-256 of every file, each hashed by one of the ranks; a collective call.

    Raises:
        OSError: on every rank, where one of them cannot read a file.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def hash_own() -> dict[str, str]:
        paths = sorted(path for path in checkpoint.iterdir() if path.name != META)[rank::ranks]
        names = [path.name for path in paths]
        return dict(zip(names, passport.hash_files(paths), strict=True))

    return {name: value for own in on_every_rank(hash_own) for name, value in own.items()}


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that a later save clears what a kill leaves."""
    renamed = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(renamed)
    atomic.remove(renamed)


def _clear_partial(folder: Path) -> None:
    """Delete checkpoints, of any step, whose writing or deletion was interrupted."""
    for path in folder.glob(f".{PREFIX}*"):
        with suppress(OSError):
            atomic.remove(path)


def _disk_error(error: OSError | CheckpointException, folder: Path) -> str | None:
    """The disk's error message; None where the disk is not at fault."""
    if isinstance(error, OSError):
        return str(error)
    causes = [cause for cause, _ in error.failures.values()]
    messages = [str(cause) for cause in causes if isinstance(cause, OSError)]
    if not messages and free_disk(folder) < FULL:  # torch's own writer hides the reason
        messages = ["no space left on the disk"]
    return messages[0] if messages else None


def load(folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a checkpoint into a sharded model and its optimizer; returns its `meta`.

    A collective call.

    Raises:
        UserError: on every rank, when a file is missing or was changed after it was written.
    """
    recorded = meta(folder)
    if "files" in recorded:  # checkpoints of earlier versions have none
        _check(folder, recorded["files"])
    model, optim = get_state_dict(module, optimizer)
    state_dict_loader.load({"model": model, "optimizer": optim}, checkpoint_id=folder)
    set_state_dict(module, optimizer, model_state_dict=model, optim_state_dict=optim)
    return recorded


def _check(folder: Path, wanted: dict[str, str]) -> None:
    held = _hash_shared(folder)
    for name, value in sorted(wanted.items()):
        if held.get(name) != value:
            raise _damaged(folder, f"{name} {'differs' if name in held else 'is missing'}")


def _damaged(checkpoint: Path, reason: str) -> UserError:
    """The error for a checkpoint that is not as it was written; names the one before it."""
    earlier = [path for path in found(checkpoint.parent) if path != checkpoint]
    then = f"resumes from {earlier[-1].name}" if earlier else "starts from the base model"
    return UserError(
        f"{checkpoint} was damaged after it was written: {reason}.",
        f"Delete that folder and run the same command again: it {then}.",
    )


def found(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    complete = [path for path in folder.glob(f"{PREFIX}*") if (path / META).is_file()]
    return sorted(complete, key=lambda path: int(path.name.removeprefix(PREFIX)))


def clear(folder: Path) -> None:
    """Remove all checkpoints, also partial ones left by interrupted writers."""
    for path in [*folder.glob(f"{PREFIX}*"), *folder.glob(f".{PREFIX}*")]:
        atomic.remove(path)


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, if there is one."""
    complete = found(folder)
    return complete[-1] if complete else None


def meta(checkpoint: Path) -> dict[str, Any]:
    """The `meta` that was given to `save`, the `step` and the hash of each file.

    Raises:
        UserError: it was changed after it was written.
    """
    try:
        recorded: dict[str, Any] = json.loads((checkpoint / META).read_text(encoding="utf-8"))
        intact = recorded.get(passport.SEAL) in (None, passport.seal(recorded))
    except (ValueError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise _damaged(checkpoint, f"{META} differs")
    return recorded
