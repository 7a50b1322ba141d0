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

from alpaca.serving import attention, loading
from alpaca.serving.border import Limits
from alpaca.serving.cache import Capacity, LayerShape
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


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    num_splits: int,
) -> torch.Tensor:
    """`varlen_attn` as its page documents it, for a CPU, where it has no kernel.

    The last query of a sequence stands at its last key; a window (left, right) is counted from
    there, and -1 is no limit.
    """
    assert {t.dtype for t in (cu_seq_q, seqused_k, block_table)} == {torch.int32}
    assert (enable_gqa, num_splits, window_size[1]) == (True, 1, 0)
    counts = cu_seq_q.diff().tolist()
    assert max(counts) <= max_q
    assert int(seqused_k.max()) <= max_k == block_table.shape[1] * key.shape[1]
    made = torch.empty_like(query)
    first = 0
    for count, used, pages in zip(counts, seqused_k.tolist(), block_table.tolist(), strict=True):
        keys, values = (part[pages].flatten(0, 1)[:used].transpose(0, 1) for part in (key, value))
        back = torch.arange(used - count, used)[:, None] - torch.arange(used)
        seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] == -1))
        asked = query[first : first + count].transpose(0, 1)
        answer = torch.nn.functional.scaled_dot_product_attention(
            asked, keys, values, seen, scale=scale, enable_gqa=True
        )
        made[first : first + count] = answer.transpose(0, 1)
        first += count
    return made


if DEVICE == "cpu":
    attention.varlen_attn = paged_attention  # type: ignore[attr-defined]


class Replaying(GraphModel):
    """What a GPU computes, on a CPU: recorded steps are computed again, into the same tensor."""

    replays = 0

    def _has_flash(self, shapes: list[LayerShape]) -> bool:
        return True

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
    model: PreTrainedModel,
    codec: Codec,
    slots: int = 16,
    length: int = 2048,
    replaying: bool = False,
    **limits: int,
) -> Engine:
    """An engine as a CPU has it, or as a GPU has it where `replaying`."""
    kind = GraphModel if DEVICE == "cuda" else Replaying if replaying else SlotModel
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
