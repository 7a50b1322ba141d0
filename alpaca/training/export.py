"""The trained model as a folder that other programs load: safetensors, tokenizer, passport.

Tensors are gathered and written one at a time, so neither a device nor the host ever holds a full
copy. The folder is written under a temporary name, read back, compared, and only then renamed.

A run that computed in fp32 has more digits than a 16-bit export can hold. It is rounded
stochastically, which keeps the mean of each small update. A run that computed in bf16 used the
nearest bf16 numbers of its masters, so those are exported.

An adapter is small. It is written in fp32, as it was trained.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PreTrainedModel

from alpaca import (
    adapter,
    description,
    golden,
    layout,
    merging,
    passport,
    proof,
    rounding,
    shards,
    stored,
)
from alpaca.description import vocabulary_of
from alpaca.errors import UserError
from alpaca.folder import install, staging
from alpaca.recipe.arguments import AdapterFlags
from alpaca.shards import DTYPES, SHORT_NAMES, Shard
from alpaca.tokens import Codec
from alpaca.training import adapters, weights
from alpaca.training.rendezvous import on_first_rank

T = TypeVar("T")


@dataclass(frozen=True)
class Rounding:
    """How fp32 masters are rounded to weights of `dtype`: to the nearest, or stochastically."""

    dtype: torch.dtype
    seed: int | None = None  # None: to the nearest

    @classmethod
    def of(cls, export_dtype: str, compute: torch.dtype, seed: int) -> "Rounding":
        """Stochastic where the run computed in fp32, with digits that the export's type lacks."""
        return cls(DTYPES[export_dtype], seed if compute == torch.float32 else None)

    @property
    def facts(self) -> dict[str, str]:
        """For the passport."""
        way = "nearest" if self.seed is None else "stochastic"
        exact = self.dtype == torch.float32
        return {"dtype": SHORT_NAMES[self.dtype], "rounding": "none" if exact else way}

    def apply(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """Round a whole fp32 tensor, on the CPU, for the export.

        Raises:
            UserError: it holds a number that is too large for the type.
        """
        return rounding.rounded(whole, self.dtype, self.seed, "export", name)


@dataclass(frozen=True)
class Weight:
    """One parameter of the sharded model; getting its value is a collective call."""

    name: str
    parameter: torch.nn.Parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return tuple(self.parameter.shape)

    def gather(self) -> torch.Tensor:
        """The whole parameter, without rounding."""
        parameter = self.parameter
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        return whole.detach()


def export(
    model: PreTrainedModel,
    codec: Codec,
    folder: Path,
    rounded: Rounding,
    facts: Callable[[Path], dict[str, Any]],
    beside: "Beside | None" = None,
) -> None:
    """Write the model folder; every rank calls this, rank 0 writes.

    `beside`: only the adapter is written, for the base that it names.

    `facts` is called on every rank with the written folder, before it gets its final name. It
    returns what the passport records about the run.

    Raises:
        UserError: the files read back differently from what was written.
        OSError: the disk could not be written. Both are raised on every rank.
    """
    partial = on_first_rank(lambda: staging(folder))
    planned, expected = _write(model, codec, partial, rounded, beside)
    run_facts = facts(partial)

    def finish() -> None:
        proofs = beside.proofs(partial) if beside else _proofs(partial)
        written = passport.write(
            partial, made_by="train", **run_facts, export=rounded.facts, **proofs
        )
        read = written["files"]
        shards.check(planned, partial)
        for name, value in expected.items():
            if read[name] != value:
                raise UserError(
                    f"{partial / name} reads back differently from what was written.",
                    "The disk is failing; export to another one with --output_dir.",
                )
        install(partial, folder)

    on_first_rank(finish)


@dataclass(frozen=True)
class Beside:
    """That an adapter is written, and for which base."""

    flags: AdapterFlags
    base: Path

    def proofs(self, folder: Path) -> dict[str, Any]:
        """What the passport of an adapter's folder records besides the run, also printed."""
        kind = None if self.flags.quantize_base == "no" else self.flags.quantize_base
        found = proof.record(self.base, adapter.Adapter(folder), merging.as_trained(kind))
        for line in proof.Rounded.of(found["proof"]).lines() if found["proof"] else []:
            print(f"train: base and adapter {line}")
        return {**({"quantized": kind} if kind else {}), **found}


def _proofs(folder: Path) -> dict[str, Any]:
    return {"tensors": golden.all_tensor_hashes(folder), "golden": golden.record(folder)}


def load(model: PreTrainedModel, folder: Path) -> None:
    """Fill this rank's shards from a folder that `export` has written; a collective call."""
    if stored.is_adapter(folder):
        adapters.load(model, folder)
    else:
        weights.load(model, folder)


def rehearse(
    model: PreTrainedModel,
    codec: Codec,
    folder: Path,
    rounded: Rounding,
    beside: Beside | None = None,
) -> None:
    """Write an export and delete it, to find before a run what would fail at its end.

    Raises:
        OSError: on every rank, where the disk cannot be written.
    """
    partial = on_first_rank(lambda: staging(folder))
    _write(model, codec, partial, rounded, beside)
    on_first_rank(lambda: shutil.rmtree(partial))


@torch.no_grad()
def _write(
    model: PreTrainedModel, codec: Codec, folder: Path, rounded: Rounding, beside: Beside | None
) -> tuple[list[Shard[Weight]], dict[str, str]]:
    """Write weights, configuration and tokenizer; returns the files and the SHA-256 of each."""
    if beside is not None:
        return [], _write_adapter(model, codec, folder, beside)
    everything = [Weight(name, parameter) for name, parameter in model.named_parameters()]
    planned = shards.plan(everything, rounded.dtype)
    total = sum(shard.data_bytes for shard in planned)
    hashes: dict[str, str] = {}
    main = dist.get_rank() == 0
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="export", disable=None if main else True
    ) as bar:
        for shard in planned:
            hash_of_file = _write_shard(shard, folder, rounded, bar)
            if hash_of_file is not None:
                hashes[shard.name] = hash_of_file

    def describe() -> None:
        if len(planned) > 1:
            (folder / layout.INDEX).write_text(shards.index(planned))
        description.write(folder, model.config, vocabulary_of(codec), rounded.dtype)

    on_first_rank(lambda: _or_delete(folder, describe))
    return planned, hashes


