"""Slots: how many fit, what is attended to, and the fixed shapes that a GPU would replay."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import set_eos
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from alpaca.errors import UserError
from alpaca.serving import packed
from alpaca.serving.attention import Piece, Step, spans
from alpaca.serving.cache import Capacity, LayerShape, SlotCache, plan_capacity
from alpaca.serving.forward import Batch, SlotModel
from alpaca.serving.graphs import sizes

SHAPES = [LayerShape(2, 16, torch.float32, torch.device("cpu"))] * 3
TOKEN = 3 * 2 * 2 * 16 * 4  # bytes


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        (10**6, Capacity(16, 1000)),
        (17 * 1000, Capacity(16, 1000)),  # one slot more than are used
        (9 * 1000, Capacity(8, 1000)),
        (6 * 1000, Capacity(5, 1000)),
        (6 * 700, Capacity(5, 700)),  # never fewer than asked for: they get shorter
    ],
)
def test_slots_fit_into_the_budget(tokens: int, wanted: Capacity) -> None:
    assert plan_capacity(SHAPES, 1000, 16, 5, tokens * TOKEN) == wanted


def test_too_little_memory_is_said() -> None:
    with pytest.raises(UserError, match="holds 600 tokens"):
        plan_capacity(SHAPES, 1000, 16, 5, 600 * TOKEN)


@given(st.data())
def test_runs_cover_every_slot_once_and_waste_little(data: st.DataObject) -> None:
    rows = sorted(data.draw(st.sets(st.integers(0, 63), min_size=1, max_size=20)))
    lengths = [data.draw(st.integers(1, 4000)) for _ in rows]
    runs = spans(rows, lengths)
    assert [at for first, last, _ in runs for at in range(first, last)] == list(range(len(rows)))
    for first, last, longest in runs:
        assert longest == max(lengths[first:last])
        computed = (rows[last - 1] + 1 - rows[first]) * longest
        assert computed <= sum(lengths[first:last]) + 128 * (last - first - 1)


@pytest.fixture
def model(bpe: PreTrainedTokenizerBase) -> SlotModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(bpe), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    set_eos(config, bpe)
    made = SlotModel(LlamaForCausalLM(config))
    made.allocate(made.probe(), Capacity(4, 64))
    return made


def prefilled(model: SlotModel) -> list[tuple[int, int, int]]:
    """Prompts of different lengths in slots 0, 1 and 3; what decodes next."""
    for slot, length in ((0, 9), (1, 30), (3, 17)):
        ids = [(slot * 31 + at) % 500 for at in range(length)]
        model.run(Batch([], [(Piece(slot, 0, length), ids)], [length - 1]))
    return [(0, 9, 5), (1, 30, 6), (3, 17, 7)]


def test_pieces_of_any_size_give_the_logits_of_the_whole_prompt(model: SlotModel) -> None:
    ids = [(7 * at) % 500 for at in range(40)]
    whole = model.run(Batch([], [(Piece(0, 0, 40), ids)], [39]))
    for borders in ([0, 1, 40], [0, 13, 14, 29, 40], [0, 39, 40]):
        for first, last in pairwise(borders):
            batch = Batch([], [(Piece(2, first, last), ids[first:last])], [last - first - 1])
            logits = model.run(batch)
        torch.testing.assert_close(logits, whole)


@torch.inference_mode()
def test_a_step_of_fixed_shape_gives_the_logits_of_an_exact_one(model: SlotModel) -> None:
    """The shapes a CUDA graph records: all slots, the longest length, masked by position."""
    decoding = prefilled(model)
    exact = model.run(Batch(decoding, [], [0, 1, 2]))
    rows, length = sizes(4, 31, model.cache)
    assert (rows, length) == (4, 64)
    slots = torch.tensor([0, 1, model.cache.spare, 3])
    positions = torch.tensor([9, 30, 0, 17])
    step = Step(model.cache, slots, positions, list(range(rows)), [length] * rows, recorded=True)
    tokens = torch.tensor([[5, 6, 0, 7]])
    fixed = model._pass(tokens, positions[None], step, torch.arange(rows))
    torch.testing.assert_close(fixed[[0, 1, 3]], exact)


def test_recorded_sizes_are_few_and_within_the_cache() -> None:
    cache = SlotCache(SHAPES, Capacity(48, 3000))
    seen = {sizes(rows, length, cache) for rows in range(1, 49) for length in range(1, 3001, 7)}
    assert len(seen) <= 7 * 5
    assert max(seen) == (48, 3000)
    for rows, length in ((1, 1), (5, 257), (48, 3000)):
        wide, long = sizes(rows, length, cache)
        assert wide >= rows
        assert long >= length


@pytest.mark.skipif(not packed.available(torch.float32), reason="oneDNN's operators are missing")
@given(st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_packed_layers_compute_the_same(rows: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = torch.nn.Linear(48, 80, bias=bias)
    inputs = torch.randn(1, rows, 48)
    with torch.inference_mode():
        torch.testing.assert_close(packed.PackedLinear(layer)(inputs), layer(inputs))
