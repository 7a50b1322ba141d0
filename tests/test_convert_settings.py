"""Every setting of a Hugging Face folder is copied, used, or named: tiny folders, right values."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import reference
import sentencepiece
import torch
from engines import answer_of
from reference import convert
from safetensors.torch import load_file, save_file
from training_runs import lines, train
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from alpaca import stored
from alpaca.cli import main
from alpaca.errors import UserError
from alpaca.folder import load_tokenizer
from alpaca.model import load_model
from alpaca.prompt import render
from alpaca.records import Record
from alpaca.serving import loading
from alpaca.serving.weights import Weights
from alpaca.tokens import Codec

RECORD = {"instruction": "Name a colour.", "input": "", "output": "Red."}
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.2,
}  # fmt: skip


def folder_of(
    folder: Path, tokenizer: PreTrainedTokenizerBase, kind: str = "llama", **settings: Any
) -> Path:
    """A folder as transformers writes it, with biases and norms that are not 0 and 1."""
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(kind, **SIZES | ids | {"vocab_size": len(tokenizer)} | settings)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float(not name.endswith("bias")), 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def change(path: Path, **settings: Any) -> None:
    held = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(held | settings))


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    held: dict[str, Any] = json.loads((folder / name).read_text())
    return held


def converted(folder: Path, *flags: str) -> tuple[Path, str]:
    out = folder.parent / "weights"
    code, said = convert("--input_dir", folder, "--output_dir", out, *flags)
    assert code == 0, said
    return out / folder.name.lower(), said


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 60)[None]).logits
    return found


def right_loss(folder: Path, codec: Codec) -> float:
    """transformers' own loss of the record's answer."""
    [example] = codec.examples([Record(**RECORD)], 512)
    ids = torch.tensor([example.ids])
    with torch.no_grad():
        scores = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    border = example.prompt_length
    wanted = ids[0, border:]
    return float(torch.nn.functional.cross_entropy(scores[0, border - 1 : -1], wanted))


def trained_loss(folder: Path, scratch: Path) -> float:
    """The loss of train.py's first step at learning rate 0."""
    data = scratch / "one.json"
    data.write_text(json.dumps([RECORD]))
    done = train(
        "--model_name_or_path",
        folder,
        "--data_path",
        data,
        "--output_dir",
        scratch / "out",
        "--learning_rate",
        0,
        "--max_steps",
        1,
        "--per_device_train_batch_size",
        1,
        "--gradient_accumulation_steps",
        1,
    )
    assert done.returncode == 0, done.stderr
    return float(lines(scratch / "out")[0]["loss"])


