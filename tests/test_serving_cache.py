"""Slots: how many fit, what is attended to, and the fixed shapes that a GPU would replay."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from engines import Replaying
from hypothesis import given
from hypothesis import strategies as st
from tiny import set_eos
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from alpaca.errors import UserError
from alpaca.ram import available, container_memory_left
from alpaca.serving import attention, packed
from alpaca.serving.attention import PrefillChunk, flash_works, spans
from alpaca.serving.cache import (
    PAGE,
    Capacity,
    LayerShape,
    SlotCache,
    fitting_tokens,
    plan_capacity,
)
from alpaca.serving.forward import Batch, SlotModel
from alpaca.serving.graphs import row_counts

SHAPES = [LayerShape(2, 16, torch.float32, torch.device("cpu"))] * 3
TOKEN = 3 * 2 * 2 * 16 * 4  # bytes
needs_half = pytest.mark.skipif(not packed.half_available(), reason="FBGEMM is missing")


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
    assert plan_capacity(tokens, 1000, 16, 5) == wanted


@pytest.mark.parametrize(
    ("tokens", "context", "wanted"),
    [
        (10**6, 1000, Capacity(16, 1000)),
        (9 * 1024, 1000, Capacity(8, 1000)),  # a slot takes four pages
        (9 * 1024 - 1, 1000, Capacity(7, 1000)),
        (6 * 700, 1000, Capacity(5, 512)),
        (17 * 256, 100, Capacity(16, 100)),
    ],
)
def test_slots_fit_in_whole_pages(tokens: int, context: int, wanted: Capacity) -> None:
    found = plan_capacity(tokens, context, 16, 5, PAGE)
    assert found == wanted
    assert (found.slots + 1) * -(-found.length // PAGE) * PAGE <= tokens


def test_too_little_memory_is_said() -> None:
    with pytest.raises(UserError, match="room for 600 tokens"):
        plan_capacity(600, 1000, 16, 5)


def test_each_device_holds_the_keys_of_its_own_layers() -> None:
    cpu, first, second = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
    layer = TOKEN // 3

    def shapes(*devices: torch.device) -> list[LayerShape]:
        return [LayerShape(2, 16, torch.float32, device) for device in devices]

    free = {cpu: 1000 * layer, first: 1000 * layer, second: 300 * layer}.__getitem__
    assert fitting_tokens(shapes(cpu), free) == 500  # half
    assert fitting_tokens(shapes(first, first, first), free) == 300  # nine tenths, three layers
    assert fitting_tokens(shapes(first, first, first, second), free) == 270
    assert fitting_tokens(shapes(first, second, second, second), free) == 90
    assert fitting_tokens(shapes(first, cpu, cpu), free) == 250


def test_the_memory_of_a_container_is_what_files_do_not_keep(tmp_path: Path) -> None:
    def write(folder: Path, limit: str, used: str, files: str, names: tuple[str, str]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
        (folder / f"memory.{names[1]}").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{files} 700\nactive_file 50\n")
        return folder

    new, old = ("max", "current"), ("limit_in_bytes", "usage_in_bytes")
    assert container_memory_left(tmp_path) is None
    assert container_memory_left(write(tmp_path / "2", "2000", "1900", "inactive_file", new)) == 800
    assert (
        container_memory_left(write(tmp_path / "no", "max", "1900", "inactive_file", new)) is None
    )
    write(tmp_path / "1" / "memory", "2000", "1800", "total_inactive_file", old)
    assert container_memory_left(tmp_path / "1") == 900
    # A job's own group, as Slurm and systemd make it, and the groups it is in.
    own = tmp_path / "cgroup"
    own.write_text("0::/slurm/job/step\n")
    write(tmp_path / "3/slurm", "3000", "1900", "inactive_file", new)
    (tmp_path / "3/slurm/job/step").mkdir(parents=True)
    assert available(tmp_path / "3", own) == 1800
    assert available(tmp_path / "1", tmp_path / "absent") == 900


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


def test_a_cache_takes_memory_only_as_it_is_written() -> None:
    before = psutil.Process().memory_info().rss
    cache = SlotCache(SHAPES, Capacity(63, 2**16))  # 3 GB
    assert psutil.Process().memory_info().rss - before < 100e6
    cache.write(
        0, torch.tensor([5]), torch.tensor([70]), torch.ones(2, 1, 16), torch.ones(2, 1, 16)
    )
    kept = cache.read(5, 72)
    assert kept[0].sum() == kept[1].sum() == 2 * 16  # the rest is zeros
    assert psutil.Process().memory_info().rss - before < 100e6


def small_model(tokenizer: PreTrainedTokenizerBase, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
    )
    set_eos(config, tokenizer)
    return LlamaForCausalLM(config)


@pytest.fixture
def model(bpe: PreTrainedTokenizerBase) -> SlotModel:
    made = SlotModel(small_model(bpe))
    made.allocate(made.probe(), Capacity(4, 64))
    return made


def prefilled(model: SlotModel) -> list[tuple[int, int, int]]:
    """Prompts of different lengths in slots 0, 1 and 3; what decodes next."""
    for slot, length in ((0, 9), (1, 30), (3, 17)):
        ids = [(slot * 31 + at) % 500 for at in range(length)]
        model.run(Batch([], [(PrefillChunk(slot, 0, length), ids)], [length - 1]))
    return [(0, 9, 5), (1, 30, 6), (3, 17, 7)]


def test_pieces_of_any_size_give_the_logits_of_the_whole_prompt(model: SlotModel) -> None:
    ids = [(7 * at) % 500 for at in range(40)]
    whole = model.run(Batch([], [(PrefillChunk(0, 0, 40), ids)], [39]))
    for borders in ([0, 1, 40], [0, 13, 14, 29, 40], [0, 39, 40]):
        for first, last in pairwise(borders):
            batch = Batch([], [(PrefillChunk(2, first, last), ids[first:last])], [last - first - 1])
            logits = model.run(batch)
        torch.testing.assert_close(logits, whole)


def test_replayed_steps_give_the_logits_of_computed_ones(bpe: PreTrainedTokenizerBase) -> None:
    """Alone and beside prompts, whole and in pieces; with slots between that do not decode."""
    models = [kind(small_model(bpe)) for kind in (SlotModel, Replaying)]
    for model in models:
        model.allocate(model.probe(), Capacity(6, 64))
        decoding = prefilled(model)
    ids = [(11 * at) % 500 for at in range(20)]
    whole, half = (PrefillChunk(2, 0, 20), ids), (PrefillChunk(4, 0, 9), ids[:9])
    later = [(slot, position + 1, token + 3) for slot, position, token in decoding]
    for batch in (
        Batch(decoding, [], [0, 1, 2]),
        Batch(later[1:], [whole, half], [0, 1, 21]),  # the whole prompt's last token answers
        Batch([(1, 32, 9)], [(PrefillChunk(4, 9, 20), ids[9:])], [0, 11]),
        Batch([(1, 33, 9), (2, 20, 8)], [half], [0, 1]),
        Batch([], [half], [0]),
        Batch([(0, 11, 2), (1, 34, 2), (2, 21, 2)], [], [0, 1, 2]),
    ):
        computed, replayed = (model.run(batch) for model in models)
        torch.testing.assert_close(replayed, computed)
    assert models[1].replays == 2
    assert list(models[1]._recordings) == [6, 4, 2, 1]


def test_a_step_that_cannot_be_recorded_is_computed(
    bpe: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = [kind(small_model(bpe)) for kind in (SlotModel, Replaying)]

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Replaying, "_capture", full)
    for model in models:
        model.allocate(model.probe(), Capacity(6, 64))
        decoding = prefilled(model)
    assert "not recorded, which is slow: CUDA out of memory." in capsys.readouterr().out
    computed, instead = (model.run(Batch(decoding, [], [0, 1, 2])) for model in models)
    torch.testing.assert_close(instead, computed)


def test_rows_are_recorded_by_powers_of_two() -> None:
    assert [row_counts(slots) for slots in (1, 2, 5, 64)] == [
        [1],
        [1, 2],
        [1, 2, 4, 5],
        [1, 2, 4, 8, 16, 32, 64],
    ]


def test_flash_attention_is_used_only_where_it_computes_what_plain_attention_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels that refuse, that leave rows unwritten, or that count a window otherwise."""
    shape, right = LayerShape(2, 16, torch.float32, torch.device("cpu")), attention.varlen_attn
    assert flash_works(shape, 3)

    def refusing(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    def forgetting(*asked: Any, **more: Any) -> torch.Tensor:
        found: torch.Tensor = right(*asked, **more)
        found[1] = torch.nan
        return found

    def wider(*asked: Any, window_size: tuple[int, int], **more: Any) -> torch.Tensor:
        left = window_size[0] + 1 if window_size[0] > 0 else -1
        found: torch.Tensor = right(*asked, window_size=(left, 0), **more)
        return found

    def elsewhere(*asked: Any, block_table: torch.Tensor, **more: Any) -> torch.Tensor:
        found: torch.Tensor = right(*asked, block_table=block_table.flip(0), **more)
        return found

    for wrong in (refusing, forgetting, wider, elsewhere):
        monkeypatch.setattr(attention, "varlen_attn", wrong)
        assert not flash_works(shape, 3)


def halves(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Random numbers as a 16-bit checkpoint has them."""
    return torch.randn(*shape, generator=generator).bfloat16().float()


@needs_half
@given(st.integers(1, 40), st.booleans(), st.sampled_from([1e-6, 1.0, 3e4, 1e20]), st.integers())
def test_weights_in_16_bits_compute_the_same_in_float32(
    rows: int, bias: bool, size: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**32)
    layer = torch.nn.Linear(48, 80, bias=bias)
    layer.weight.data = (halves(generator, 80, 48) * size).bfloat16().float()
    if bias:
        layer.bias.data = torch.randn(80, generator=generator) * size
    shift = packed.half_shift(layer.weight)
    assert shift is not None
    half = packed.HalfLinear(layer, shift)
    inputs = torch.randn(1, rows, 48, generator=generator)
    with torch.inference_mode():
        answers = half(inputs)
        wanted = layer.double()(inputs.double())
        torch.testing.assert_close(answers.double(), wanted, rtol=1e-6, atol=1e-5 * size)
        alone = half(inputs[:, rows // 2 : rows // 2 + 1])
    assert torch.equal(alone[0, 0], answers[0, rows // 2])  # bit for bit, whoever is beside it


@pytest.mark.skipif(
    not packed.blocked_available(torch.float32), reason="oneDNN's operators are missing"
)
@given(st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_weights_in_blocks_compute_the_same(rows: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = torch.nn.Linear(48, 80, bias=bias)
    inputs = torch.randn(1, rows, 48)
    with torch.inference_mode():
        blocked = packed.BlockedLinear(layer, torch.float32)
        torch.testing.assert_close(blocked(inputs), layer(inputs))


@given(st.lists(st.floats(width=32) | st.floats(-8, 8, width=16), min_size=1, max_size=5))
def test_a_shift_to_16_bits_loses_nothing(values: list[float]) -> None:
    weight = torch.tensor([values])
    shift = packed.half_shift(weight)
    if shift is not None:
        held = (weight * 2.0**shift).half()
        assert torch.equal(held.double() * 2.0**-shift, weight.double())


@pytest.mark.parametrize(
    ("values", "shift"),
    [
        ([0.0, 0.0], 0),
        ([65504.0, 1.0], 0),
        ([65536.0, 1.0], -2),
        ([2.0**-30, 1.0], 14),
        ([2.0**-40, 1.0], None),
        ([1 / 3, 1.0], None),
        ([1e-40, 1e-42], None),
        ([float("inf"), 1.0], None),
        ([float("nan"), 1.0], None),
    ],
)
def test_the_shift_to_16_bits(values: list[float], shift: int | None) -> None:
    assert packed.half_shift(torch.tensor([values])) == shift


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_model_computes_as_before(
    bpe: PreTrainedTokenizerBase, stored: torch.dtype, tied: bool
) -> None:
    whole = small_model(bpe, tied)
    for parameter in whole.parameters():  # as a folder of that type loads: buffers stay fp32
        parameter.data = parameter.data.to(stored)
    plain = copy.deepcopy(whole).float().eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    made = SlotModel(whole, torch.float32)
    assert made.model.dtype == torch.float32
    assert (made.fp16_layers == 2 * 7 + 1) is (stored != torch.float32 and packed.half_available())
    made.allocate(made.probe(), Capacity(4, 64))
    logits = made.run(Batch([], [(PrefillChunk(0, 0, 4), ids[0].tolist())], [0, 1, 2, 3]))
    torch.testing.assert_close(logits, plain(ids).logits[0])
