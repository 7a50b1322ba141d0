"""Filling the shards of a model from its files, slice by slice: each rank reads only its rows."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from alpaca import quantization, rounding, stored
from alpaca.errors import UserError
from alpaca.recipe.arguments import PrecisionFlags
from alpaca.shards import finite
from alpaca.training.quantized import QuantizedLinear
from alpaca.training.rendezvous import on_every_rank

ADAPTER = "lora_"  # in the names of an adapter's parameters
INNER = ".base_layer"  # in the others' names, between an adapted layer's name and its weight's


@dataclass(frozen=True)
class Dither:
    """What `rounding.dither` needs to know about a run."""

    compute: torch.dtype
    seed: int

    @classmethod
    def of(cls, flags: PrecisionFlags, compute: torch.dtype) -> "Dither | None":
        """None where the run computes in its masters' own type, or the user turned dither off."""
        wanted = flags.dither_masters and compute != torch.float32
        return cls(compute, flags.seed) if wanted else None


@torch.no_grad()
def load(model: PreTrainedModel, folder: Path, dither: Dither | None = None) -> None:
    """Fill every parameter's local shard from the folder's safetensors files; a collective call.

    With `dither`, trainable parameters become dithered masters of the values in the files.

    Raises:
        UserError: a tensor is missing, its shape differs, or it holds NaN or infinite numbers; the
            message names it. Raised on every rank, even if only one of them found it.
    """
    found = on_every_rank(lambda: _fill_all(model, folder, dither))
    if nonfinite := sorted({name for names in found for name in names}):
        raise UserError(
            f"{nonfinite[0]} holds NaN or infinite numbers"
            + (f", and so do {len(nonfinite) - 1} more tensors." if nonfinite[1:] else "."),
            "Fetch or convert the weights again.",
        )


def _fill_all(model: PreTrainedModel, folder: Path, dither: Dither | None) -> list[str]:
    """Fill this rank's shards; returns the tensors with NaN or infinite numbers in its rows."""
    nonfinite = []
    places = _places(model)
    for name, entry in stored.tensors(folder).items():
        if name in places:
            # Reopened for each tensor: pages read from a mapped file count as resident memory.
            with safe_open(entry.path, framework="pt") as file:
                source = file.get_slice(name)
                filled = _fill(name, places.pop(name), source, entry.path, dither)
            if not finite(filled):
                nonfinite.append(f"{entry.path}: {name}")
    if places:
        raise UserError(
            f"{folder} lacks {len(places)} tensor(s) (first: {min(places)}).",
            "Is a shard missing? Convert the weights again.",
        )
    return nonfinite


def _places(model: PreTrainedModel) -> dict[str, nn.Parameter | QuantizedLinear]:
    """Where each tensor of a model's files goes, by its name there; an adapter has none."""
    found: dict[str, nn.Parameter | QuantizedLinear] = {}
    for owner, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found[f"{owner}.weight".replace(INNER, "")] = module
    for name, parameter in model.named_parameters():
        if ADAPTER not in name and parameter.dtype != torch.uint8:
            found[name.replace(INNER, "")] = parameter
    return found


def _fill(
    name: str,
    place: nn.Parameter | QuantizedLinear,
    source: Any,
    path: Path,
    dither: Dither | None,
) -> Tensor:
    """Fill this rank's rows of a parameter or a quantized layer; returns the numbers held."""
    shape = list(place.shape)
    found = source.get_shape()
    if found != shape:
        raise UserError(
            f"{path.name}: {name} has shape {found}, config.json implies {shape}.",
            "The weights and config.json belong to different models.",
        )
    if isinstance(place, QuantizedLinear):
        exact: Tensor = source[rows_of(place.packed)]
        packed, scales = quantization.quantize(place.kind, exact.float())
        local(place.packed).copy_(packed)
        local(place.scales).copy_(scales)
        return scales.view(torch.float32)
    rows = rows_of(place)
    values: Tensor = source[rows]
    if dither is not None and place.requires_grad:
        kind, values = values.dtype, values.float().contiguous()
        first = rows.start * math.prod(shape[1:])
        rounding.dither(values, kind, dither.compute, dither.seed, name, first)
    local(place).copy_(values)
    return local(place)


def rows_of(parameter: nn.Parameter) -> slice:
    """Which rows of a parameter this rank holds: all of them where it is not sharded."""
    if not isinstance(parameter, DTensor):
        return slice(0, parameter.shape[0])
    held, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return slice(offset[0], offset[0] + held[0])


def local(parameter: nn.Parameter) -> Tensor:
    """The values that this rank holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
