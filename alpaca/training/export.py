"""The trained model as a folder other programs load: bf16 safetensors, tokenizer, passport.

Tensors are gathered and written one at a time, so neither a device nor the host ever holds a full
copy. The folder is written aside, read back and compared, and only then moved to its place.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PreTrainedModel

from alpaca import description, golden, passport, shards, stored
from alpaca.description import vocabulary_of
from alpaca.errors import UserError
from alpaca.model import install, staging
from alpaca.shards import Shard
from alpaca.tokens import Codec
from alpaca.training.meeting import on_first_rank

DTYPE = torch.bfloat16


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
        """The parameter whole, as it is."""
        parameter = self.parameter
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        return whole.detach()

    def value(self, dtype: torch.dtype) -> torch.Tensor:
        """The parameter whole, in `dtype`, on the CPU."""
        return self.gather().to("cpu", dtype).contiguous()


def export(model: PreTrainedModel, codec: Codec, folder: Path, facts: dict[str, Any]) -> None:
    """Write the model folder; every rank calls this, rank 0 writes.

    Raises:
        UserError: what was written does not read back.
        OSError: the disk refused it. Both on every rank.
    """
    partial = on_first_rank(lambda: staging(folder))
    planned, meant = _write(model, codec, partial)

    def finish() -> None:
        proofs = {"tensors": golden.all_tensor_hashes(partial), "golden": golden.record(partial)}
        read = passport.write(partial, made_by="train", **facts, **proofs)["files"]
        shards.check(planned, partial)
        for shard in planned:
            if read[shard.name] != meant[shard.name]:
                raise UserError(
                    f"{partial / shard.name} reads back differently from what was written.",
                    "The disk is failing; export to another one with --output_dir.",
                )
        install(partial, folder)

    on_first_rank(finish)


def rehearse(model: PreTrainedModel, codec: Codec, folder: Path) -> None:
    """Write an export and delete it: what would fail at the end of a run fails before its start.

    Raises:
        OSError: on every rank, where the disk refuses it.
    """
    partial = on_first_rank(lambda: staging(folder))
    _write(model, codec, partial)
    on_first_rank(lambda: shutil.rmtree(partial))


@torch.no_grad()
def _write(
    model: PreTrainedModel, codec: Codec, folder: Path
) -> tuple[list[Shard[Weight]], dict[str, str]]:
    """Write weights, configuration and tokenizer; returns the files and the SHA-256 of each."""
    weights = [Weight(name, parameter) for name, parameter in model.named_parameters()]
    planned = shards.plan(weights, DTYPE)
    remaining = iter(weights)

    def gathered(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
        assert next(remaining) is weight
        return weight.value(dtype)

    meant: dict[str, str] = {}
    failure: OSError | None = None
    if dist.get_rank() == 0:
        total = sum(shard.data_bytes for shard in planned)
        try:
            with tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=None) as bar:
                for shard in planned:
                    meant[shard.name] = shards.write(shard, folder, gathered, bar.update)
            if len(planned) > 1:
                (folder / stored.INDEX).write_text(json.dumps(shards.index(planned), indent=1))
            description.write(folder, model.config, vocabulary_of(codec), DTYPE)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)  # or it would keep the disk full
            failure = error
    for weight in remaining:  # every rank gathers each, whatever became of rank 0's disk
        weight.gather()
    on_first_rank(lambda: _raise(failure))
    return planned, meant


def _raise(failure: OSError | None) -> None:
    if failure is not None:
        raise failure