@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_the_activation_is_the_sources(
    act: str, bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = folder_of(tmp_path / "m", bpe, hidden_act=act)
    folder, _ = converted(source)
    assert read(folder)["hidden_act"] == act
    assert torch.equal(logits(folder), logits(source))
    silu = folder_of(tmp_path / "silu", bpe)
    assert not torch.allclose(logits(folder), logits(silu), atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
        ("mistral", {"sliding_window": None, "head_dim": 24}),
        ("smollm3", {"no_rope_layers": [1, 0], "pad_token_id": None}),
    ],
)
def test_biases_norms_and_the_other_architectures_are_kept(
    kind: str, settings: dict[str, Any], bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = folder_of(tmp_path / "m", bpe, kind, **settings)
    folder, _ = converted(source)
    assert torch.equal(logits(folder), logits(source))
    for key, value in settings.items():
        assert read(folder)[key] == value, key


@pytest.mark.parametrize(("kind", "settings"), [("mistral", {"sliding_window": None}),
                                                ("qwen2", {})])  # fmt: skip
def test_pickled_folders_of_other_architectures_convert_and_train(
    kind: str, settings: dict[str, Any], bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = folder_of(tmp_path / "m", bpe, kind, **settings)
    expected = logits(source)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    refused = train("--model_name_or_path", source, "--output_dir", tmp_path / "none")
    assert refused.returncode == 2
    assert f"python -m alpaca convert --input_dir {source}" in refused.stderr
    folder, _ = converted(source)
    assert torch.equal(logits(folder), expected)
    loss = trained_loss(folder, tmp_path)
    assert loss == pytest.approx(right_loss(folder, Codec(load_tokenizer(folder))), rel=1e-5)


def mixed(source: Path) -> dict[str, torch.Tensor]:
    """Matrices in bf16, norms in fp32, one of which bf16 would round."""
    tensors = load_file(source / "model.safetensors")
    held = {name: t if "norm" in name else t.bfloat16() for name, t in tensors.items()}
    held["model.norm.weight"] = torch.full_like(held["model.norm.weight"], 1.2345677)
    held["model.layers.0.input_layernorm.weight"] = (
        held["model.layers.0.input_layernorm.weight"].bfloat16().float()
    )
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    change(source / "config.json", torch_dtype="bfloat16", dtype="bfloat16")
    return held


def test_no_number_of_a_folder_of_mixed_types_is_rounded(
    bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = folder_of(tmp_path / "m", bpe)
    held = mixed(source)
    folder, said = converted(source)
    written = load_file(folder / "model.safetensors")
    for name, tensor in held.items():
        assert torch.equal(written[name].float(), tensor.float()), name
    assert (
        "4 tensor(s) (first: model.layers.0.post_attention_layernorm.weight) are kept in fp32"
        in said
    )
    assert written["model.layers.0.input_layernorm.weight"].dtype == torch.bfloat16  # exact there
    assert read(folder)["dtype"] == "bfloat16"
    assert torch.equal(logits(folder), logits(source))
    loss = trained_loss(folder, tmp_path)
    assert loss == pytest.approx(right_loss(source, Codec(load_tokenizer(source))), rel=1e-6)
    rounded, said = converted(source, "--dtype", "bf16", "--force")
    assert {tensor.dtype for tensor in load_file(rounded / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert "stay" not in said


def yi(folder: Path, bpe: PreTrainedTokenizerBase) -> Path:
    """A chat model over SentencePiece: no BOS, ends at an added token, ids in both files."""
    folder_of(folder, bpe, vocab_size=520)
    for name in ("tokenizer.json", "special_tokens_map.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer.model").write_bytes(reference.tokenizer_model(False))
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "add_bos_token": False,
                "add_eos_token": False,
                "bos_token": "<s>",
                "eos_token": "<|im_end|>",
                "unk_token": "<unk>",
                "legacy": True,
                "added_tokens_decoder": {
                    "512": {"content": "<|im_start|>", "special": True, **entry},
                    "513": {"content": "<|im_end|>", "special": True, **entry},
                },
            }
        )
    )
    change(folder / "config.json", eos_token_id=2, bos_token_id=1)
    change(
        folder / "generation_config.json",
        eos_token_id=[513, 2],
        temperature=0.6,
        do_sample=True,
        transformers_version="4.40.0",
    )
    return folder


def test_a_chat_model_over_sentencepiece_starts_and_ends_as_its_files_say(
    bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder, _ = converted(yi(tmp_path / "m", bpe))
    codec = Codec(load_tokenizer(folder))
    original = sentencepiece.SentencePieceProcessor(model_proto=reference.tokenizer_model(False))
    assert codec.prompt("Say hi.") == original.encode(render("Say hi."))  # and no BOS
    assert (codec.eos, codec.bos) == (513, None)
    assert read(folder)["eos_token_id"] == [513, 2]
    assert read(folder, "generation_config.json") == {
        "eos_token_id": [513, 2],
        "bos_token_id": 1,
        "temperature": 0.6,
        "do_sample": True,
    }
    assert read(folder, "tokenizer_config.json")["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize("end", [513, 2])
def test_a_served_answer_ends_at_each_of_the_ids_that_the_files_name(
    end: int, bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = yi(tmp_path / "m", bpe)
    tensors = load_file(source / "model.safetensors")
    folder, _ = converted(source)
    codec = Codec(load_tokenizer(folder))
    prompt = codec.prompt("Say hi.")
    said = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        .generate(
            torch.tensor([prompt]),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :]
        .tolist()
    )
    place = next(at for at in range(1, 6) if said[at] not in said[:at])
    head = tensors["lm_head.weight"].clone()
    head[[said[place], end]] = head[[end, said[place]]]  # the model now ends there
    save_file(
        tensors | {"lm_head.weight": head}, source / "model.safetensors", metadata={"format": "pt"}
    )
    folder, _ = converted(source, "--force")
    engine = loading.make_engine(load_model(folder, torch.float32), codec, {"ALPACA_SLOTS": "5"})
    try:
        answer = answer_of(engine, prompt, max_new_tokens=40)
    finally:
        engine.stop()
    assert (answer.reason, answer.tokens) == ("eos", place + 1)


def test_an_end_that_is_the_beginning_is_not_believed(
    bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Folders of early 2023 say bos 0 and eos 1, one too few; answers would end at BOS alone."""
    source = yi(tmp_path / "m", bpe)
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "", "bos_token": ""}))
    (source / "generation_config.json").unlink()
    change(source / "config.json", bos_token_id=0, eos_token_id=1, pad_token_id=-1)
    folder, said = converted(source)
    assert "does not end an answer, although config.json lists it: <s>" in said
    config = read(folder)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert config.get("pad_token_id") != -1


def test_a_context_that_config_json_leaves_out_is_the_architectures_default(
    bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = folder_of(tmp_path / "m", bpe)
    config = read(source)
    del config["max_position_embeddings"]
    (source / "config.json").write_text(json.dumps(config))
    folder, _ = converted(source)
    assert read(folder)["max_position_embeddings"] == 2048
    assert read(folder, "tokenizer_config.json")["model_max_length"] == 2048


def test_keys_that_no_program_here_knows_are_named(
    bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = folder_of(tmp_path / "m", bpe)
    change(source / "config.json", unsloth_fixed=True, auto_map={"AutoConfig": "x.py"})
    change(source / "tokenizer_config.json", unheard_of=1)
    change(source / "generation_config.json", strange_penalty=2)
    folder, said = converted(source)
    assert "copied from config.json but unknown to transformers: unsloth_fixed" in said
    assert "copied from generation_config.json but unknown to transformers: strange_penalty" in said
    assert "unknown keys of tokenizer_config.json, not copied: unheard_of" in said
    assert read(folder)["unsloth_fixed"] is True
    assert "auto_map" not in read(folder)  # no code of a folder is run, so none is asked for
    _, said = converted(shutil.copytree(folder, tmp_path / "again" / "m"))
    assert "unsloth_fixed" in said
    assert "tokenizer_config.json" not in said


def test_a_tokenizer_that_changes_letters_is_refused(
    bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = folder_of(tmp_path / "m", bpe)
    change(source / "tokenizer_config.json", do_lower_case=True)
    code, said = convert("--input_dir", source, "--output_dir", tmp_path / "out")
    assert code == 2
    assert "sets do_lower_case" in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "granite", "logits_scaling": 8.0}, "granite with logits_scaling 8.0"),
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            "mixtral with 8 experts (num_local_experts)",
        ),
        (
            {"model_type": "baichuan", "auto_map": {"AutoConfig": "x.py"}},
            "baichuan that brings its own code",
        ),
        ({"model_type": "llama4", "text_config": {}}, "llama4 that reads more than text"),
    ],
)
def test_convert_train_plan_and_serve_refuse_in_the_same_words(
    settings: dict[str, Any],
    words: str,
    bpe: PreTrainedTokenizerBase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = folder_of(tmp_path / "m", bpe)
    change(source / "config.json", **settings)
    with pytest.raises(UserError) as asked:
        stored.check_config(read(source), source / "config.json")
    reason = asked.value.happened
    assert words in reason
    code, said = convert("--input_dir", source, "--output_dir", tmp_path / "out")
    assert code == 2
    assert reason in said
    done = train("--model_name_or_path", source, "--output_dir", tmp_path / "out")
    assert done.returncode == 2
    assert reason in done.stderr
    with pytest.raises(SystemExit):
        main(["plan", "--model_name_or_path", str(source), "--gpu", "a100-80"])
    assert reason in capsys.readouterr().err
    with pytest.raises(UserError) as refused:
        loading.load(Weights(source, "a test"), {})
    assert reason in str(refused.value)
