"""Meta checkpoints of every family become folders in which transformers computes the same."""

import json
from pathlib import Path

import pytest
import reference
import torch
from reference import LLAMA_1, LLAMA_2, LLAMA_2_GQA, LLAMA_3, LLAMA_3_1, LLAMA_3_2, Shape, convert
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alpaca.convert.expected import shapes
from alpaca.convert.families import PUBLISHED, Published
from alpaca.folder import load_tokenizer

FAMILIES = {
    "llama-1": LLAMA_1,
    "llama-2": LLAMA_2,
    "llama-2-gqa": LLAMA_2_GQA,
    "llama-3": LLAMA_3,
    "llama-3.1": LLAMA_3_1,
    "llama-3.2": LLAMA_3_2,
}

SCALING = {
    "rope_type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
}


def only_folder(output: Path) -> Path:
    (found,) = [path for path in output.iterdir() if path.name != "tokenizer"]
    assert not found.name.startswith("."), f"{found} was left behind"
    return found


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_converted_folder_gives_the_logits_of_the_reference(
    name: str, shards: int, tmp_path: Path
) -> None:
    shape = FAMILIES[name]
    held = reference.weights(shape, torch.float32)
    reference.save(tmp_path / "in" / name, shape, held, shards)
    code, said = convert("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert code == 0, said
    assert f"{shape.family} " in said
    assert f"{shards} shard" in said
    model = AutoModelForCausalLM.from_pretrained(only_folder(tmp_path / "out"))
    assert model.config.tie_word_embeddings == shape.tied
    written = json.loads((only_folder(tmp_path / "out") / "config.json").read_text())
    if shape.scaled:
        assert set(written["rope_scaling"]) == SCALING, "transformers 4 knows these and no other"
    else:
        assert "rope_scaling" not in written
    ids = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids).logits
    theirs = reference.logits(shape, held, ids)
    assert theirs.std() > 0.1, "a reference that says nothing proves nothing"
    assert (ours - theirs).abs().max() < 1e-5


