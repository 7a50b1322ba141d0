"""Quantized folders convert to the numbers that they stand for, or are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import Tensors, copied, save, tensors, transformers_loss
from reference import convert
from safetensors.torch import load_file

from alpaca.errors import UserError
from alpaca.folder import check_folder

FP8 = torch.float8_e4m3fn


def quantized(name: str, weight: torch.Tensor, kind: str) -> tuple[Tensors, torch.Tensor]:
    """What a program of this kind stores of a weight, and the numbers that stands for, in fp32."""
    rows, columns = weight.shape
    if kind == "tensor":
        scale = (weight.abs().max() / 448).reshape(1)
        stored = (weight / scale).to(FP8)
        return {name: stored, f"{name}_scale": scale}, stored.float() * scale
    if kind == "row":
        scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
        stored = (weight / scale.float()).to(FP8)
        return {name: stored, f"{name}_scale": scale}, stored.float() * scale.float()
    if kind == "int8":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scale = (high - low) / 255
        zero = (-128 - low / scale).round().to(torch.int8)
        stored = (weight / scale + zero).round().clamp(-128, 127).to(torch.int8)
        made = {name: stored, f"{name}_scale": scale, f"{name}_zero_point": zero}
        return made, (stored.float() - zero.float()) * scale
    assert kind == "block"  # of 48 x 40, which does not divide the shape
    scale = torch.empty(-(-rows // 48), -(-columns // 40))
    stored, real = torch.empty_like(weight).to(FP8), torch.empty_like(weight)
    for down in range(scale.shape[0]):
        for across in range(scale.shape[1]):
            part = slice(down * 48, down * 48 + 48), slice(across * 40, across * 40 + 40)
            scale[down, across] = weight[part].abs().max() / 448
            stored[part] = (weight[part] / scale[down, across]).to(FP8)
            real[part] = stored[part].float() * scale[down, across]
    return {name: stored, f"{name}_scale_inv": scale}, real


CONFIGS: dict[str, dict[str, Any]] = {
    "tensor": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "row": {"quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"strategy": "channel", "num_bits": 8}}}},
    "int8": {"quant_method": "compressed-tensors", "format": "int-quantized"},
    "block": {"quant_method": "fp8", "weight_block_size": [48, 40]},
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_quantized_folder_converts_to_the_numbers_it_stands_for(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_model, tmp_path / "in" / "model", quantization_config=CONFIGS[kind])
    real = tensors(folder)
    held = {name: tensor.bfloat16() for name, tensor in real.items()}
    real = {name: tensor.float() for name, tensor in held.items()}
    for name in [name for name in real if name.endswith("_proj.weight")]:
        made, real[name] = quantized(name, tensors(folder)[name], kind)
        held |= made
    held["model.layers.0.self_attn.q_proj.input_scale"] = torch.ones(1)
    save(folder, held)
    with pytest.raises(UserError, match=f"alpaca convert --input_dir {folder}"):
        check_folder(folder)  # before training, planning and serving
    for dtype, torch_dtype in (("fp32", torch.float32), ("keep", torch.bfloat16)):
        code, said = convert(
            "--input_dir", folder, "--output_dir", tmp_path / dtype, "--dtype", dtype
        )
        assert code == 0, said
        assert "from 14 quantized tensors and their scales" in said
        written = load_file(tmp_path / dtype / "model/model.safetensors")
        assert written.keys() == real.keys()
        for name, tensor in real.items():
            assert torch.equal(written[name], tensor.to(torch_dtype)), name
        config = json.loads((tmp_path / dtype / "model/config.json").read_text())
        assert "quantization_config" not in config
    plain = save(copied(tiny_model, tmp_path / "plain"), real)
    assert transformers_loss(tmp_path / "fp32/model", tmp_path) == transformers_loss(
        plain, tmp_path
    )


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization_config: gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "pack-quantized"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized",
          "transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized",
          "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ],
)  # fmt: skip
def test_other_quantizations_are_refused_by_name(
    config: dict[str, Any], told: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_model, tmp_path / "in" / "model", quantization_config=config)
    code, said = convert("--input_dir", folder, "--output_dir", tmp_path / "out")
    assert code == 2
    assert told in said
    assert "Use the folder it was quantized from" in said


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        (None, "has no scale"),
        (torch.ones(3), "does not fit its shape"),
        (torch.ones(1, dtype=torch.uint8), "has no scale in fp32, bf16 or fp16"),
    ],
)
def test_a_scale_that_is_missing_or_of_another_shape_is_refused(
    scale: torch.Tensor | None, told: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_model, tmp_path / "in" / "model", quantization_config=CONFIGS["tensor"])
    name = "model.layers.1.mlp.down_proj.weight"
    held = tensors(folder)
    made, _ = quantized(name, held[name], "tensor")
    del made[f"{name}_scale"]
    made |= {} if scale is None else {f"{name}_scale": scale}
    save(folder, held | made)
    code, said = convert("--input_dir", folder, "--output_dir", tmp_path / "out")
    assert code == 2
    assert told in said
