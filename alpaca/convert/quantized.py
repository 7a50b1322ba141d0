"""Dequantize FP8 and int8 weights that are stored with separate scales.

Each stored number is multiplied, in fp32, by the scale of its tensor, row, group of columns or
block, exactly as in transformers' `Fp8Dequantize` and compressed-tensors' `dequantize`. Formats
that pack several numbers into one, or rotate the weights by a matrix, are refused.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alpaca.errors import UserError
from alpaca.stored import CONVERTIBLE, PLAIN, check_config, quantization

FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
NUMBERS = (torch.float8_e4m3fn, torch.int8)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Scales of activations and of the key-value cache; plain weights do not need them.
DROPPED = (
    ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".k_scale",
    ".v_scale", ".q_scale",
)  # fmt: skip

Read = Callable[[torch.dtype], torch.Tensor]


def settings(raw: dict[str, Any], where: Path) -> dict[str, Any] | None:
    """Remove the quantization settings from a config.json and return them; None if there are none.

    Raises:
        UserError: the quantization is of an unsupported kind.
    """
    method = quantization(raw)
    if method is None:
        return None
    if not method.endswith(CONVERTIBLE):
        check_config(raw, where)  # raises the same refusal as the other programs
    found = raw.pop("quantization_config", None) or raw.pop("compression_config", None)
    kind = found.get("quant_method") if isinstance(found, dict) else None
    groups = (found.get("config_groups") or {}) if isinstance(found, dict) else {}
    formats = {found.get("format"), *(group.get("format") for group in groups.values())} - {None}
    other = [name for name in ("sparsity_config", "transform_config") if _filled(found.get(name))]
    wrong = formats - set(FORMATS) if kind == "compressed-tensors" else set()
    if kind not in CONVERTIBLE or wrong or other:
        what = ", ".join([*sorted(wrong), *other]) or method
        raise UserError(
            f"{where} describes quantized weights ({what}), which cannot be dequantized here.",
            PLAIN,
        )
    return dict(found)


def _filled(value: Any) -> bool:
    return bool(value) and value.get("format", "") != "dense"


def readers(
    tensors: Mapping[str, torch.Tensor], config: dict[str, Any], folder: Path
) -> dict[str, Read]:
    """For each quantized weight of a folder, by name, a function that dequantizes it.

    `config` holds the folder's quantization settings.

    Raises:
        UserError: a weight has no scale, or a scale of the wrong shape.
    """
    made: dict[str, Read] = {}
    for name, weight in tensors.items():
        if weight.dtype not in NUMBERS or not name.endswith("weight"):
            continue
        scale = tensors.get(f"{name}_scale", tensors.get(f"{name}_scale_inv"))
        zero = tensors.get(f"{name}_zero_point")
        if scale is None or scale.dtype not in FLOATS or weight.dim() != 2:
            raise UserError(
                f"{folder}: the quantized {name} has no scale in fp32, bf16 or fp16.", PLAIN
            )
        block = _block(weight.shape, scale, config)
        if block is None or (zero is not None and zero.shape != scale.shape):
            raise UserError(
                f"{folder}: the scale of {name}, {list(scale.shape)}, does not fit its shape, "
                f"{list(weight.shape)}.",
                PLAIN,
            )
        made[name] = partial(dequantized, weight, scale, zero, block)
    return made


def is_scale(name: str) -> bool:
    """Whether a tensor is a scale or zero point, of weights, activations or the key-value cache."""
    return name.endswith((".weight_scale", ".weight_scale_inv", ".weight_zero_point", *DROPPED))


def _block(
    shape: torch.Size, scale: torch.Tensor, config: dict[str, Any]
) -> tuple[int, int] | None:
    """Rows and columns that share one scale; None if the scale does not fit the weight."""
    rows, columns = shape
    down, across = _grid(scale).shape
    groups = (config.get("config_groups") or {}).values()
    sizes = [config.get("weight_block_size")]
    sizes += [(group.get("weights") or {}).get("block_structure") for group in groups]
    for size in sizes:
        if size and (-(-rows // size[0]), -(-columns // size[1])) == (down, across):
            return int(size[0]), int(size[1])
    return None if rows % down or columns % across else (rows // down, columns // across)


def _grid(scale: torch.Tensor) -> torch.Tensor:
    """Scales as a matrix: (1, 1) for one per tensor, (rows, 1) for one per row, or a grid."""
    return scale if scale.dim() == 2 else scale.reshape(-1, 1)


def dequantized(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    block: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Plain numbers, (rows, columns); each product is rounded to fp32, then once to `dtype`."""

    def spread(grid: torch.Tensor) -> torch.Tensor:
        wide = _grid(grid).float().repeat_interleave(block[1], 1)[:, : weight.shape[1]]
        return wide.repeat_interleave(block[0], 0)[: weight.shape[0]]

    numbers = weight.float()
    if zero is not None:
        numbers -= spread(zero)
    return (numbers * spread(scale)).to(dtype).contiguous()
