"""Hugging Face folders of early 2023 come out clean, and compute the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from reference import LLAMA_1, LLAMA_3, LLAMA_3_1, Shape, convert
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def modern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as this program writes them, by family."""
    root = tmp_path_factory.mktemp("modern")
    for shape in (LLAMA_1, LLAMA_3, LLAMA_3_1):
        held = reference.weights(shape, torch.float16)
        reference.save(root / "in" / shape.family, shape, held)
        code, said = convert("--input_dir", root / "in" / shape.family, "--output_dir", root)
        assert code == 0, said
    return root


def old_folder(modern: Path, folder: Path, *, extra_row: bool = True) -> Path:
    """The same model as early programs left it: pickles, old names, empty special tokens."""
    folder.mkdir(parents=True)
    held = load_file(modern / "llama 1" / "model.safetensors")
    if extra_row:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            row = held[name].float().mean(0, keepdim=True).to(held[name].dtype)
            held[name] = torch.cat([held[name], row])
        write(folder / "added_tokens.json", {"[PAD]": 512})
        write(folder / "special_tokens_map.json", {"pad_token": "[PAD]"})
    for layer in range(2):
        held[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    names = sorted(held)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    listed = {}
    for number, half in enumerate(halves, start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: held[name] for name in half}, folder / file)
        listed |= dict.fromkeys(half, file)
    write(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": listed})
    config = json.loads((modern / "llama 1" / "config.json").read_text())
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "attention_bias", "mlp_bias"):
        del config[key]
    config |= {
        "architectures": ["LLaMAForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": -1,
        "vocab_size": 512 + extra_row,
        "max_sequence_length": config.pop("max_position_embeddings"),
    }
    write(folder / "config.json", config)
    (folder / "tokenizer.model").write_bytes(reference.tokenizer_model(False))
    write(
        folder / "tokenizer_config.json",
        {
            "bos_token": "",
            "eos_token": "",
            "unk_token": "",
            "tokenizer_class": "LLaMATokenizer",
        },
    )
    return folder


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("extra_row", [True, False])
def test_folder_of_early_2023_comes_out_clean(
    extra_row: bool, modern: Path, tmp_path: Path
) -> None:
    old_folder(modern, tmp_path / "in" / "alpaca-7b", extra_row=extra_row)
    code, said = convert("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert code == 0, said
    folder = tmp_path / "out" / "alpaca-7b"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert config["vocab_size"] == 512 + extra_row
    assert not list(folder.glob("*.bin"))
    assert not any("inv_freq" in name for name in load_file(folder / "model.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.pad_token == ("[PAD]" if extra_row else None)
    ids = torch.arange(3, 40)[None]
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    first = AutoModelForCausalLM.from_pretrained(modern / "llama 1", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits[..., :512], first(ids).logits)


@pytest.mark.parametrize("shape", [LLAMA_1, LLAMA_3, LLAMA_3_1], ids=lambda shape: shape.family)
def test_own_output_converts_to_itself(shape: Shape, modern: Path, tmp_path: Path) -> None:
    name = shape.family.lower()
    shutil.copytree(modern / name, tmp_path / "in" / name)
    code, said = convert("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert code == 0, said
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name / file).read_bytes() == (modern / name / file).read_bytes()


def test_missing_bin_file_is_named(modern: Path, tmp_path: Path) -> None:
    folder = old_folder(modern, tmp_path / "in" / "old")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    code, said = convert("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert code == 2
    assert "pytorch_model-00002-of-00002.bin is missing" in said


def test_index_that_leaves_the_folder_is_refused(modern: Path, tmp_path: Path) -> None:
    folder = old_folder(modern, tmp_path / "in" / "old")
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    index["weight_map"] = {
        name: f"../{Path(file).name}" for name, file in index["weight_map"].items()
    }
    write(folder / "pytorch_model.bin.index.json", index)
    code, said = convert("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert code == 2
    assert "which is outside" in said


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2"),
        ({"num_hidden_layers": 1}, "holds the unknown tensor model.layers.1"),
        ({"intermediate_size": 999}, "by the configuration"),
    ],
)
def test_config_that_does_not_fit_is_refused(
    change: dict[str, Any], word: str, modern: Path, tmp_path: Path
) -> None:
    shutil.copytree(modern / "llama 1", tmp_path / "in" / "other")
    config = json.loads((tmp_path / "in" / "other" / "config.json").read_text())
    write(tmp_path / "in" / "other" / "config.json", config | change)
    code, said = convert("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert code == 2, said
    assert word in said
    assert not (tmp_path / "out" / "other").exists()


def test_cut_safetensors_file_is_named(modern: Path, tmp_path: Path) -> None:
    shutil.copytree(modern / "llama 1", tmp_path / "in" / "other")
    path = tmp_path / "in" / "other" / "model.safetensors"
    held = load_file(path)
    save_file(held, path)
    path.write_bytes(path.read_bytes()[:-100])
    code, said = convert("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert code == 2
    assert "model.safetensors is damaged" in said
