"""Small real tokenizers, trained on this project's own texts."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from alpaca.prompt import render

SEEDS = Path(__file__).resolve().parent.parent / "data" / "seed_tasks.jsonl"


def corpus() -> list[str]:
    """The seed tasks as training texts, prompt and answer together."""
    tasks = [json.loads(line) for line in SEEDS.read_text(encoding="utf-8").splitlines()]
    return [render(task["instruction"], task["input"]) + task["output"] for task in tasks]


def bpe_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=["<|begin|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>"
    )


def sentencepiece_tokenizer() -> PreTrainedTokenizerBase:
    """BPE with the LLaMA 1/2 pipeline of transformers: `▁` for space, byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trained.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=1200, special_tokens=pieces, limit_alphabet=60, show_progress=False
        ),
    )
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)


def set_eos(config: LlamaConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a model's control tokens its tokenizer's."""
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
