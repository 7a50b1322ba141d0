"""From a folder to an engine: what is refused, what is tuned, what is said."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from http_server import ROOT
from transformers import PreTrainedTokenizerBase

from alpaca import passport
from alpaca.errors import UserError
from alpaca.model import load_tokenizer
from alpaca.prompt import PREFIXES
from alpaca.serving import loading, schema
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
    with pytest.raises(UserError, match="other prompt templates"):
        loading.load(Weights(folder, "a test"), {})


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    grown = load_tokenizer(folder)
    grown.add_tokens(["<one more>"])
    grown.save_pretrained(folder)
    with pytest.raises(UserError, match="the tokenizer has 1025 tokens, the model only 1024"):
        loading.load(Weights(folder, "a test"), {})


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
    assert cog["environment"] == ["TOKIO_WORKER_THREADS=1"]  # or free slots are refused
    assert schema.find(ROOT, cog["train"], "train").input_schema()["properties"]
    build = cog["build"]
    assert build["gpu"] is True
    assert build["python_version"] == "3.11"
    pins = (ROOT / build["python_requirements"]).read_text().split()
    assert f"cog=={build['sdk_version']}" in pins
    assert all("==" in pin for pin in pins if pin[0].isalpha() and "=" in pin)
    assert torch.__version__.split("+")[0] in (ROOT / "requirements.txt").read_text()
