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
from transformers import GenerationConfig, PreTrainedModel

from alpaca import golden, passport, shards
from alpaca.errors import UserError
from alpaca.model import install, staging
from alpaca.prompt import chat_template
from alpaca.shards import Shard
from alpaca.tokens import Codec

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

    def value(self, dtype: torch.dtype) -> torch.Tensor:
        """The parameter whole, in `dtype`, on the CPU."""
        parameter = self.parameter
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        return whole.detach().to("cpu", dtype).contiguous()


def export(model: PreTrainedModel, codec: Codec, folder: Path, facts: dict[str, Any]) -> None:
    """Write the model folder; every rank calls this, rank 0 writes.

    Raises:
        UserError: what was written does not read back.
    """
    partial = staging(folder) if dist.get_rank() == 0 else folder
    planned, meant = _write(model, codec, partial)
    if dist.get_rank() == 0:
        facts["tensors"] = golden.all_tensor_hashes(partial)
        facts["golden"] = golden.record(partial)
        read = passport.write(partial, made_by="train", **facts)["files"]
        shards.check(planned, partial)
        for shard in planned:
            if read[shard.name] != meant[shard.name]:
                raise UserError(
                    f"{partial / shard.name} reads back differently from what was written.",
                    "The disk is failing; export to another one with --output_dir.",
                )
        install(partial, folder)
    dist.barrier()


def rehearse(model: PreTrainedModel, codec: Codec, folder: Path) -> None:
    """Write an export and delete it: what would fail at the end of a run fails before its start."""
    partial = staging(folder) if dist.get_rank() == 0 else folder
    _write(model, codec, partial)
    if dist.get_rank() == 0:
        shutil.rmtree(partial)
    dist.barrier()


@torch.no_grad()
def _write(
    model: PreTrainedModel, codec: Codec, folder: Path
) -> tuple[list[Shard[Weight]], dict[str, str]]:
    """Write weights, configuration and tokenizer; returns the files and the SHA-256 of each."""
    weights = [Weight(name, parameter) for name, parameter in model.named_parameters()]
    planned = shards.plan(weights, DTYPE)
    if dist.get_rank():
        for weight in weights:
            weight.value(DTYPE)  # rank 0 can't gather it alone
        return planned, {}
    total = sum(shard.data_bytes for shard in planned)
    with tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=None) as bar:
        meant = {
            shard.name: shards.write(shard, folder, Weight.value, bar.update) for shard in planned
        }
    if len(planned) > 1:
        (folder / shards.INDEX).write_text(json.dumps(shards.index(planned), indent=1))
    _describe(model, codec, folder)
    return planned, meant


def _describe(model: PreTrainedModel, codec: Codec, folder: Path) -> None:
    config = model.config
    config.dtype = DTYPE
    config.bos_token_id, config.eos_token_id = codec.tokenizer.bos_token_id, codec.eos
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
    ).save_pretrained(folder)
    codec.tokenizer.chat_template = chat_template(adds_bos=codec.bos is not None)
    codec.tokenizer.save_pretrained(folder)
