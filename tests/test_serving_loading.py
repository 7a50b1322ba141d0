"""From a folder to an engine: what is refused, what is tuned, what is said."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from engines import answer_of
from http_server import ROOT
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from alpaca import passport
from alpaca.errors import UserError
from alpaca.folder import load_tokenizer
from alpaca.model import load_model
from alpaca.prompt import PREFIXES
from alpaca.serving import cache, command, loading, schema
from alpaca.serving.forward import SlotModel
from alpaca.serving.request import Request, Sampling
from alpaca.serving.weights import Weights
from alpaca.tokens import Codec


def test_it_says_what_was_loaded(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = {"ALPACA_SLOTS": "3", "ALPACA_CONTEXT": "100", "ALPACA_DTYPE": "float32"}
    engine, codec = loading.load(Weights(tiny_model, "a test"), tuned)
    said = capsys.readouterr().out
    assert "taken from a test: LlamaForCausalLM" in said
    assert "float32 on cpu" in said
    assert "3 slots of 100 tokens (300 in all)" in said
    prompt = tuple(codec.prompt("a"))
    job = engine.submit(Request(prompt, total_tokens=900, sampling=Sampling(seed=1)))
    answer = job.completions[0].result.result(60)
    assert answer.reason == "eos" or len(prompt) + answer.tokens == 100
    engine.stop()


def test_it_says_what_buys_slots_where_memory_holds_few(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, _ = loading.load(Weights(tiny_model, "a test"), {"ALPACA_SLOTS": "1000000"})
    assert engine.capacity.slots < 1_000_000
    assert "up to 1,000,000 with a lower ALPACA_CONTEXT" in capsys.readouterr().out
    engine.stop()


def test_memory_to_spare_is_what_is_free_without_a_full_cache(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.ram, "available", lambda: 10 * 2**30)
    monkeypatch.setattr(cache.SlotCache, "cpu_bytes", 3 * 2**30)
    monkeypatch.setattr(cache, "_CACHES", set())
    engine, _ = loading.load(Weights(tiny_model, "a test"), {})
    engine.stop()
    assert ", 7.0 GiB of memory to spare" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variable", "value"),
    [("ALPACA_SLOTS", "0"), ("ALPACA_CONTEXT", "all"), ("ALPACA_DTYPE", "float16")],
)
def test_a_wrong_setting_is_said(tiny_model: Path, variable: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{variable} is '{value}'"):
        loading.load(Weights(tiny_model, "a test"), {variable: value})


def test_a_folder_of_other_templates_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    passport.write(folder, "a test")
    loading.load(Weights(folder, "a test"), {"ALPACA_CONTEXT": "64"})[0].stop()
    path = folder / passport.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "template_sha256": "0"}))
    with pytest.raises(UserError, match="prompt templates that differ"):
        loading.load(Weights(folder, "a test"), {})


def test_an_exchanged_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    passport.write(folder, "a test")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer.json was changed after it was written"):
        loading.load(Weights(folder, "a test"), {})


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    grown = load_tokenizer(folder)
    grown.add_tokens(["<one more>"])
    grown.save_pretrained(folder)
    with pytest.raises(UserError, match="the tokenizer has 1025 tokens, the model only 1024"):
        loading.load(Weights(folder, "a test"), {})


def test_a_model_spread_by_accelerate_is_served_with_its_own_weights(
    tiny_model: Path, tmp_path: Path
) -> None:
    """What `device_map="auto"` makes of a model that does not fit: here the second layer is read
    from the disk by accelerate's hooks whenever it is computed."""
    codec = Codec(load_tokenizer(tiny_model))
    spread = AutoModelForCausalLM.from_pretrained(
        tiny_model,
        dtype=torch.float32,
        device_map="auto",
        max_memory={"cpu": 750_000},
        offload_folder=tmp_path,
        use_safetensors=True,
    )
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    answers = []
    for loaded in (spread, load_model(tiny_model, torch.float32)):
        engine = loading.make_engine(loaded, codec, {"ALPACA_CONTEXT": "200"})
        assert loaded is not spread or engine.model.fp16_layers == 0
        prompt = codec.prompt("Say hello.")
        answers.append([answer_of(engine, prompt, max_new_tokens=20), engine.capacity])
        engine.stop()
    assert answers[0] == answers[1]


TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 64,
}  # fmt: skip
STRETCHED = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Gemma2Config(**TINY), "caps its attention scores"),
        (GptOssConfig(**TINY, num_local_experts=2), "has attention sinks"),
        (LlamaConfig(**TINY, rope_parameters=STRETCHED), "rotary embedding .dynamic. changes"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_attention_that_slots_do_not_compute_is_refused(
    config: PreTrainedConfig, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        SlotModel(AutoModelForCausalLM.from_config(config)).probe()


@pytest.mark.parametrize("computing", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("held", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_buffers_are_those_of_a_model_that_transformers_loads_in_that_type(
    kind: str, held: torch.dtype, computing: torch.dtype, tmp_path: Path
) -> None:
    """Rotary frequencies in fp32, always; Gemma's embedding scale in the type computed in."""
    config = AutoConfig.for_model(kind, **TINY | {"hidden_size": 40, "max_position_embeddings": 99})
    AutoModelForCausalLM.from_config(config, dtype=held).save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=computing)
    served = SlotModel(load_model(tmp_path, None), computing).model
    real = dict(served.named_buffers())
    assert any(name.endswith("inv_freq") for name in real)
    for name, buffer in expected.named_buffers():
        assert real[name].dtype == buffer.dtype, name
        assert torch.equal(real[name], buffer), name


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_prefixes_begin_every_prompt_and_are_nearly_all_of_the_template(
    request: pytest.FixtureRequest, kind: str
) -> None:
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(kind)
    codec = Codec(tokenizer)
    for prefix, text, given in zip(
        loading.shared_prefixes(codec), PREFIXES, ("", "x"), strict=True
    ):
        for instruction in ("Tell me.", "\n\n", "ก"):
            assert codec.prompt(instruction, given)[: len(prefix)] == prefix
        assert len(prefix) >= len(codec.prompts([text])[0]) - 2


def test_cog_yaml_names_what_is_there() -> None:
    cog = yaml.safe_load((ROOT / "cog.yaml").read_text())
    assert schema.find(ROOT, cog["run"], "run").concurrency > 64
    assert "TOKIO_WORKER_THREADS=1" in cog["environment"]  # or free slots are refused
    assert cog["environment"] == [f"{name}={value}" for name, value in command.IMAGE.items()]
    assert schema.find(ROOT, cog["train"], "train").input_schema()["properties"]
    build = cog["build"]
    assert build["gpu"] is True
    assert build["python_version"] == "3.11"
    lines = (ROOT / build["python_requirements"]).read_text().splitlines()
    pins = [line for line in lines if line.strip() and not line.startswith("#")]
    assert f"cog=={build['sdk_version']}" in pins
    assert len(pins) > 10
    assert all(re.fullmatch(r"[\w.-]+==[\w.+-]+", pin) for pin in pins), pins
    assert f"torch=={torch.__version__.split('+')[0]}" in pins
