"""The trained model as a folder other programs load: bf16 safetensors, tokenizer, passport.

Tensors are gathered one at a time, so no device ever holds a full copy. The folder is written
aside, read back and compared, and only then moved to its place.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel

from alpaca import passport
from alpaca.errors import UserError
from alpaca.model import install, staging
from alpaca.prompt import chat_template
from alpaca.tokens import Codec

SHARD_BYTES = 5_000_000_000


def gathered(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter whole, in bf16, on the CPU; a collective call on every rank."""
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        yield name, whole.detach().to("cpu", torch.bfloat16).contiguous()


@torch.no_grad()
def export(model: PreTrainedModel, codec: Codec, folder: Path, facts: dict[str, Any]) -> None:
    """Write the model folder; every rank calls this, rank 0 writes."""
    writer = dist.get_rank() == 0
    partial = staging(folder) if writer else folder
    digests: dict[str, str] = {}
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in gathered(model):
        if not writer:
            continue
        if size and size + tensor.nbytes > SHARD_BYTES:
            digests |= _write(partial, len(shards), shards[-1])
            shards[-1] = dict.fromkeys(shards[-1], torch.empty(0))
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if writer:
        digests |= _write(partial, len(shards), shards[-1])
        _name_shards(partial, shards)
        _describe(model, codec, partial)
        read_back(partial, digests)
        passport.write(partial, made_by="train", **facts)
        install(partial, folder)
    dist.barrier()


def _write(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    save_file(tensors, folder / f"shard-{number}.safetensors", metadata={"format": "pt"})
    return {name: digest(tensor) for name, tensor in tensors.items()}


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a CPU tensor's shape, type and bytes."""
    head = f"{tensor.dtype}{list(tensor.shape)}".encode()
    content = tensor.contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(head + b"\0" + content.tobytes()).hexdigest()


def _name_shards(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    """Give the files the names transformers looks for, and the index it needs."""
    if len(shards) == 1:
        (folder / "shard-1.safetensors").rename(folder / "model.safetensors")
        return
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}.safetensors").rename(folder / file)
        names |= dict.fromkeys(shard, file)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _describe(model: PreTrainedModel, codec: Codec, folder: Path) -> None:
    config = model.config
    config.dtype = torch.bfloat16
    config.bos_token_id, config.eos_token_id = codec.tokenizer.bos_token_id, codec.eos
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
    ).save_pretrained(folder)
    codec.tokenizer.chat_template = chat_template(adds_bos=codec.bos is not None)
    codec.tokenizer.save_pretrained(folder)


def read_back(folder: Path, digests: dict[str, str]) -> None:
    """Read every tensor from disk and compare it with what was written."""
    missing = dict(digests)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                if digest(file.get_tensor(name)) != missing.pop(name):
                    raise UserError(
                        f"{path}: {name} reads back differently from what was written.",
                        "The disk is failing; export to another one with --output_dir.",
                    )
    assert not missing, f"not written: {sorted(missing)}"
