"""What every test may use: tiny real models and tokenizers, made here, in a second."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a model hub, whatever it loads
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
from hypothesis import settings
from tiny import bpe_tokenizer, sentencepiece_tokenizer, set_eos
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

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

    fetched = download.fetch(Path(__file__).resolve().parent.parent / "unconverted-weights")
    output = tmp_path_factory.mktemp("smollm")
    code, said = convert("--input_dir", fetched, "--output_dir", output)
    assert code == 0, said
    assert "134,515,008 parameters, Q4_1, tokenizer 49,152 pieces" in said
    return output / "smollm2-135m"
