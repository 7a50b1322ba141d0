"""The model under FSDP2: built on the meta device, sharded, then loaded slice by slice.

No rank ever holds the whole model: each reads from the safetensors files only the rows it owns.
One process is a group of one, so a laptop and many nodes run the same code.
"""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.rendezvous import rendezvous
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from alpaca import ram
from alpaca.errors import UserError
from alpaca.folder import check_folder
from alpaca.recipe import rules
from alpaca.recipe.arguments import AdapterFlags, ShardingFlags
from alpaca.training import adapters, attention, weights
from alpaca.training.loss import TargetLoss
from alpaca.training.rendezvous import add_patient_group, meet
from alpaca.training.weights import Dither


def start(device: torch.device, flags: ShardingFlags | None = None) -> DeviceMesh:
    """Join the process group that torchrun describes, or make one of this process alone.

    The mesh defines the sharding. A mesh of one dimension shards over all ranks. In a mesh of two,
    the first dimension keeps copies and the second shards: within a node for `hybrid_shard`, not
    at all for `no_shard`.

    gloo is used besides NCCL, for data in host memory: offloaded weights and Python objects.
    """
    flags = flags or ShardingFlags()
    how, timeout = flags.sharding, timedelta(seconds=flags.ddp_timeout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        store, rank, world = next(rendezvous("env://"))
        store = meet(store, rank, world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    add_patient_group()
    world = dist.get_world_size()
    if how not in ("hybrid_shard", "no_shard"):
        return init_device_mesh(device.type, (world,))
    inner = rules.shards(how, world, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    shape = (world // inner, inner)
    return init_device_mesh(device.type, shape, mesh_dim_names=("copies", "shards"))


def build(
    folder: Path,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    device: torch.device,
    flags: ShardingFlags | None = None,
    dither: Dither | None = None,
    adapter: AdapterFlags | None = None,
) -> TargetLoss:
    """Build, shard and load the model of `folder`: fp32 master weights, computing in `dtype`.

    With `dither`, trainable parameters become dithered masters of the values in the files. With an
    `adapter` of a rank above 0, only the adapter is trained, and the base is held in `dtype`.

    Raises:
        UserError: no model folder, weights that do not fit its config.json, or a layer class
            that the model does not have.
    """
    check_folder(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    module = without_values(config, mesh, dtype, device, flags, adapter)
    weights.load(module.model, folder, dither)
    if adapter is not None and adapter.lora_rank:
        adapters.initialize(module.model, adapter.seed)
    return module


def without_values(
    config: PreTrainedConfig,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    device: torch.device,
    flags: ShardingFlags | None = None,
    adapter: AdapterFlags | None = None,
) -> TargetLoss:
    """Build and shard a model whose parameters hold no values yet; as `build`."""
    flags = flags or ShardingFlags()
    config.dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    model.tie_weights()
    model.float()
    if adapter is not None and adapter.lora_rank:
        adapters.add(model, adapter, dtype)
    module = TargetLoss(model.train())
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    whole = shard(module, mesh, dtype, flags)
    module.to_empty(device=torch.device("cpu") if flags.offload else device)
    if whole:
        model.tie_weights()  # `to_empty` has made two tensors of one
    for name, buffer in buffers.items():  # rotary frequencies: computed, not stored in the files
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, buffer.to(device))  # the compute device
    return module


def shard(module: TargetLoss, mesh: DeviceMesh, dtype: torch.dtype, flags: ShardingFlags) -> bool:
    """Shard a model in place, layer by layer, as the flags say; it may be on the meta device.

    Where nothing is to be divided, frozen parameters are left out: FSDP would copy each for every
    pass. Returns whether they were.
    """
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    whole = bool(frozen) and mesh.size(mesh.ndim - 1) == 1 and not flags.offload
    if flags.gradient_checkpointing:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "reshard_after_forward": rules.regathers(flags.sharding),
        **({"ignored_params": frozen} if whole else {}),
    }
    if flags.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    torch._dynamo.config.recompile_limit = 64  # eight lengths, training and evaluating
    for layer in decoder_layers(module.model, flags.fsdp_transformer_layer_cls_to_wrap):
        if flags.torch_compile:
            layer.compile(dynamic=False)  # else a second length compiles slower, general code
        fully_shard(layer, **options)
    fully_shard(module, **options)
    return whole


def reshard(module: torch.nn.Module) -> None:
    """Make parameters the fp32 shards again, where a forward pass left gathered ones.

    `shard_grad_op` and `no_shard` keep gathered parameters for the backward pass, but an evaluation
    has none.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def reduces_once(module: TargetLoss, mesh: DeviceMesh, flags: ShardingFlags) -> bool:
    """Whether every rank has memory for whole fp32 gradients, so that a step reduces them once.

    A collective call: if one rank has too little, all ranks reduce gradients with every pack.
    """
    parameters = sum(one.numel() for one in module.parameters() if one.requires_grad)
    if mesh.device_type == "cuda":
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    else:
        memory = ram.total() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shards = mesh.size(mesh.ndim - 1)
    once = rules.reduces_once(parameters, shards, memory, offload=flags.offload)
    agreed = torch.tensor(int(once), device=mesh.device_type)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return bool(agreed.item())


def decoder_layers(model: PreTrainedModel, named: str = "") -> list[torch.nn.Module]:
    """The modules that transformers marks as not to be split: the unit of sharding.

    `named` is the class name a user gave; old spellings such as LLaMADecoderLayer are accepted.
    """
    classes = set(model._no_split_modules or ())
    if named and named.lower() not in {name.lower() for name in classes}:
        raise UserError(
            f"--fsdp_transformer_layer_cls_to_wrap {named}: this model has no such layer.",
            f"Its layer is {', '.join(sorted(classes))}; without the flag it is found "
            "automatically.",
        )
    return [module for module in model.modules() if type(module).__name__ in classes]