def _write_adapter(
    model: PreTrainedModel, codec: Codec, folder: Path, beside: Beside
) -> dict[str, str]:
    """Write an adapter, its settings and the tokenizer; returns the SHA-256 of its weights."""
    values = {}
    for name, parameter in adapters.trained(model):
        whole = Weight(name, parameter).gather()
        if dist.get_rank() == 0:
            values[name] = whole.cpu().contiguous()

    def write() -> None:
        adapters.write(model, beside.flags, beside.base, folder, values)
        vocabulary_of(codec).write(folder, model.config.max_position_embeddings)

    on_first_rank(lambda: _or_delete(folder, write))
    return on_first_rank(lambda: {adapter.WEIGHTS: passport.sha256(folder / adapter.WEIGHTS)})


def _write_shard(
    shard: Shard[Weight], folder: Path, rounded: Rounding, bar: "tqdm[Any]"
) -> str | None:
    """Gather the weights of one file on all ranks; rank 0 writes it and returns its SHA-256.

    All meet again after each file: a rank on a GPU would queue the gathers of all files at once,
    and `--ddp_timeout` would count the time in which rank 0 writes them.
    """
    left = iter(shard.tensors)

    def gathered(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
        assert next(left) is weight
        return rounded.apply(weight.name, weight.gather().cpu()).contiguous()

    found: str | None = None
    failure: OSError | UserError | None = None
    if dist.get_rank() == 0:
        try:
            found = _or_delete(folder, lambda: shards.write(shard, folder, gathered, bar.update))
        except (OSError, UserError) as error:
            failure = error
    for weight in left:  # gathering is collective, so it continues after a disk error
        weight.gather()
    on_first_rank(lambda: _raise(failure))
    return found


def _or_delete(folder: Path, body: Callable[[], T]) -> T:
    """What `body` returns; where it fails, the folder is deleted, which would keep a disk full."""
    try:
        return body()
    except (OSError, UserError):
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _raise(failure: OSError | UserError | None) -> None:
    if failure is not None:
        raise failure
