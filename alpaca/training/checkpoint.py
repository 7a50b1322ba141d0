"""Checkpoints of a running job: sharded, complete or absent, and only for the same run.

`torch.distributed.checkpoint` writes each rank's shards; the folder gets its final name when all
ranks are done. It holds what the run is made of (data, base model, recipe), so a checkpoint of
another run is refused with the difference named. It can be read on another number of ranks.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from alpaca import atomic
from alpaca.atomic import free_disk
from alpaca.errors import UserError
from alpaca.training.rendezvous import on_first_rank

PREFIX = "checkpoint-"
META = "run.json"
FULL = 1_000_000  # bytes; a disk with less free space is full


def save(
    folder: Path,
    step: int,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    meta: dict[str, Any],
    keep: int,
) -> None:
    """Write `checkpoint-STEP` below `folder`; a collective call. The newest `keep` remain.

    Raises:
        UserError: on every rank, when the disk of one of them is full or refuses to be written.
            Earlier checkpoints remain, and what was written of this one is deleted.
    """
    final = folder / f"{PREFIX}{step}"
    partial = atomic.partial_path(final)

    def begin() -> None:
        _clear_partial(folder)
        partial.mkdir(parents=True)

    def finish() -> None:
        atomic.write_text(partial / META, json.dumps({**meta, "step": step}, indent=1))
        atomic.sync_tree(partial)
        atomic.replace_folder(partial, final)
        for old in found(folder)[:-keep]:
            _remove(old)

    try:
        on_first_rank(begin)
        model, optim = get_state_dict(module, optimizer)
        state_dict_saver.save({"model": model, "optimizer": optim}, checkpoint_id=partial)
        on_first_rank(finish)
    except (OSError, CheckpointException) as error:
        reason = _refusal(error, folder)
        if reason is None:
            raise
        dist.barrier()  # so that every rank has seen how full the disk was
        if dist.get_rank() == 0:
            _clear_partial(folder)
        raise UserError(
            f"{final} could not be written: {reason}.",
            "Free some space and run the same command again; it goes on from the last checkpoint.",
        ) from None


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; renamed first, so that what a kill leaves of it is cleared later."""
    aside = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def _clear_partial(folder: Path) -> None:
    """Delete what was not written, or not deleted, to its end, whichever step it was of."""
    for path in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def _refusal(error: OSError | CheckpointException, folder: Path) -> str | None:
    """What the disk said; None where the fault is not the disk's."""
    if isinstance(error, OSError):
        return str(error)
    causes = [cause for cause, _ in error.failures.values()]
    said = [str(cause) for cause in causes if isinstance(cause, OSError)]
    if not said and free_disk(folder) < FULL:  # torch's own writer hides the reason
        said = ["no space left on the disk"]
    return said[0] if said else None


def load(folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read a checkpoint into a sharded model and its optimizer; returns what `save` got as meta."""
    model, optim = get_state_dict(module, optimizer)
    state_dict_loader.load({"model": model, "optimizer": optim}, checkpoint_id=folder)
    set_state_dict(module, optimizer, model_state_dict=model, optim_state_dict=optim)
    return meta(folder)


def found(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    complete = [path for path in folder.glob(f"{PREFIX}*") if (path / META).is_file()]
    return sorted(complete, key=lambda path: int(path.name.removeprefix(PREFIX)))


def clear(folder: Path) -> None:
    """Remove all checkpoints, and what interrupted writers left of others."""
    for path in [*folder.glob(f"{PREFIX}*"), *folder.glob(f".{PREFIX}*")]:
        shutil.rmtree(path)


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, if there is one."""
    complete = found(folder)
    return complete[-1] if complete else None


def meta(checkpoint: Path) -> dict[str, Any]:
    """What `save` got as `meta`, and the `step`."""
    held: dict[str, Any] = json.loads((checkpoint / META).read_text())
    return held
