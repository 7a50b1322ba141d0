"""Checkpoints of a running job: sharded, complete or absent, and only for the same run.

`torch.distributed.checkpoint` writes each rank's shards. The folder gets its final name when all
ranks are done. It records what the run is made of (data, base model, recipe), and the SHA-256 of
each file, which is checked before the checkpoint is loaded: torch reads a damaged one without
complaint. A checkpoint of another run is refused, and the error names the difference. A different
number of ranks can read it.

With `--save_only_model` a checkpoint is a model folder instead: smaller, and nothing resumes from
it.
"""

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from alpaca import atomic, passport, ram
from alpaca.atomic import free_disk
from alpaca.errors import UserError
from alpaca.training.rendezvous import PATIENCE, lost_rank, on_every_rank, on_first_rank

PREFIX = "checkpoint-"
META = "run.json"
STEP = "checkpoint"  # in the passport of a checkpoint that is a model folder: its step
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # of an adapter, not its base
FULL = 1_000_000  # bytes; a disk with less free space counts as full


class Saver:
    """Writes the checkpoints of a run, one at a time, while training goes on.

    The weights and moments are first copied to host memory. Where that has no room for a copy, or
    where the optimizer keeps tensors of its own kind, training waits until they are written.
    """

    def __init__(self, folder: Path, keep: int, *, copies: bool = True) -> None:
        """Keep the newest `keep` in `folder`; a collective call. Without `copies`, always wait."""
        self.folder, self.keep, self.copies = folder, keep, copies
        # The collective calls of the writing thread must not mix with those of training.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(
        self,
        step: int,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        meta: dict[str, Any],
        *,
        best: int | None = None,
        wait: bool = False,
    ) -> None:
        """Begin to write `checkpoint-STEP`, once an earlier one is written; a collective call.

        The one of step `best` is kept besides the newest. With `wait` it is written when this
        returns, and nothing is copied.

        Raises:
            UserError: as `wait`.
        """
        self.wait()
        state = state_of(module, optimizer)
        copies = self.copies and not wait
        if not (copies and all(on_every_rank(lambda: has_room(state), self._group))):
            write(self.folder, step, state, meta, self.keep, self._group, best=best)
            return
        stager = DefaultStager(StagingOptions(False, False, False, False))  # a plain copy
        copied = stager.stage(state)
        stager.close()
        assert isinstance(copied, dict)  # a future only with asynchronous staging
        self._thread = threading.Thread(
            target=self._write, args=(step, copied, meta, best), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _write(
        self, step: int, state: dict[str, Any], meta: dict[str, Any], best: int | None
    ) -> None:
        try:
            write(self.folder, step, state, meta, self.keep, self._group, best=best)
        except Exception as error:  # raised again by `wait`
            self._failure = error

    @property
    def failed(self) -> bool:
        """Whether the last save has failed, as far as this rank knows; `wait` then raises."""
        return self._failure is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is written; a collective call.

        Raises:
            UserError: on every rank, when the disk of one of them is full or cannot be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def __enter__(self) -> Self:
        """Leaving the context waits, as `wait` does, but raises nothing after another error."""
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Wait, unless the user or a lost rank ended the run."""
        if error is None:
            self.wait()
        elif self._thread is not None and not (
            isinstance(error, KeyboardInterrupt) or lost_rank(error)
        ):
            self._thread.join()


def state_of(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """This rank's shards of the trained weights and moments; a tied weight is there once."""
    model, optim = get_state_dict(module, optimizer, options=TRAINED)
    return {"model": _once(module, model), "optimizer": optim}


def _once(module: torch.nn.Module, model: dict[str, Any]) -> dict[str, Any]:
    """The trained weights, each under its first name.

    torch drops frozen weights by their first names only: a frozen embedding would stay as the
    output layer that is tied to it.
    """
    every = module.named_parameters(remove_duplicate=False)
    left_out = {name for name, parameter in every if not parameter.requires_grad} | {*_tied(module)}
    return {name: value for name, value in model.items() if name not in left_out}


def _tied(module: torch.nn.Module) -> dict[str, str]:
    """For each further name of a trained parameter, its first name."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and (known := first.setdefault(id(parameter), name)) != name:
            tied[name] = known
    return tied


def has_room(state: dict[str, Any]) -> bool:
    """Whether the ranks of this host can each copy their state to memory, and keep half as much."""
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    size = sum((one.to_local() if isinstance(one, DTensor) else one).nbytes for one in tensors)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 1.5 * size * ranks <= ram.available()


def write(
    folder: Path,
    step: int,
    state: dict[str, Any],
    meta: dict[str, Any],
    keep: int,
    group: dist.ProcessGroup | None = None,
    *,
    best: int | None = None,
) -> None:
    """Write `state` as `checkpoint-STEP` in `folder`; a collective call.

    The newest `keep` checkpoints are kept, and besides them the one of step `best`.

    Raises:
        UserError: on every rank, when the disk of one of them is full or cannot be written.
            Earlier checkpoints are kept; the partial one is deleted.
    """
    final = folder / f"{PREFIX}{step}"
    partial = atomic.partial_path(final)

    def finish() -> None:
        recorded = {**meta, "step": step, "files": files}
        recorded[passport.SEAL] = passport.seal(recorded)
        atomic.write_text(partial / META, json.dumps(recorded, indent=1))
        atomic.sync_tree(partial)
        _finish(partial, final, keep, best)

    try:
        on_first_rank(lambda: _begin(final), group)
        # One thread: with several, torch drops what a failing one should have written.
        writer = FileSystemWriter(partial, sync_files=False)
        state_dict_saver.save(state, storage_writer=writer, process_group=group)
        files = _sync_and_hash(partial, group)
        on_first_rank(finish, group)
    except (OSError, CheckpointException) as error:
        # Decided by all together, before rank 0 frees some space.
        failed = error
        reasons = on_every_rank(lambda: _disk_error(failed, folder), group)
        reason = next((one for one in reasons if one is not None), None)
        if reason is None:
            raise
        if dist.get_rank() == 0:
            _clear_partial(folder)
        raise UserError(
            f"{final} could not be written: {reason}.",
            "Free some space and run the same command again; a run resumes from its last state.",
        ) from None


def write_model(
    folder: Path,
    step: int,
    export: Callable[[Path, dict[str, Any]], None],
    keep: int,
    *,
    best: int | None = None,
) -> None:
    """Write `checkpoint-STEP` as a model folder, and keep as many as `write`; a collective call.

    `export` writes a model to a folder, on all ranks, with facts for its passport.
    """
    final = folder / f"{PREFIX}{step}"
    partial = atomic.partial_path(final)
    on_first_rank(lambda: _begin(final))
    export(partial, {STEP: step})
    on_first_rank(lambda: _finish(partial, final, keep, best))


def _begin(final: Path) -> None:
    """Make the folder that a checkpoint is written to before it gets its name."""
    if final.exists() and _record(final) is None:
        raise UserError(
            f"{final} is not a checkpoint of this program, and the next one has its name.",
            "Move it away, or name another --output_dir.",
        )
    _clear_partial(final.parent)
    atomic.partial_path(final).mkdir(parents=True)


def _finish(partial: Path, final: Path, keep: int, best: int | None) -> None:
    """Name a complete checkpoint; remove all of its kind but the last `keep` and that of `best`."""
    atomic.replace_folder(partial, final)
    own = _record(final)
    assert own is not None
    alike = _complete(final.parent, own.name)
    written = {path: (path / own.name).stat().st_mtime_ns for path in alike}
    for old in sorted(written, key=lambda path: (path == final, written[path]))[:-keep]:
        if step_of(old) != best:
            remove(old)


def _sync_and_hash(checkpoint: Path, group: dist.ProcessGroup | None) -> dict[str, str]:
    """Flush the files to the disk, and hash them meanwhile, which does not wait for the disk.

    Each rank flushes its own files, because hosts may have caches of their own.
    """
    own = list(checkpoint.glob(f"__{dist.get_rank()}_*"))
    with ThreadPoolExecutor() as pool:
        flushed = [pool.submit(atomic.sync, path) for path in own]
        files = _hash_shared(checkpoint, group)
    on_every_rank(lambda: [one.result() for one in flushed], group)
    return files


def _hash_shared(checkpoint: Path, group: dist.ProcessGroup | None = None) -> dict[str, str]:
    """Name and SHA-256 of every file, each hashed by one of the ranks; a collective call.

    Raises:
        OSError: on every rank, where one of them cannot read a file.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()

    # Listed by one rank: another host may not see a new file yet.
    every = on_first_rank(
        lambda: sorted(path.name for path in checkpoint.iterdir() if path.name != META), group
    )

    def hash_own() -> dict[str, str]:
        names = every[rank::ranks]
        hashes = passport.hash_files([checkpoint / name for name in names])
        return dict(zip(names, hashes, strict=True))

    return {name: value for own in on_every_rank(hash_own, group) for name, value in own.items()}


def remove(checkpoint: Path) -> None:
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
    recorded = _checked(folder)
    state = state_of(module, optimizer)
    state_dict_loader.load(state, checkpoint_id=folder)
    model, optim = state["model"], state["optimizer"]
    model |= {name: model[known] for name, known in _tied(module).items()}
    set_state_dict(
        module, optimizer, model_state_dict=model, optim_state_dict=optim, options=TRAINED
    )
    return recorded


def load_weights(folder: Path, module: torch.nn.Module) -> None:
    """Load only the weights of a checkpoint into a sharded model; a collective call.

    Raises:
        UserError: as `load`.
    """
    _checked(folder)
    held = {"model": _once(module, get_model_state_dict(module, options=TRAINED))}
    state_dict_loader.load(held, checkpoint_id=folder)
    again = {name: held["model"][known] for name, known in _tied(module).items()}
    set_model_state_dict(module, {**held["model"], **again}, options=TRAINED)


def _checked(folder: Path) -> dict[str, Any]:
    """A checkpoint's `meta`, once every file is as it was written; a collective call."""
    recorded = meta(folder)
    wanted = recorded.get("files", {})  # checkpoints of earlier versions have none
    held = _hash_shared(folder) if wanted else {}
    for name, value in sorted(wanted.items()):
        if held.get(name) != value:
            raise _damaged(folder, f"{name} {'differs' if name in held else 'is missing'}")
    return recorded


def _damaged(checkpoint: Path, reason: str) -> UserError:
    """The error for a checkpoint that is not as it was written; names the one before it."""
    earlier = [path for path in found(checkpoint.parent) if path != checkpoint]
    then = f"resumes from {earlier[-1].name}" if earlier else "starts from the base model"
    return UserError(
        f"{checkpoint} was damaged after it was written: {reason}.",
        f"Delete that folder and run the same command again: it {then}.",
    )


def found(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder` that a run can resume from, oldest first."""
    return _complete(folder, META)


def models(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that are model folders, oldest first."""
    return _complete(folder, passport.NAME)


def of_step(folder: Path, step: int) -> Path | None:
    """The complete checkpoint of a step, of either kind; None if there is none."""
    path = folder / f"{PREFIX}{step}"
    return path if _record(path) is not None else None


def resumable(checkpoint: Path) -> bool:
    """Whether a complete checkpoint is a state to resume from, not a model folder."""
    return (checkpoint / META).is_file()


def step_of(checkpoint: Path) -> int:
    """After which step a checkpoint was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def _complete(folder: Path, name: str) -> list[Path]:
    """Checkpoints that are recorded in a file of that name."""
    records = {path: _record(path) for path in folder.glob(f"{PREFIX}*")}
    fitting = [path for path, record in records.items() if record and record.name == name]
    return sorted(fitting, key=step_of)


def _record(path: Path) -> Path | None:
    """The file that makes a folder a complete checkpoint of this program; None for any other.

    A copy whose name ends in something else is the user's own, as is a model with that name.
    """
    if not path.name.removeprefix(PREFIX).isdecimal():
        return None
    if (path / META).is_file():
        return path / META
    with suppress(UserError):  # a damaged passport is nobody's
        model = passport.read(path)
        return path / passport.NAME if model and model.get(STEP) == step_of(path) else None
    return None


def clear(folder: Path) -> None:
    """Remove all checkpoints, also partial ones left by interrupted writers."""
    for path in [*found(folder), *models(folder), *folder.glob(f".{PREFIX}*")]:
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
