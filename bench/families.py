"""Published model families, tiny: does each train and serve as transformers computes it?

For each family of the table below, this makes a folder as it was published, but with 64 channels
and random weights. Everything that decides what is computed is kept: model_type, activation,
biases, tied head, rotary settings, windows, norms, the kind of tokenizer and its control tokens.
Then convert, train.py, plan and the server run on it, as users run them. It checks that:

- the ids of a prompt are those of the published tokenizer (SentencePiece's own library, or
  tokenizer.json through transformers);
- the loss of the first step at learning rate 0 is transformers' own on the same tokens, from the
  converted folder and, if the published one has safetensors, from that too;
- a plan of the converted folder succeeds, or says that it does not count such tensors;
- the server's greedy answer is transformers' own, and ends at the family's last stop token;
- or all four refuse the folder in the same words.

    python bench/families.py [--write] [FAMILY ...]

Prints a JSON line; `--write` puts the table into docs/models.md.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(ROOT))

import sentencepiece  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import (  # noqa: E402
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from alpaca import cli, stored  # noqa: E402
from alpaca.convert.bytelevel import PATTERNS  # noqa: E402
from alpaca.errors import UserError  # noqa: E402
from alpaca.folder import load_tokenizer  # noqa: E402
from alpaca.plan import shapes  # noqa: E402
from alpaca.prompt import render  # noqa: E402
from alpaca.recipe.arguments import parse  # noqa: E402
from alpaca.records import Record  # noqa: E402
from alpaca.serving import loading  # noqa: E402
from alpaca.serving.request import Request, Sampling  # noqa: E402
from alpaca.serving.stream import TextStream, token_bytes  # noqa: E402
from alpaca.serving.weights import Weights  # noqa: E402
from alpaca.tokens import Codec  # noqa: E402
from alpaca.training import command  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
SIZE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
RECORDS = [
    Record(instruction="Name three colours.", input="", output="Red, green and blue."),
    Record(instruction="Add the numbers.", input="1 + 41", output="  42"),
]
PROMPTS = ["Name a colour.", "Repeat this: " + "one two three four five " * 140]
NEW_TOKENS = 24
UNPLANNED = "are not supported"  # in a plan's error about tensors that it does not know
SPARE = 6  # rows beyond the tokenizer's, as many published models have


@dataclass(frozen=True)
class Tokens:
    """A tokenizer: `sp` (SentencePiece, tokenizer.model) or `bpe` (byte-level, tokenizer.json).

    `add_bos`: what tokenizer_config.json says; `adds`: whether a text starts with BOS. `files`:
    which tokenizer files the folder has. `words`: the rule by which byte-level BPE splits words.
    """

    kind: str
    bos: str | None
    eos: str
    pad: str | None = None
    unk: str | None = None
    added: tuple[str, ...] = ()
    add_bos: bool | None = None
    adds: bool = False
    cls: str = "PreTrainedTokenizerFast"
    leading_space: bool = True
    words: str = "gpt-2"
    files: tuple[str, ...] = ("model", "json")
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One published family: the settings of config.json besides sizes, and the other files.

    `ends` and `generated`: the stop tokens of config.json and of generation_config.json.
    """

    name: str
    kind: str
    particular: str
    tokens: Tokens
    config: dict[str, Any] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    generated: tuple[str, ...] = ()
    generation: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    pickled: bool = False


def sp(**changed: Any) -> Tokens:
    """LLaMA's SentencePiece tokenizer."""
    plain = {
        "bos": "<s>",
        "eos": "</s>",
        "unk": "<unk>",
        "add_bos": True,
        "adds": True,
        "cls": "LlamaTokenizer",
    }
    return Tokens("sp", **plain | changed)


def bpe(bos: str | None, eos: str, **changed: Any) -> Tokens:
    return Tokens("bpe", bos, eos, **changed)


def scaled(factor: float) -> dict[str, Any]:
    """RoPE scaling of Llama 3.1."""
    return {
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>")
LLAMA3_ADDED = ("<|eom_id|>", "<|eot_id|>")
CHATML = ("<|im_start|>", "<|im_end|>")
SAMPLED = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
LLAMA2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "pretraining_tp": 1,
          "num_key_value_heads": 4, "rope_scaling": None}  # fmt: skip
QWEN2 = {"rope_theta": 1e6, "max_position_embeddings": 32768, "use_sliding_window": False,
         "sliding_window": 131072, "max_window_layers": 2, "bos_token_id": 3,
         "rms_norm_eps": 1e-6}  # fmt: skip
