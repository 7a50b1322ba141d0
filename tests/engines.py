"""Small engines to test with: three model families with decisive random weights."""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from tiny import set_eos
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from alpaca.serving import loading
from alpaca.serving.border import Limits
from alpaca.serving.cache import Capacity
from alpaca.serving.engine import Engine
from alpaca.serving.forward import SlotModel
from alpaca.serving.graphs import GraphModel
from alpaca.serving.request import Answer, Request, Sampling
from alpaca.serving.stream import token_bytes
from alpaca.tokens import Codec

# `cuda` tests the GPU's engine: ALPACA_TEST_DEVICE=cuda pytest tests/test_serving_engine.py
DEVICE = os.environ.get("ALPACA_TEST_DEVICE", "cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # decisive logits: no near-ties for rounding to turn
}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral, window 24": (MistralConfig, MistralForCausalLM, {"sliding_window": 24}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


class Replaying(GraphModel):
    """What a GPU replays, on a CPU: the recorded step computed again, into the same tensor."""

    replays = 0

    def _capture(
        self, step: Callable[[], torch.Tensor]
    ) -> tuple[Callable[[], object], torch.Tensor]:
        logits = step().clone()

        def replay() -> None:
            self.replays += 1
            logits.copy_(step())

        return replay, logits


def tiny(kind: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    config_class, model_class, extra = KINDS[kind]
    torch.manual_seed(1)
    config = config_class(vocab_size=len(tokenizer), **SIZES, **extra)
    set_eos(config, tokenizer)
    # Numbers of a 16-bit checkpoint, as those that are served have, computed with in float32.
    return model_class(config).bfloat16().float().eval()


def engine_of(
    model: PreTrainedModel, codec: Codec, slots: int = 16, length: int = 2048, **limits: int
) -> Engine:
    kind = GraphModel if DEVICE == "cuda" else SlotModel
    slot_model = kind(copy.deepcopy(model).to(DEVICE))
    slot_model.allocate(slot_model.probe(), Capacity(slots, length))
    table = token_bytes(codec.tokenizer)
    engine = Engine(slot_model, table, frozenset([codec.eos]), Limits(**limits))
    engine.start(loading.shared_prefixes(codec))
    return engine


def answer_of(
    engine: Engine, prompt: list[int], sampling: Sampling | None = None, **settings: Any
) -> Answer:
    greedy = Sampling(temperature=0)
    job = engine.submit(Request(tuple(prompt), sampling=sampling or greedy, **settings))
    return job.completions[0].result.result(60)
