"""GGUF files: the default model equals transformers' own reading, tiny ones the reference."""

import random
import struct
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest
import reference
import torch
from reference import LLAMA_1, LLAMA_2_GQA, LLAMA_3_1, LLAMA_3_2, Shape, convert
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alpaca.convert import download, names
from alpaca.convert.expected import check_fit
from alpaca.convert.gguf import open_gguf
from alpaca.convert.ggufmeta import llama3_factors
from alpaca.convert.params import llama3_scaling
from alpaca.errors import UserError
from alpaca.prompt import render
from alpaca.tokens import Codec

ROOT = Path(__file__).resolve().parent.parent
Kind = gguf.GGMLQuantizationType


def write_gguf(path: Path, shape: Shape, held: dict[str, torch.Tensor], kind: Kind) -> None:
    """A GGUF file as llama.cpp's converter writes it; Meta's channel order is GGUF's too."""
    path.parent.mkdir(parents=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(shape.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.dim)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_freq_base(shape.theta or 10000.0)
    add_tokenizer(writer, shape)
    to_meta = names.to_dialect(shape.layers, shape.tied, "meta")
    to_hf = {meta: name for name, meta in to_meta.items()}
    to_gguf = names.to_dialect(shape.layers, shape.tied, "gguf")
    for name, tensor in held.items():
        values = tensor.float().numpy()
        own = Kind.F32 if tensor.ndim == 1 else kind
        writer.add_tensor(to_gguf[to_hf[name]], gguf.quantize(values, own), raw_dtype=own)
    if shape.scaled:
        factors = llama3_factors(llama3_scaling(8.0), shape.theta or 0, shape.head_dim)
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, shape: Shape) -> None:
    if shape.tiktoken:
        tokens = [chr(0x100 + index) for index in range(shape.vocab)]
        tokens[2] = tokens[0] + tokens[1]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * (shape.vocab - 2) + [3, 3])
        writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
        writer.add_bos_token_id(shape.vocab - 2)
        writer.add_eos_token_id(shape.vocab - 1)
        return
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(reference.tokenizer_model(False))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.piece for piece in model.pieces])
    writer.add_token_scores([piece.score for piece in model.pieces])
    writer.add_token_types([piece.type for piece in model.pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        (LLAMA_1, Kind.F32),
        (LLAMA_1, Kind.F16),
        (LLAMA_2_GQA, Kind.BF16),
        (LLAMA_2_GQA, Kind.Q8_0),
        (LLAMA_3_1, Kind.Q4_0),
        (LLAMA_3_1, Kind.Q5_1),
        (LLAMA_3_2, Kind.F32),
    ],
    ids=lambda value: value.family if isinstance(value, Shape) else value.name,
)
def test_tiny_gguf_gives_the_logits_of_the_reference(
    shape: Shape, kind: Kind, tmp_path: Path
) -> None:
    if shape is LLAMA_3_2:
        shape = replace(shape, scaled=False)
    held = reference.weights(shape, torch.float32)
    write_gguf(tmp_path / "in" / "tiny" / "tiny.gguf", shape, held, kind)
    code, said = convert(
        "--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out", "--dtype", "fp32"
    )
    assert code == 0, said
    dequantized = {
        name: torch.from_numpy(gguf.dequantize(gguf.quantize(value.numpy(), kind), kind).copy())
        if value.ndim > 1
        else value
        for name, value in held.items()
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "tiny")
    ids = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids).logits
    theirs = reference.logits(shape, dequantized, ids)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-5


