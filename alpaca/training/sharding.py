"""The model as FSDP2 sees it: built on the meta device, sharded, filled slice by slice.

No rank ever holds the whole model: each reads from the safetensors files only the rows it owns.
One process is a group of one, so there is a single code path from a laptop to many nodes.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alpaca.errors import UserError
from alpaca.model import check_folder
from alpaca.training import attention
from alpaca.training.loss import TargetLoss


def start(device: torch.device) -> DeviceMesh:
    """Join the process group torchrun describes, or make one of this process alone."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return init_device_mesh(device.type, (dist.get_world_size(),))


def build(folder: Path, mesh: DeviceMesh, dtype: torch.dtype, device: torch.device) -> TargetLoss:
    """Build, shard and load the model of `folder`: fp32 master weights, computing in `dtype`.

    Raises:
        UserError: no model folder, or weights that do not fit its config.json.
    """
    check_folder(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    model.tie_weights()
    module = TargetLoss(model.float().train())
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    module.to_empty(device=device)
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])  # rotary frequencies are computed, not stored in the files
    load(model, folder)
    return module


def decoder_layers(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """The modules that transformers says must not be split: the unit of sharding."""
    classes = set(model._no_split_modules or ())
    return (module for module in model.modules() if type(module).__name__ in classes)


@torch.no_grad()
def load(model: PreTrainedModel, folder: Path) -> None:
    """Fill every parameter's local shard from the folder's safetensors files.

    Raises:
        UserError: a tensor is missing, or its shape differs; the message names it.
    """
    parameters = dict(model.named_parameters())
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                if name in parameters:
                    _fill(name, parameters.pop(name), file.get_slice(name), path)
    if parameters:
        raise UserError(
            f"{folder} lacks {len(parameters)} tensor(s), the first is {min(parameters)}.",
            "Is a shard missing? Convert the weights again.",
        )


def _fill(name: str, parameter: torch.nn.Parameter, source: object, path: Path) -> None:
    shape = list(parameter.shape)
    found = source.get_shape()  # type: ignore[attr-defined]
    if found != shape:
        raise UserError(
            f"{path.name}: {name} has shape {found}, config.json implies {shape}.",
            "The weights and config.json are not of the same model.",
        )
    assert isinstance(parameter, DTensor)
    local, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    rows = slice(offset[0], offset[0] + local[0])
    parameter.to_local().copy_(source[rows])  # type: ignore[index]
