"""LoRA adapters in training: small trained matrices beside a frozen base.

peft adds them to the model on the meta device, before it is sharded. The frozen base is held in the
compute type, or in 4 or 8 bits, because no optimizer adds small updates to it. What is initialized,
saved and loaded is the adapter alone.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from alpaca import adapter, passport
from alpaca.errors import UserError
from alpaca.quantization import fits
from alpaca.recipe.arguments import AdapterFlags
from alpaca.training.quantized import QuantizedLinear
from alpaca.training.weights import ADAPTER, INNER, local, rows_of

NAME = "default"  # of the only adapter, in peft's modules


def add(model: PreTrainedModel, flags: AdapterFlags, compute: torch.dtype) -> None:
    """Freeze a model on the meta device and add an adapter to it, in place; fp32.

    Raises:
        UserError: the model has no layer of a given name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    from alpaca.training.lowrank import LowRankLinear, gated, gated_forward

    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(compute)
    config = LoraConfig(task_type="CAUSAL_LM", **settings(model, flags))
    # Values come later, when the ranks know their shards.
    inject_adapter_in_model(config, model, adapter_name=NAME, low_cpu_mem_usage=True)
    for layer in model.modules():
        if isinstance(getattr(layer, "base_layer", None), nn.Linear):
            layer.__class__ = LowRankLinear
    for block in model.modules():
        if gated(block):
            block.forward = MethodType(gated_forward, block)
    if flags.quantize_base != "no":
        _quantize(model, flags.quantize_base)
    for name, parameter in model.named_parameters():
        if ADAPTER in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def _quantize(model: PreTrainedModel, kind: str) -> None:
    """Let all frozen linear layers but the output layer hold their weights in fewer bits."""
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        plain = isinstance(layer, nn.Linear) and layer is not head and ADAPTER not in name
        if plain and fits(kind, layer.in_features):
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, QuantizedLinear(layer, kind))


def settings(model: PreTrainedModel, flags: AdapterFlags) -> dict[str, Any]:
    """peft's names of the settings that define an adapter's result; JSON values."""
    return {
        "r": flags.lora_rank,
        "lora_alpha": flags.alpha,
        "lora_dropout": flags.lora_dropout,
        "target_modules": _targets(model, flags),
        "use_rslora": flags.lora_use_rslora,
        "use_dora": flags.use_dora,
        "bias": "none",
    }


def _targets(model: PreTrainedModel, flags: AdapterFlags) -> list[str]:
    """The last parts of the names of the layers to adapt: by default all but the output layer."""
    head = model.get_output_embeddings()
    linear = {
        name.removesuffix(INNER).rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | QuantizedLinear)
        and layer is not head
        and ADAPTER not in name
    }
    if unknown := sorted(set(flags.targets) - linear):
        raise UserError(
            f"--lora_target_modules {flags.lora_target_modules}: the model has no linear layer "
            f"{unknown[0]} that an adapter can change.",
            f"It has {', '.join(sorted(linear))}; all-linear adapts all of them.",
        )
    return sorted(flags.targets or linear)


def trained(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapter's parameters, each with its name in PEFT's files."""
    for name, parameter in model.named_parameters():
        if ADAPTER in name:
            yield stored_name(name), parameter


@contextmanager
def switched_off(model: PreTrainedModel) -> Iterator[None]:
    """Compute without the adapter.

    peft's own switch also freezes the adapter's parameters, which may be gathered or sharded now:
    FSDP keeps two of each.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def stored_name(name: str) -> str:
    """A parameter's name in PEFT's files."""
    plain = name.replace(f".{NAME}", "")
    if plain.endswith("lora_magnitude_vector.weight"):
        plain = plain.removesuffix(".weight")
    return adapter.ROOT + plain


@torch.no_grad()
def initialize(model: PreTrainedModel, seed: int) -> None:
    """Give a sharded model's adapter its first values: it changes nothing yet.

    As in peft, B is zero and A uniform within 1 / sqrt(in); DoRA's lengths are those of the base's
    rows. The values depend on seed and name, not on ranks.
    """
    for name, parameter in trained(model):
        if name.endswith("lora_A.weight"):
            digest = passport.text_sha256(f"{seed}\0{name}")
            generator = torch.Generator().manual_seed(int(digest[:15], 16))
            limit = parameter.shape[1] ** -0.5
            whole = torch.empty(parameter.shape).uniform_(-limit, limit, generator=generator)
            local(parameter).copy_(whole[rows_of(parameter)])
        elif name.endswith("lora_B.weight"):
            local(parameter).zero_()
    for layer in model.modules():
        if lengths := getattr(layer, "lora_magnitude_vector", None):
            weight = local(layer.base_layer.weight)
            local(lengths[NAME].weight).copy_(torch.linalg.norm(weight.float(), dim=1))


@torch.no_grad()
def load(model: PreTrainedModel, folder: Path) -> None:
    """Fill this rank's shards of the adapter from a folder in PEFT's format."""
    held = load_file(folder / adapter.WEIGHTS)
    for name, parameter in trained(model):
        local(parameter).copy_(held[name][rows_of(parameter)])


def write(
    model: PreTrainedModel, flags: AdapterFlags, base: Path, folder: Path, values: dict[str, Tensor]
) -> None:
    """Write an adapter's whole fp32 values, and settings that peft, vLLM and llama.cpp read."""
    from peft import LoraConfig

    (folder / adapter.WEIGHTS).write_bytes(save(values, {"format": "pt"}))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=str(base),
        **settings(model, flags),
    ).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    (folder / adapter.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