def test_sentencepiece_in_gguf_encodes_like_the_original(tmp_path: Path) -> None:
    import sentencepiece

    held = reference.weights(LLAMA_1, torch.float32)
    write_gguf(tmp_path / "in" / "tiny" / "tiny.gguf", LLAMA_1, held, Kind.F16)
    code, said = convert("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert code == 0, said
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out" / "tiny")
    original = sentencepiece.SentencePieceProcessor(model_proto=reference.tokenizer_model(False))
    for text in ["def f(x):", "  รามาเกียรติ์ 🙂", render("Add.", "1")]:
        assert loaded(text).input_ids == [1, *original.encode(text)]


@pytest.mark.parametrize("cut", [100, 5000, -1000, -1])
def test_cut_gguf_is_named(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "in" / "tiny" / "tiny.gguf"
    write_gguf(path, LLAMA_1, reference.weights(LLAMA_1, torch.float32), Kind.F16)
    path.write_bytes(path.read_bytes()[:cut])
    code, said = convert("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert code == 2, said
    assert "tiny.gguf" in said
    assert not (tmp_path / "out" / "tiny").exists()


def test_default_model_equals_transformers_reading_rounded_to_bf16(smollm: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        ROOT / "demo" / "smollm2-135m",
        gguf_file=Path(download.MEMBER).name,
        dtype=torch.float32,
    )
    ours = load_file(smollm / "model.safetensors")
    wanted = {
        name: value for name, value in theirs.state_dict().items() if name != "lm_head.weight"
    }
    assert set(ours) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(ours[name], value.to(torch.bfloat16)), name
    config = AutoConfig.from_pretrained(smollm)
    for key in (
        "hidden_size",
        "num_key_value_heads",
        "max_position_embeddings",
        "vocab_size",
        "tie_word_embeddings",
        "rope_parameters",
    ):
        assert getattr(config, key) == getattr(theirs.config, key), key
    assert config.rms_norm_eps == 1e-5, "stored as fp32, meant as 1e-5"


def test_default_tokenizer_has_the_right_ends_and_gives_text_back(smollm: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(smollm)
    codec = Codec(loaded)
    assert (loaded.eos_token, codec.eos, codec.bos) == ("<|im_end|>", 2, None)
    assert loaded.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    ) == render("Hi")
    for text in ["  a\n\tรามาเกียรติ์ 🙂\x00", "2026-11-23", "x = [1, 2]\r\n"]:
        assert loaded.decode(loaded(text).input_ids) == text
    assert len(loaded("2026").input_ids) == 4, "digits are tokens of their own"


@pytest.mark.parametrize("value", [0, 3, 2**31, 10**6])
@pytest.mark.parametrize(
    "key",
    ["block_count", "embedding_length", "attention.head_count", "attention.head_count_kv"],
)
def test_a_number_that_cannot_be_is_refused_by_its_name(
    key: str, value: int, tmp_path: Path
) -> None:
    path = tmp_path / "in" / "tiny" / "tiny.gguf"
    write_gguf(path, LLAMA_1, reference.weights(LLAMA_1, torch.float32), Kind.F16)
    content = path.read_bytes()
    name = f"llama.{key}".encode()
    at = content.index(name) + len(name) + 4  # the type of the value is before it
    path.write_bytes(content[:at] + struct.pack("<I", value) + content[at + 4 :])
    with pytest.raises(UserError) as caught:
        check_fit(open_gguf([path], "tiny"))
    if value in (0, 2**31):  # the others may be another model's, and disagree with the weights
        assert f"llama.{key} cannot be {value}" in caught.value.happened


ODD = [0, 1, 3, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1]


def mutated(content: bytes, size: int, choose: random.Random) -> bytes:
    """Some bytes among the first `size` replaced, removed or inserted."""
    changed = bytearray(content)
    for _ in range(choose.choice([1, 1, 1, 2, 4])):
        at = choose.randrange(choose.choice([size, min(size, 400)]))
        odd = choose.choice(ODD)
        how = choose.randrange(5)
        if how == 0:
            changed[at] = choose.randrange(256)
        elif how == 1:
            changed[at : at + 4] = struct.pack("<I", odd & 0xFFFFFFFF)
        elif how == 2:
            changed[at : at + 8] = struct.pack("<Q", odd)
        elif how == 3:
            del changed[at : at + choose.randrange(1, 9)]
        else:
            changed[at:at] = choose.randbytes(choose.randrange(1, 9))
    return bytes(changed)


def outcomes(root: Path, number: int) -> Counter[str]:
    """Open `number` damaged files; anything but a model or a UserError within 5 s is raised."""
    found: Counter[str] = Counter()
    for shape in (LLAMA_1, LLAMA_3_1):
        whole = root / shape.family / "tiny.gguf"
        write_gguf(whole, shape, reference.weights(shape, torch.float32), Kind.F16)
        content, header = whole.read_bytes(), int(gguf.GGUFReader(whole).data_offset)
        for index in range(number // 2):
            damaged = root / "damaged.gguf"
            damaged.write_bytes(mutated(content, header, random.Random(index)))
            began = time.monotonic()
            try:
                check_fit(open_gguf([damaged], "damaged"))
                found["opened"] += 1
            except UserError:
                found["refused"] += 1
            assert time.monotonic() - began < 5, f"{shape.family}, {index}"
    return found


def test_damaged_headers_are_refused_or_harmless(tmp_path: Path) -> None:
    found = outcomes(tmp_path, 100)
    assert found["refused"] > 50


@pytest.mark.slow
def test_ten_thousand_damaged_headers_are_refused_or_harmless(tmp_path: Path) -> None:
    before = psutil.Process().memory_info().rss
    found = outcomes(tmp_path, 10_000)
    assert found["refused"] > 5_000
    assert psutil.Process().memory_info().rss < before + 500e6
