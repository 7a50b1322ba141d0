"""What every test may use: tiny real models and tokenizers, made here, in a second."""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a model hub, whatever it loads
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import engine_of, tiny
from http_server import SETTINGS, Server, behind, endless, serving
from hypothesis import settings
from tiny import bpe_tokenizer, sentencepiece_tokenizer, set_eos
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from alpaca.serving.engine import Engine
from alpaca.tokens import Codec

# Shared machines stall now and then: a slow example is no failure.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer (the shape of Llama 3's and SmolLM2's): adds no BOS."""
    return bpe_tokenizer()


@pytest.fixture(scope="session")
def sentencepiece() -> PreTrainedTokenizerBase:
    """A LLaMA 1/2-style tokenizer: BOS, leading-space marker, byte fallback."""
    return sentencepiece_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, bpe: PreTrainedTokenizerBase) -> Path:
    """A folder with a two-layer LLaMA (grouped-query attention, untied) and the BPE tokenizer."""
    import torch

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "llama-tiny"
    config = LlamaConfig(
        vocab_size=len(bpe),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    set_eos(config, bpe)
    LlamaForCausalLM(config).save_pretrained(folder)
    bpe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model, fetched once and converted: 135M parameters, the real thing."""
    from reference import convert

    from alpaca.convert import download

    fetched = download.fetch(Path(__file__).resolve().parent.parent / "demo")
    output = tmp_path_factory.mktemp("smollm")
    code, said = convert("--input_dir", fetched, "--output_dir", output)
    assert code == 0, said
    assert "134,515,008 parameters, Q4_1, tokenizer 49,152 pieces" in said
    return output / "smollm2-135m"


@pytest.fixture(scope="module")
def served(bpe: PreTrainedTokenizerBase) -> Iterator[tuple[Engine, Codec]]:
    """An engine of five slots and eight places to wait, without a server around it."""
    codec = Codec(bpe)
    engine = engine_of(tiny("llama", bpe), codec, slots=5, waiting=8)
    yield engine, codec
    engine.stop()


@pytest.fixture(scope="session")
def endless_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that, decoded greedily, goes on for minutes."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    endless(tiny_model, folder)
    return folder


@pytest.fixture(scope="session")
def deep_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `endless_model`, with so many layers that vLLM makes some 100 tokens a second.

    At the thousands of a smaller one its own HTTP server does not answer for seconds.
    """
    folder = tmp_path_factory.mktemp("deep") / "model"
    endless(tiny_model, folder, layers=48)
    return folder


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Cog's real server with the endless model in five slots, by default of the own engine."""
    log, kind = tmp_path_factory.mktemp("server"), getattr(request, "param", "own")
    model = request.getfixturevalue("deep_model" if kind == "vllm" else "endless_model")
    with (
        behind(kind, model) as settings,
        serving(model, log, **SETTINGS, **settings) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; Debian: apt-get install chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("no chromium on the PATH (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()