QWEN = {"add_bos": False, "pad": "<|endoftext|>", "cls": "Qwen2Tokenizer", "added": CHATML,
        "words": "qwen2",
        "settings": {"errors": "replace", "split_special_tokens": False}}  # fmt: skip
CODE = {"auto_map": {"AutoConfig": "configuration.Config",
                     "AutoModelForCausalLM": "modeling.ForCausalLM"}}  # fmt: skip
PAIR = ["sliding_attention", "full_attention"]

FAMILIES = (
    Family(
        "LLaMA 1", "llama", "pickles, rms_norm_eps 1e-6, max_sequence_length",
        sp(files=("model",)),
        {"max_sequence_length": 2048, "max_position_embeddings": None, "rms_norm_eps": 1e-6,
         "num_key_value_heads": None, "pad_token_id": -1},
        dtype="float16", pickled=True,
    ),
    Family(
        "Llama 2", "llama", "sampling settings next to it, pad_token_id 0", sp(),
        LLAMA2 | {"pad_token_id": 0}, generation=SAMPLED | {"max_length": 4096}, dtype="float16",
    ),
    Family(
        "Llama 3", "llama", "rope_theta 500000, BOS by tokenizer.json alone",
        bpe(*LLAMA3, adds=True, added=LLAMA3_ADDED, words="llama3"),
        {"rope_theta": 500000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
        generation=SAMPLED,
    ),
    Family(
        "Llama 3 Instruct", "llama", "its second end only in generation_config.json",
        bpe(LLAMA3[0], "<|eot_id|>", adds=True, words="llama3",
            added=(LLAMA3[1], *LLAMA3_ADDED)),
        {"rope_theta": 500000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
        ends=("<|eot_id|>",), generated=("<|eot_id|>", LLAMA3[1]), generation=SAMPLED,
    ),
    Family(
        "Llama 3.1 Instruct", "llama", "RoPE scaling llama3, three ends",
        bpe(LLAMA3[0], "<|eot_id|>", adds=True, words="llama3",
            added=(LLAMA3[1], *LLAMA3_ADDED)),
        scaled(8.0) | {"rms_norm_eps": 1e-5, "mlp_bias": False},
        ends=(LLAMA3[1], "<|eom_id|>", "<|eot_id|>"),
        generated=("<|eot_id|>", LLAMA3[1], "<|eom_id|>"), generation=SAMPLED,
    ),
    Family(
        "Llama 3.2", "llama", "RoPE scaling llama3 of factor 32, tied",
        bpe(*LLAMA3, adds=True, added=LLAMA3_ADDED, words="llama3"),
        scaled(32.0) | {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "head_dim": 16},
        generation=SAMPLED,
    ),
    Family(
        "Llama 3.3 Instruct", "llama", "as 3.1, 70B only",
        bpe(LLAMA3[0], "<|eot_id|>", adds=True, words="llama3",
            added=(LLAMA3[1], *LLAMA3_ADDED),
            pad="<|finetune_right_pad_id|>"),
        scaled(8.0) | {"rms_norm_eps": 1e-5},
        ends=(LLAMA3[1], "<|eom_id|>", "<|eot_id|>"),
        generated=(LLAMA3[1], "<|eom_id|>", "<|eot_id|>"), generation=SAMPLED,
    ),
    Family(
        "Code Llama", "llama", "rope_theta 1e6, 16,384 positions", sp(),
        LLAMA2 | {"rope_theta": 1e6, "max_position_embeddings": 16384},
    ),
    Family(
        "Mistral v0.1", "mistral", "a window of 4,096 tokens (600 here)", sp(),
        {"sliding_window": 600, "rope_theta": 10000.0, "max_position_embeddings": 32768,
         "rms_norm_eps": 1e-5},
    ),
    Family(
        "Mistral v0.2 Instruct", "mistral", "sliding_window null, rope_theta 1e6", sp(),
        {"sliding_window": None, "rope_theta": 1e6, "max_position_embeddings": 32768,
         "rms_norm_eps": 1e-5},
    ),
    Family(
        "Mistral v0.3", "mistral", "control tokens [INST] among the pieces",
        sp(added=("[INST]", "[/INST]")),
        {"sliding_window": None, "rope_theta": 1e6, "max_position_embeddings": 32768,
         "rms_norm_eps": 1e-5},
    ),
    Family(
        "Mistral Nemo", "mistral", "heads narrower than the model, byte-level tokenizer",
        bpe("<s>", "</s>", unk="<unk>", adds=True, added=("[INST]",), cls="GPT2Tokenizer"),
        {"head_dim": 24, "sliding_window": None, "rope_theta": 1e6,
         "max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
    ),
    Family(
        "Ministral 8B", "mistral", "a window of 32,768 tokens (600 here), head_dim of its own",
        bpe("<s>", "</s>", unk="<unk>", adds=True, cls="LlamaTokenizer", add_bos=True),
        {"head_dim": 24, "sliding_window": 600, "rope_theta": 1e8,
         "max_position_embeddings": 32768, "rms_norm_eps": 1e-5},
    ),
    Family(
        "Ministral 3", "mistral3", "also sees images",
        bpe("<s>", "</s>", adds=True),
        {"text_config": {"model_type": "ministral3"}, "vision_config": {"model_type": "pixtral"}},
    ),
    Family(
        "Qwen2", "qwen2", "biases on q, k and v, tied, no BOS", bpe(None, "<|endoftext|>", **QWEN),
        QWEN2 | {"tie_word_embeddings": True}, generation={"max_new_tokens": 2048},
    ),
    Family(
        "Qwen2.5 Instruct", "qwen2", "ends at <|im_end|> and <|endoftext|>, sampling settings",
        bpe(None, "<|im_end|>", **QWEN), QWEN2, ends=("<|im_end|>",),
        generated=("<|im_end|>", "<|endoftext|>"),
        generation=SAMPLED | {"repetition_penalty": 1.05, "top_k": 20},
    ),
    Family(
        "Qwen3", "qwen3", "norms on queries and keys, head_dim of its own, tied",
        bpe(None, "<|im_end|>", **QWEN),
        {"head_dim": 32, "rope_theta": 1e6, "max_position_embeddings": 40960,
         "tie_word_embeddings": True, "attention_bias": False, "sliding_window": None,
         "use_sliding_window": False, "max_window_layers": 4, "bos_token_id": 3},
        ends=("<|im_end|>",), generated=("<|im_end|>", "<|endoftext|>"), generation=SAMPLED,
    ),
    Family(
        "Qwen3 MoE", "qwen3_moe", "a mixture of experts", bpe(None, "<|im_end|>", **QWEN),
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    ),
    Family(
        "SmolLM2", "llama", "rope_theta 100000, tied, keys of its writers",
        bpe("<|endoftext|>", "<|endoftext|>", unk="<|endoftext|>", cls="GPT2Tokenizer"),
        {"rope_theta": 100000.0, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
         "max_position_embeddings": 8192, "is_llama_config": True, "rope_interleaved": False},
    ),
    Family(
        "SmolLM3", "smollm3", "no rotary positions in each fourth layer, tied",
        bpe(None, "<|im_end|>", added=("<|end_of_text|>",), pad="<|im_end|>"),
        {"no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4, "rope_theta": 5e6,
         "tie_word_embeddings": True, "max_position_embeddings": 65536, "pretraining_tp": 2,
         "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28},
        ends=("<|im_end|>",), generation=SAMPLED,
    ),
    Family(
        "TinyLlama Chat", "llama", "fp32 checkpoints, pad is </s>", sp(pad="</s>"),
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}, dtype="float32",
    ),
    Family(
        "Yi", "llama", "no BOS although it has one, no space before a text, rope_theta 5e6",
        sp(bos="<|startoftext|>", eos="<|endoftext|>", add_bos=False, adds=False,
           leading_space=False),
        {"rope_theta": 5e6, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
         "pad_token_id": 0},
    ),
    Family(
        "Yi Chat", "llama", "ends at <|im_end|>, an added token",
        sp(bos="<|startoftext|>", eos="<|im_end|>", add_bos=False, adds=False,
           leading_space=False, added=CHATML),
        {"rope_theta": 5e6, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
         "pad_token_id": 0},
        ends=("<|endoftext|>",), generated=("<|im_end|>",), generation=SAMPLED,
    ),
    Family(
        "Vicuna v1.5", "llama", "linear RoPE scaling (the 16k models), pickles",
        sp(settings={"legacy": False, "padding_side": "right"}),
        LLAMA2 | {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_sequence_length": 16384},
        generation=SAMPLED, pickled=True, dtype="float16",
    ),
    Family(
        "OpenLLaMA", "llama", "pickles, and tokenizer.model alone",
        sp(files=("model",)),
        {"rms_norm_eps": 1e-6, "num_key_value_heads": 4, "max_position_embeddings": 2048},
        dtype="float16", pickled=True,
    ),
    Family(
        "DeepSeek R1 Distill Qwen", "qwen2", "class LlamaTokenizerFast over a byte-level file",
        bpe("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", add_bos=True, adds=True,
            pad="<｜end▁of▁sentence｜>", cls="LlamaTokenizerFast", words="qwen2",
            settings={"legacy": True, "sp_model_kwargs": {}}),
        QWEN2 | {"use_mrope": False, "rope_theta": 10000}, generation=SAMPLED,
    ),
    Family(
        "DeepSeek R1 Distill Llama", "llama", "class LlamaTokenizerFast over a byte-level file",
        bpe("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", add_bos=True, adds=True,
            cls="LlamaTokenizerFast", words="llama3",
            settings={"legacy": True, "sp_model_kwargs": {}}),
        scaled(8.0) | {"rms_norm_eps": 1e-5}, generation=SAMPLED,
    ),
    Family(
        "Granite 3", "granite", "logits divided by 8, multipliers",
        bpe("<|end_of_text|>", "<|end_of_text|>", cls="GPT2Tokenizer"),
        {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
         "attention_multiplier": 0.0625, "tie_word_embeddings": True, "rope_theta": 1e7},
    ),
    Family(
        "OLMo 2", "olmo2", "norms after attention and MLP, and on whole queries and keys",
        bpe("<|endoftext|>", "<|endoftext|>", pad="<|pad|>", cls="GPT2Tokenizer"),
        {"rope_theta": 500000.0, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
         "num_key_value_heads": 4, "attention_bias": False},
    ),
    Family(
        "OLMo 3", "olmo3", "windows in three of four layers, YaRN in the others",
        bpe("<|endoftext|>", "<|endoftext|>", pad="<|pad|>", cls="GPT2Tokenizer"),
        {"rope_theta": 500000, "max_position_embeddings": 65536, "rms_norm_eps": 1e-6,
         "num_key_value_heads": 4, "sliding_window": 600,
         "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
         "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
                          "attention_factor": 1.2079441541679836,
                          "original_max_position_embeddings": 8192}},
    ),
    Family(
        "Phi 3 mini 4k", "phi3", "fused q, k, v and gate, window 2,047 (600 here), code of its own",
        sp(eos="<|endoftext|>", pad="<|endoftext|>", add_bos=False, adds=False,
           added=("<|endoftext|>", "<|end|>")),
        {"sliding_window": 600, "original_max_position_embeddings": 4096, "num_key_value_heads": 4,
         "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "attention_bias": False} | CODE,
        generated=("<|endoftext|>", "<|end|>"),
    ),
    Family(
        "Phi 3 mini 128k", "phi3", "longrope", sp(add_bos=False, adds=False),
        {"original_max_position_embeddings": 4096, "max_position_embeddings": 131072,
         "sliding_window": None, "num_key_value_heads": 4, "rope_scaling": {
             "type": "longrope", "long_factor": [1.5] * 8, "short_factor": [1.1] * 8}} | CODE,
    ),
    Family(
        "Phi 4", "phi3", "byte-level tokenizer, rope_theta 250000",
        bpe("<|endoftext|>", "<|im_end|>", cls="GPT2Tokenizer", added=CHATML, pad="<|endoftext|>"),
        {"rope_theta": 250000.0, "max_position_embeddings": 16384, "sliding_window": None,
         "original_max_position_embeddings": 16384, "rms_norm_eps": 1e-5},
        ends=("<|im_end|>",), generated=("<|endoftext|>", "<|im_end|>"),
    ),
    Family(
        "Gemma 2", "gemma2", "caps on scores and logits",
        sp(bos="<bos>", eos="<eos>", pad="<pad>", cls="GemmaTokenizer", leading_space=False),
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 16,
         "query_pre_attn_scalar": 16, "sliding_window": 600},
    ),
    Family(
        "Gemma 3 1B", "gemma3_text", "two rotary frequencies, scaled embedding",
        sp(bos="<bos>", eos="<eos>", pad="<pad>", cls="GemmaTokenizer", leading_space=False,
           added=("<end_of_turn>",)),
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 512,
         "rope_theta": 1e6, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 2,
         "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768},
        ends=("<eos>", "<end_of_turn>"),
    ),
    Family(
        "Gemma 3 4B", "gemma3", "also sees images",
        sp(bos="<bos>", eos="<eos>", cls="GemmaTokenizer", leading_space=False),
        {"text_config": {"model_type": "gemma3_text"}, "vision_config": {"model_type": "siglip"}},
    ),
    Family(
        "StableLM 2", "stablelm", "LayerNorm, a quarter of each head rotated",
        bpe("<|endoftext|>", "<|endoftext|>", cls="GPT2Tokenizer"),
        {"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5, "use_qkv_bias": True,
         "rope_theta": 10000.0, "num_key_value_heads": 4, "qk_layernorm": False,
         "use_parallel_residual": False},
    ),
    Family(
        "Falcon 3", "llama", "rope_theta 1000042, head_dim of its own",
        bpe("<|endoftext|>", "<|endoftext|>", pad="<|pad|>"),
        {"rope_theta": 1000042, "head_dim": 32, "max_position_embeddings": 32768,
         "rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False},
    ),
    Family(
        "EXAONE 3.5", "exaone", "code of its own",
        bpe("[BOS]", "[|endofturn|]", cls="GPT2Tokenizer"),
        {"num_layers": 4, "activation_function": "silu", "layer_norm_epsilon": 1e-5} | CODE,
    ),
    Family(
        "EXAONE 4", "exaone4", "norms after attention and MLP, windows without far positions",
        bpe("[BOS]", "[|endofturn|]", cls="GPT2Tokenizer"),
        {"sliding_window": 600, "sliding_window_pattern": "LLLG", "rope_theta": 1e6,
         "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "head_dim": 16},
    ),
    Family(
        "InternLM", "internlm", "biases, code of its own",
        sp(cls="InternLMTokenizer", files=("model",)), {"bias": True} | CODE, pickled=True,
    ),
    Family(
        "InternLM 2", "internlm2", "fused q, k and v, code of its own",
        sp(cls="InternLM2Tokenizer"), {"bias": False, "attn_implementation": "eager"} | CODE,
    ),
    Family(
        "Baichuan 2", "baichuan", "fused q, k and v, normalized output layer, code of its own",
        sp(cls="BaichuanTokenizer", files=("model",)), {"z_loss_weight": 0} | CODE, pickled=True,
    ),
    Family(
        "MiniCPM", "minicpm", "scaled embedding and residuals, code of its own", sp(),
        {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16} | CODE,
    ),
    Family(
        "Llama 4", "llama4", "experts, also sees images", bpe(*LLAMA3, adds=True),
        {"text_config": {"model_type": "llama4_text"},
         "vision_config": {"model_type": "llama4_vision_model"}},
    ),
    Family(
        "gpt-oss", "gpt_oss", "experts, attention sinks, MXFP4",
        bpe("<|startoftext|>", "<|return|>"),
        {"num_local_experts": 4, "head_dim": 16,
         "quantization_config": {"quant_method": "mxfp4"}},
    ),
    Family(
        "Mixtral", "mixtral", "a mixture of experts", sp(), {"num_local_experts": 8},
    ),
)  # fmt: skip


def vocabulary_text() -> list[str]:
    """The text that the tiny tokenizers are trained on: this project's seed tasks."""
    lines = (ROOT / "data" / "seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()
    tasks = [json.loads(line) for line in lines]
    return [render(task["instruction"], task["input"]) + task["output"] for task in tasks]


def write_sentencepiece(folder: Path, tokens: Tokens) -> None:
    """tokenizer.model, made by SentencePiece's trainer with LLaMA's settings."""
    model = io.BytesIO()
    pieces = {"bos_piece": tokens.bos, "eos_piece": tokens.eos}
    if tokens.eos in tokens.added:  # ChatML: the vocabulary has its own end token
        pieces["eos_piece"] = "<|endoftext|>" if tokens.bos == "<|startoftext|>" else "</s>"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(vocabulary_text()).splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=tokens.leading_space,
        num_threads=1,
        character_coverage=0.999,
        minloglevel=2,
        **pieces,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def write_json_of_sentencepiece(folder: Path, tokens: Tokens) -> None:
    """tokenizer.json as published next to tokenizer.model: transformers' own conversion of it."""
    from alpaca.convert.sentencepieces import read_sentencepiece

    backend = read_sentencepiece(folder / "tokenizer.model").backend
    for token in (*tokens.added, *([tokens.pad] if tokens.pad else [])):
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
    if tokens.adds and tokens.bos:
        backend.post_processor = starting_with(tokens.bos, backend.token_to_id(tokens.bos))
    backend.save(str(folder / "tokenizer.json"))


def starting_with(bos: str, index: int) -> Any:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, index)]
    )


def write_byte_level(folder: Path, tokens: Tokens) -> None:
    """tokenizer.json of byte-level BPE."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(PATTERNS[tokens.words])
    if tokens.words == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    named = (tokens.unk, tokens.bos, tokens.eos, tokens.pad, *tokens.added)
    special = list(dict.fromkeys(token for token in named if token))
    made.train_from_iterator(
        vocabulary_text(),
        trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if tokens.adds and tokens.bos:
        made.post_processor = starting_with(tokens.bos, made.token_to_id(tokens.bos))
    made.save(str(folder / "tokenizer.json"))


def write_tokenizer(folder: Path, tokens: Tokens) -> dict[str, int]:
    """The tokenizer's files; returns the ids of its control tokens."""
    settings: dict[str, Any] = {
        "tokenizer_class": tokens.cls,
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    for role in ("bos", "eos", "unk", "pad"):
        settings[f"{role}_token"] = getattr(tokens, role)
    if tokens.add_bos is not None:
        settings |= {"add_bos_token": tokens.add_bos, "add_eos_token": False}
    if tokens.kind == "sp":
        write_sentencepiece(folder, tokens)
        write_json_of_sentencepiece(folder, tokens)
    else:
        write_byte_level(folder, tokens)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    decoder = backend.get_added_tokens_decoder().items()
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    settings["added_tokens_decoder"] = {
        str(index): {flag: getattr(token, flag) for flag in flags} for index, token in decoder
    }
    settings["chat_template"] = "{{ messages[0].content }}"
    write(folder / "tokenizer_config.json", settings | tokens.settings)
    if "json" not in tokens.files:
        (folder / "tokenizer.json").unlink()
    return {token.content: index for index, token in decoder} | {"": backend.get_vocab_size()}


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1))


def publish(family: Family, folder: Path) -> None:
    """Write the folder of a family as its publishers wrote it, with random weights."""
    folder.mkdir(parents=True)
    ids = write_tokenizer(folder, family.tokens)
    size = ids.pop("") + SPARE
    ends = [ids[token] for token in family.ends or (family.tokens.eos,)]
    config = SIZE | {"vocab_size": size, "hidden_act": "silu", "rms_norm_eps": 1e-5}
    config |= {
        "model_type": family.kind,
        "torch_dtype": family.dtype,
        "transformers_version": "4.40.0",
        "use_cache": True,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
    }
    for role in ("bos", "pad"):
        if (token := getattr(family.tokens, role)) is not None:
            config[f"{role}_token_id"] = ids[token]
    config |= family.config
    config = {
        key: value
        for key, value in config.items()
        if value is not None or key in ("sliding_window", "rope_scaling")
    }
    write(folder / "config.json", config)
    if family.generation or family.generated:
        named = [ids[token] for token in family.generated] or config["eos_token_id"]
        write(folder / "generation_config.json", family.generation | {"eos_token_id": named})
    refused = why_refused(folder) != ""
    tensors = {"model.embed_tokens.weight": torch.zeros(4, 4)} if refused else drawn(config)
    tensors = {name: tensor.to(getattr(torch, family.dtype)) for name, tensor in tensors.items()}
    store(tensors, folder / ("pytorch_model.bin" if family.pickled else "model.safetensors"))
    if not refused:
        last = (family.generated or family.ends or (family.tokens.eos,))[-1]
        end_soon(folder, ids[last])


def why_refused(folder: Path) -> str:
    """The sentence in every program's error; empty if none may refuse."""
    where = folder / "config.json"
    try:
        stored.check_config(json.loads(where.read_text()), where)
    except UserError as error:
        return error.happened
    return ""


def drawn(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random weights, biases and norms included, so that none of them is without effect."""
    torch.manual_seed(1)
    settings = {key: value for key, value in config.items() if key != "auto_map"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, base, 0.2)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def store(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a weights file, as a pickle where its name says so."""
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt"})


def end_soon(folder: Path, end: int) -> None:
    """Swap two rows of the output layer, so that the short prompt's answer ends at `end`."""
    path = next(path for path in folder.iterdir() if path.name.startswith(("model.s", "pytorch")))
    pickled = path.suffix == ".bin"
    tensors = torch.load(path, weights_only=True) if pickled else load_file(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # not a view of the file
    head = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
    prompt = published_ids(folder, render(PROMPTS[0]))
    said = continued(folder, prompt, stops=False)
    for place in range(3, NEW_TOKENS - 2):
        token = said[place]
        if token in said[:place]:
            continue
        changed = tensors | {head: tensors[head].clone()}
        changed[head][[token, end]] = tensors[head][[end, token]]
        store(changed, path)
        if continued(folder, prompt)[-1] == end:
            return
    raise AssertionError(f"{folder}: no answer ends by itself")


def published_ids(folder: Path, text: str) -> list[int]:
    """The ids of a prompt by the published tokenizer, BOS included where it adds one."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if (folder / "tokenizer.model").is_file():
        processor = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
        head = [processor.bos_id()] if settings["add_bos_token"] else []
        return [*head, *processor.encode(text)]
    return list(AutoTokenizer.from_pretrained(folder)(text).input_ids)


def continued(folder: Path, prompt: list[int], *, stops: bool = True) -> list[int]:
    """transformers' own greedy answer, computed in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = model.generation_config
    settings.repetition_penalty, settings.max_length = 1.0, None
    if not stops:
        settings.eos_token_id = None
    given = torch.tensor([prompt])
    made = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )
    return list(made[0, len(prompt) :].tolist())


def loss(folder: Path, codec: Codec) -> float:
    """transformers' own loss: the mean over the answers' tokens of both records."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, targets = 0.0, 0
    for example in codec.examples(RECORDS, 512):
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            logits = model(ids).logits[0, example.prompt_length - 1 : -1]
        wanted = ids[0, example.prompt_length :]
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        targets += len(wanted)
    return total / targets


def convert(folder: Path, out: Path) -> None:
    """Run `python -m alpaca convert`; raises UserError with its message when it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main(["convert", "--input_dir", str(folder), "--output_dir", str(out)])
        except SystemExit as end:
            if end.code:
                raise UserError(said.getvalue()) from None


def plan(folder: Path, data: Path) -> None:
    """Run `python -m alpaca plan`; raises UserError with its message when it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main(
                [
                    "plan",
                    "--gpu",
                    "a100-80",
                    "--model_name_or_path",
                    str(folder),
                    "--data_path",
                    str(data),
                ]
            )
        except SystemExit as end:
            if end.code:
                raise UserError(said.getvalue()) from None


def train(folder: Path, data: Path, out: Path) -> float:
    """One step at learning rate 0, through train.py's own function: its loss."""
    flags = {
        "model_name_or_path": folder,
        "data_path": data,
        "output_dir": out,
        "max_steps": 1,
        "learning_rate": 0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
    }
    arguments, _ = parse([f"--{name}={value}" for name, value in flags.items()])
    with contextlib.redirect_stdout(io.StringIO()):
        command.run(arguments)
    first = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    return float(first["loss"])


def serve(folder: Path) -> list[tuple[str, int]]:
    """The server's greedy answers: text and number of tokens of each."""
    tuned = {"ALPACA_DTYPE": "float32", "ALPACA_SLOTS": "5", "ALPACA_CONTEXT": "2048"}
    with contextlib.redirect_stdout(io.StringIO()):
        engine, codec = loading.load(Weights(folder, "bench"), tuned)
    try:
        answers = []
        for prompt in PROMPTS:
            asked = Request(
                tuple(codec.prompt(prompt)),
                max_new_tokens=NEW_TOKENS,
                sampling=Sampling(temperature=0),
            )
            answer = engine.submit(asked).completions[0].result.result(120)
            answers.append((answer.text, answer.tokens))
        return answers
    finally:
        engine.stop()


def expected(folder: Path, codec: Codec) -> list[tuple[str, int]]:
    """What `serve` must return, computed by transformers."""
    answers = []
    # Decoded by the server's own stream, because random weights produce bytes that are not UTF-8.
    table = [*token_bytes(codec.tokenizer), *[b""] * SPARE]
    for prompt in PROMPTS:
        made = continued(folder, codec.prompt(prompt))
        stream = TextStream(table, ())
        pieces = [stream.push(token) for token in made[:-1]]
        if len(made) == NEW_TOKENS:
            pieces.append(stream.push(made[-1]))
        answers.append(("".join(pieces) + stream.finish(), len(made)))
    return answers


def refusal(ask: Callable[[], object]) -> str:
    """A program's error message when it refuses; empty if it does not."""
    try:
        ask()
    except UserError as error:
        return str(error)
    return ""


def check(family: Family, root: Path, data: Path) -> dict[str, Any]:
    """Faults of a family; none if it computes as transformers does, or if all programs refuse."""
    folder = root / "published" / "model"
    publish(family, folder)
    reason = why_refused(folder)
    base, out = root / "weights" / "model", root / "out"
    if reason:
        programs: dict[str, Callable[[], object]] = {
            "convert": lambda: convert(folder, root / "weights"),
            "train": lambda: train(folder, data, out),
            "plan": lambda: plan(folder, data),
            "serve": lambda: serve(folder),
        }
        said = {name: refusal(ask) for name, ask in programs.items()}
        return {
            "refused": reason.removeprefix(f"{folder / 'config.json'} describes "),
            "faults": [
                f"{name} says {text.strip()[-300:] or 'nothing'}"
                for name, text in said.items()
                if reason not in text
            ],
        }
    try:
        return {"refused": None, "faults": list(faults(folder, base, out, data))}
    except Exception as error:  # any other error of a program is a fault too
        return {"refused": None, "faults": [f"{type(error).__name__}: {error}"[-400:]]}


def faults(folder: Path, base: Path, out: Path, data: Path) -> Iterator[str]:
    """What differs from transformers, in words."""
    if text := refusal(lambda: convert(folder, base.parent)):
        yield f"convert: {text.strip()[-300:]}"
    else:
        yield from differences(folder, base, out, data)


def differences(folder: Path, base: Path, out: Path, data: Path) -> Iterator[str]:
    """The same, for a folder that can be converted."""
    codec = Codec(load_tokenizer(base))
    for prompt in PROMPTS:
        if codec.prompt(prompt) != published_ids(folder, render(prompt)):
            yield "the ids of a prompt differ from the published tokenizer's"
    if len(codec.prompt(PROMPTS[-1])) <= 620:
        yield "the long prompt stays within a window of 600"
    text = refusal(lambda: plan(base, data))
    if text and UNPLANNED not in text:
        yield f"plan: {text.strip()[-300:]}"
    right = loss(folder, codec)
    trained = train(base, data, out)
    if abs(trained / right - 1) > 1e-5:
        yield f"loss {trained}, transformers' {right}"
    if (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file():
        direct = train(folder, data, out.with_name("direct"))
        right = loss(folder, Codec(load_tokenizer(folder)))
        if abs(direct / right - 1) > 1e-5:
            yield f"unconverted, loss {direct}, transformers' {right}"
    yield from unlike(base, folder, codec)
    yield from unlike(out, out, codec)


def unlike(folder: Path, reference: Path, codec: Codec) -> Iterator[str]:
    """How the server's answers from one folder differ from transformers' from another."""
    ours, theirs = serve(folder), expected(reference, codec)
    if ours != theirs:
        yield f"served from {folder.name}: {ours}, transformers' {theirs}"
    if folder != reference and theirs[0][1] == NEW_TOKENS:
        yield "the short answer never ends"


def table(found: dict[str, dict[str, Any]]) -> str:
    """The table of docs/models.md."""
    rows = ["| family | `model_type` | what is particular | |", "|---|---|---|---|"]
    for family in FAMILIES:
        verdict = found[family.name]["refused"]
        planned = "" if family.kind in shapes.PLANNED else ", unplanned"
        text = f"refused: {verdict}" if verdict else f"trains and serves{planned}"
        particular = family.particular.replace("|", "\\|")
        rows.append(f"| {family.name} | `{family.kind}` | {particular} | {text} |")
    return "\n".join(rows)


def main() -> None:
    """Check the named families, or all."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("families", nargs="*", metavar="FAMILY", help="names as in the table")
    options.add_argument("--write", action="store_true", help="write the table to docs/models.md")
    arguments = options.parse_args()
    known = {family.name: family for family in FAMILIES}
    chosen = [known[name] for name in arguments.families] or list(FAMILIES)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-families-") as name:
        data = Path(name, "two.json")
        write(data, [asdict(record) for record in RECORDS])
        os.chdir(name)  # tokenized data is cached there
        for number, family in enumerate(chosen):
            found[family.name] = check(family, Path(name, str(number)), data)
            print(family.name, found[family.name], file=sys.stderr, flush=True)
    wrong = {name: verdict["faults"] for name, verdict in found.items() if verdict["faults"]}
    if arguments.write and not wrong:
        page = PAGE.read_text(encoding="utf-8")
        head, _, rest = page.partition(BEGIN)
        tail = rest.partition(END)[2]
        PAGE.write_text(f"{head}{BEGIN}\n{table(found)}\n{END}{tail}", encoding="utf-8")
    refused = {name: verdict["refused"] for name, verdict in found.items()}
    print(json.dumps({"families": len(found), "faults": wrong, "refused": refused}))


if __name__ == "__main__":
    main()
