"""Exported GGUF files: read back by our converter they are the folder, tensor for tensor."""

import json
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import reference
import torch
from model_folders import copied, save, tensors
from reference import LLAMA_1, LLAMA_2_GQA, LLAMA_3_1, LLAMA_3_2, Shape, convert
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from alpaca import passport
from alpaca.cli import main
from alpaca.folder import load_tokenizer
from alpaca.tokens import Codec

TEXTS = ["def f(x):\n\treturn x", "  รามาเกียรติ์ 🙂", "1234 apples, 5.5%", "</s> It's <s>", "", "é"]


def export(folder: Path, output: Path, *flags: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(folder), "-o", str(output), "--to", "gguf", *map(str, flags)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def back(path: Path, scratch: Path) -> Path:
    """The folder that our converter makes of a GGUF file."""
    source = scratch / "in" / "tiny"
    source.mkdir(parents=True)
    shutil.copy(path, source / path.name)
    code, said = convert("--input_dir", scratch / "in", "--output_dir", scratch / "back")
    assert code == 0, said
    return scratch / "back" / "tiny"


def converted(shape: Shape, scratch: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model folder from Meta's files of a shape."""
    reference.save(scratch / "meta" / "7B", shape, reference.weights(shape, dtype))
    code, said = convert(
        "--input_dir", scratch / "meta", "--output_dir", scratch / "hf", "--no-tokenizer"
    )
    assert code == 0, said
    (folder,) = (scratch / "hf").iterdir()
    return folder


def same_tokens(one: Path, other: Path) -> None:
    ours, theirs = (Codec(load_tokenizer(folder)) for folder in (one, other))
    assert ours.prompts(TEXTS) == theirs.prompts(TEXTS)
    assert ours.answers(TEXTS) == theirs.answers(TEXTS)
    assert (ours.bos, ours.eos) == (theirs.bos, theirs.eos)


@pytest.mark.parametrize(
    ("shape", "kind", "dtype"),
    [
        (LLAMA_1, "F16", torch.float16),
        (LLAMA_2_GQA, "BF16", torch.bfloat16),
        (LLAMA_3_1, "BF16", torch.bfloat16),
        (LLAMA_3_2, "F32", torch.float32),
    ],
    ids=["LLaMA 1", "Llama 2 GQA", "Llama 3.1", "Llama 3.2"],
)
def test_converted_back_it_is_the_same_model(
    shape: Shape, kind: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = converted(shape, tmp_path, dtype)
    capsys.readouterr()
    assert export(folder, tmp_path / "a.gguf", "--type", kind) == 0
    assert "every number exact" in capsys.readouterr().out
    again = back(tmp_path / "a.gguf", tmp_path)
    ours, theirs = tensors(folder), tensors(again)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].equal(theirs[name]), name
    one, other = (AutoConfig.from_pretrained(path).to_dict() for path in (folder, again))
    assert one | {"_name_or_path": ""} == other | {"_name_or_path": ""}
    same_tokens(folder, again)


def test_without_the_sentencepiece_file_scores_follow_from_the_merges(tmp_path: Path) -> None:
    folder = converted(LLAMA_1, tmp_path)
    assert (folder / "tokenizer.model").is_file()
    bare = copied(folder, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    assert export(bare, tmp_path / "a.gguf") == 0
    same_tokens(folder, back(tmp_path / "a.gguf", tmp_path))


def test_the_trained_template_and_where_it_is_from_go_along(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_model, tmp_path / "tiny")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages[0]['content'] }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    recorded = passport.write(folder, made_by="train", base={"folder": "llama-7b"})
    assert export(folder, tmp_path / "a.gguf") == 0
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    held = {key: field.contents() for key, field in fields.items() if "." in key[:-1]}
    assert held["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"
    assert held["alpaca.passport"] == recorded["seal"]
    assert held["alpaca.made_by"] == "train"
    assert held["general.base_model.0.name"] == "llama-7b"
    assert held["tokenizer.ggml.add_bos_token"] is False
    assert held["tokenizer.ggml.pre"] == "gpt-2"
    assert stat.S_IMODE(os.stat(tmp_path / "a.gguf").st_mode) == 0o644


def of_kind(kind: str, bpe: PreTrainedTokenizerBase, folder: Path, **changed: Any) -> Path:
    torch.manual_seed(1)
    config = CONFIG_MAPPING[kind](
        vocab_size=len(bpe),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        **changed,
    )
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    bpe.save_pretrained(folder)
    return folder


def values(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_every_tensor_of_other_families_is_there_once(
    kind: str, bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = of_kind(kind, bpe, tmp_path / kind, head_dim=16)
    assert export(folder, tmp_path / "a.gguf") == 0
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    held = tensors(folder)
    assert len(read) == len(held)
    assert values(read["blk.1.ffn_down.weight"]).equal(
        held["model.layers.1.mlp.down_proj.weight"].float()
    )
    theirs = values(read["blk.1.attn_q.weight"])
    ours = held["model.layers.1.self_attn.q_proj.weight"].float()
    assert theirs.equal(ours) is not (kind == "mistral")  # its rows are in Meta's order
    assert theirs.sort(0).values.equal(ours.sort(0).values)
    assert ("blk.0.attn_q.bias" in read) is (kind == "qwen2")
    assert ("blk.0.attn_q_norm.weight" in read) is (kind == "qwen3")


@pytest.mark.parametrize(
    ("kind", "most"),
    [("Q8_0", 0.01), ("Q5_1", 0.06), ("Q5_0", 0.06), ("Q4_1", 0.12), ("Q4_0", 0.12)],
)
def test_quantized_numbers_are_as_far_away_as_it_says(
    kind: str, most: float, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tiny_model, tmp_path / "a.gguf", "--type", kind) == 0
    told = capsys.readouterr().out
    again = tensors(back(tmp_path / "a.gguf", tmp_path))
    held = {name: value.float() for name, value in tensors(tiny_model).items() if value.ndim > 1}
    squares = sum(float((held[name] - again[name].float()).square().sum()) for name in held)
    found = (squares / sum(float(value.square().sum()) for value in held.values())) ** 0.5
    assert 0 < found < most
    said = float(told.partition("rounded by ")[2].partition("%")[0]) / 100
    assert said == pytest.approx(found, rel=0.1)  # reading it back rounds to bf16
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert types["blk.0.ffn_up.weight"] == kind
    assert types["output.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32"


def test_numbers_too_large_for_fp16_are_refused_and_nothing_stays(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tiny_model, tmp_path / "tiny")
    held = tensors(folder)
    held["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save(folder, held)
    assert export(folder, tmp_path / "a.gguf", "--type", "F16") == 2
    assert "too large for fp16" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_what_llama_cpp_would_compute_or_split_otherwise_is_refused(
    bpe: PreTrainedTokenizerBase,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = of_kind("olmo2", bpe, tmp_path / "olmo2")
    assert export(other, tmp_path / "a.gguf") == 2
    assert "olmo2" in capsys.readouterr().err
    folder = copied(tiny_model, tmp_path / "tiny")
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    assert export(folder, tmp_path / "a.gguf") == 2
    assert "splits texts into words in a way that has no name here" in capsys.readouterr().err
    assert not (tmp_path / "a.gguf").exists()


def test_what_is_there_is_replaced_only_when_asked(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.gguf").write_text("mine")
    assert export(tiny_model, tmp_path / "a.gguf") == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert (tmp_path / "a.gguf").read_text() == "mine"
    assert export(tiny_model, tmp_path / "a.gguf", "--type", "Q7_0") == 2
    assert export(tiny_model, tmp_path / "a.gguf", "--force", "--type", "Q3") == 2
    assert "--type Q3 is not known" in capsys.readouterr().err


def test_k_quants_are_made_by_llama_quantize(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Here by a program of that name, which gets a whole bf16 file and may fail."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert export(tiny_model, tmp_path / "a.gguf", "--type", "Q4_K_M") == 2
    assert "llama-quantize, which is not on PATH" in capsys.readouterr().err
    program = tmp_path / "llama-quantize"
    program.write_text(
        f"#!{sys.executable}\nimport shutil, sys\nassert sys.argv[3] == 'Q4_K_M'\n"
        "shutil.copy(sys.argv[1], sys.argv[2])\n"
    )
    program.chmod(0o755)
    assert export(tiny_model, tmp_path / "a.gguf", "--type", "Q4_K_M") == 0
    assert gguf.GGUFReader(tmp_path / "a.gguf").tensors
    program.write_text(f"#!{sys.executable}\nraise SystemExit('no such type')\n")
    assert export(tiny_model, tmp_path / "b.gguf", "--type", "Q4_K_M") == 2
    assert "llama-quantize failed: no such type" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "llama-quantize"]


def test_llama_3s_words_are_recognized(tmp_path: Path) -> None:
    folder = converted(LLAMA_3_1, tmp_path)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() > 0
    assert export(folder, tmp_path / "a.gguf") == 0
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "llama-bpe"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