def test_untied_copy_of_the_embedding_is_tied_as_in_llama_3_2(tmp_path: Path) -> None:
    held = reference.weights(LLAMA_3_2, torch.bfloat16)
    held["output.weight"] = held["tok_embeddings.weight"].clone()
    reference.save(tmp_path / "in" / "1B", LLAMA_3_2, held)
    code, said = convert("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert code == 0, said
    folder = tmp_path / "out" / "llama-1b"
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("option", "dtype"),
    [
        ("keep", torch.float16),
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("fp32", torch.float32),
    ],
)
def test_dtype_is_the_one_asked_for(option: str, dtype: torch.dtype, tmp_path: Path) -> None:
    held = reference.weights(LLAMA_1, torch.float16)
    reference.save(tmp_path / "7B", LLAMA_1, held)
    code, said = convert(
        "--input_dir", tmp_path / "7B", "--output_dir", tmp_path / "out", "--dtype", option
    )
    assert code == 0, said
    written = load_file(tmp_path / "out" / "llama-7b" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    assert torch.equal(written["lm_head.weight"], held["output.weight"].to(dtype))


def test_numbers_too_large_for_fp16_are_refused(tmp_path: Path) -> None:
    held = reference.weights(LLAMA_2, torch.bfloat16)
    held["norm.weight"][3] = 1e6
    reference.save(tmp_path / "7B", LLAMA_2, held)
    arguments = ("--input_dir", tmp_path / "7B", "--output_dir", tmp_path / "out")
    code, said = convert(*arguments, "--dtype", "fp16")
    assert code == 2
    assert "model.norm.weight holds numbers too large for fp16" in said
    assert not (tmp_path / "out" / "llama-7b").exists()


def test_the_command_line_of_2023_leaves_the_folders_of_2023(tmp_path: Path) -> None:
    folder = reference.save(
        tmp_path / "in" / "7B", LLAMA_1, reference.weights(LLAMA_1, torch.float16)
    )
    (folder / "tokenizer.model").rename(tmp_path / "in" / "tokenizer.model")
    code, said = convert(
        "--input_dir", tmp_path / "in", "--model_size", "7B", "--output_dir", tmp_path / "out"
    )
    assert code == 0, said
    assert (tmp_path / "out" / "llama-7b" / "config.json").is_file()
    ids = load_tokenizer(tmp_path / "out" / "tokenizer")("def f(x):").input_ids
    assert len(ids) > 3
    assert ids == load_tokenizer(tmp_path / "out" / "llama-7b")("def f(x):").input_ids


def meta_params(model: Published) -> dict[str, float]:
    """What Meta's params.json says of a published model, as far as widths go."""
    plain = model.family in ("LLaMA 1", "Llama 2") and model.kv_heads == model.heads
    multiple = {4096: 1024, 8192: 4096, 16384: 4096}.get(model.dim, 256)
    multiplier = {4096: 1.3, 8192: 1.3, 16384: 1.2, 2048: 1.5}.get(model.dim, 1.0)
    return (
        {"multiple_of": 256}
        if plain
        else {
            "multiple_of": multiple,
            "ffn_dim_multiplier": multiplier,
        }
    )


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: f"{model.family} {model.size}")
def test_published_shapes_have_exactly_the_published_number_of_parameters(
    model: Published, tmp_path: Path
) -> None:
    from alpaca.convert.params import config, read_params, recognize

    path = tmp_path / "params.json"
    path.write_text(
        json.dumps(
            {
                "dim": model.dim,
                "n_layers": model.layers,
                "n_heads": model.heads,
                "n_kv_heads": model.kv_heads,
                "norm_eps": model.norm_eps,
                "use_scaled_rope": model.rope_factor is not None,
                **meta_params(model),
            }
        )
    )
    params = read_params(path)
    family, found = recognize(params, model.tokenizer, f"{model.family} {model.size}")
    assert (family, found) == (model.family, model)
    vocab = 128256 if model.tokenizer == "tiktoken" else 32000
    settings = config(params, family, model.tokenizer, vocab, model.tied)
    assert settings["intermediate_size"] == model.intermediate
    if model.rope_factor is not None:
        assert settings["rope_scaling"]["factor"] == model.rope_factor
    count = sum(torch.Size(shape).numel() for shape in shapes(settings).values())
    assert count == model.parameters
    ours = expected_by_names(params, vocab, model.tied)
    assert ours == shapes(settings)


def expected_by_names(params: object, vocab: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """The shapes that the name table of the conversion makes of the same file."""
    from alpaca.convert import names
    from alpaca.convert.meta import whole_shape

    rows = names.rows(params.layers, tied)  # type: ignore[attr-defined]
    return {name: whole_shape(row, params, vocab) for name, row in rows.items()}  # type: ignore[arg-type]


def test_no_two_tensors_have_one_name() -> None:
    from alpaca.convert import names

    for dialect in ("meta", "gguf"):
        there = names.to_dialect(80, False, dialect)  # type: ignore[arg-type]
        assert len(there) == 80 * 9 + 3
        assert len(set(there.values())) == len(there)


def test_instruct_models_stop_at_the_end_of_a_turn(tmp_path: Path) -> None:
    held = reference.weights(LLAMA_3, torch.bfloat16)
    for name, stops in (("Llama-3-Tiny", [289]), ("Llama-3-Tiny-Instruct", [297, 296, 289])):
        reference.save(tmp_path / "in" / name, LLAMA_3, held)
        code, said = convert(
            "--input_dir", tmp_path / "in", "--model_size", name, "--output_dir", tmp_path / "out"
        )
        assert code == 0, said
        folder = tmp_path / "out" / name.lower()
        eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert ([eos] if isinstance(eos, int) else eos) == stops
        assert shape_of(LLAMA_3, folder)


def shape_of(shape: Shape, folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text())
    return bool(config["rope_theta"] == shape.theta and config["vocab_size"] == 544)
