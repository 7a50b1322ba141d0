"""Packs: every example once, within capacity, and the same loss and gradient as padding."""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from alpaca.folder import load_tokenizer
from alpaca.recipe import packing
from alpaca.recipe.corpus import Corpus, open_corpus
from alpaca.tokens import Codec
from alpaca.training import attention, loss
from alpaca.training.loss import TargetLoss

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def corpus(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The seed tasks cut at 160 tokens, so that some are truncated."""
    codec = Codec(load_tokenizer(tiny_model))
    cache = tmp_path_factory.mktemp("cache")
    return open_corpus(ROOT / "data/seed_tasks.jsonl", codec, cache, 160)


@pytest.fixture(scope="session")
def plain(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.fixture(scope="session")
def packed(tiny_model: Path) -> TargetLoss:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation=attention.NAME
    )
    return TargetLoss(model)


def made(prefixes: tuple[int, int], lengths: list[tuple[int, int, int]]) -> Corpus:
    """A corpus from (kind, own prompt tokens, target tokens); ids are all different."""
    counter = itertools.count(100)
    ids, prompts = [], []
    for kind, prompt, targets in lengths:
        shared = [kind * 50 + i for i in range(prefixes[kind])]
        ids.append(shared + [next(counter) for _ in range(prompt + targets)])
        prompts.append(len(shared) + prompt)
    return Corpus(
        ids=np.asarray([i for example in ids for i in example], dtype=np.int32),
        offsets=np.cumsum([0] + [len(example) for example in ids]),
        prompt_lengths=np.asarray(prompts, dtype=np.int32),
        kinds=np.asarray([kind for kind, _, _ in lengths], dtype=np.uint8),
        prefix_lengths=prefixes,
        truncated=0,
    )


corpora = st.builds(
    made,
    st.tuples(st.integers(0, 12), st.integers(0, 12)),
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 20), st.integers(1, 30)),
        min_size=1,
        max_size=24,
    ),
).filter(lambda c: min(np.diff(c.offsets)) > 0 and min(c.prompt_lengths) > 0)


@given(corpora, st.integers(62, 200), st.integers(1, 4))
def test_every_example_lands_in_one_pack_within_capacity_and_ranks_run_equally_many(
    corpus: Corpus, capacity: int, world_size: int
) -> None:
    shares = packing.distribute(corpus, range(len(corpus)), capacity, world_size)
    assert len(shares) == world_size
    assert len({len(share) for share in shares}) == 1
    placed = [i for share in shares for pack in share for i in pack]
    assert sorted(placed) == list(range(len(corpus)))
    for share in shares:
        for pack in share:
            assert packing.build(corpus, pack).tokens <= capacity


def one_by_one(
    corpus: Corpus, members: Sequence[int], capacity: int, world_size: int
) -> list[list[list[int]]]:
    """The same packs by their definition: every number of packs in turn, every pack looked at."""
    shared = corpus.prefix_lengths

    def own(i: int) -> int:
        return corpus.length(i) - shared[corpus.kinds[i]]

    order = sorted(members, key=lambda i: (-own(i), i))
    for count in itertools.count(world_size, world_size):
        packs: list[list[int]] = [[] for _ in range(count)]
        tokens, held = [0] * count, [set[int]() for _ in range(count)]
        for i in order:
            kind = int(corpus.kinds[i])
            after = [
                t + (0 if kind in h else shared[kind]) for t, h in zip(tokens, held, strict=True)
            ]
            best = after.index(min(after))
            if after[best] + own(i) > capacity:
                break
            tokens[best] = after[best] + own(i)
            held[best].add(kind)
            packs[best].append(i)
        else:
            return [packs[rank::world_size] for rank in range(world_size)]
    raise AssertionError("every example fits a pack of its own")


@given(corpora, st.integers(62, 200), st.integers(1, 4))
def test_packs_are_the_fewest_that_trying_every_number_finds(
    corpus: Corpus, capacity: int, world_size: int
) -> None:
    found = packing.distribute(corpus, range(len(corpus)), capacity, world_size)
    assert found == one_by_one(corpus, range(len(corpus)), capacity, world_size)


@pytest.mark.parametrize(("examples", "capacity"), [(256, 512), (512, 512), (300, 2048)])
def test_the_packs_of_a_training_step_are_those_of_before(examples: int, capacity: int) -> None:
    rng = np.random.default_rng(examples)
    lengths = np.clip(rng.lognormal(4.3, 0.7, (examples, 2)), 5, 230).astype(int)
    kinds = (rng.random(examples) < 0.4).astype(int)
    corpus = made((33, 44), list(zip(kinds, lengths[:, 0], lengths[:, 1], strict=True)))
    for ranks in (1, 8):
        found = packing.distribute(corpus, range(examples), capacity, ranks)
        assert found == one_by_one(corpus, range(examples), capacity, ranks)


def test_thousands_of_held_out_examples_are_placed_in_a_second() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.3, 0.7, 8000), 5, 460).astype(int)
    kinds = (rng.random(8000) < 0.4).astype(int)
    corpus = made((33, 44), [(kind, 2, n) for kind, n in zip(kinds, lengths, strict=True)])
    started = time.process_time()
    [packs] = packing.distribute(corpus, range(8000), 512, 1)
    assert time.process_time() - started < 2  # 0.4 s; trying every number took 4.8
    assert sorted(i for pack in packs for i in pack) == list(range(8000))
    assert max(packing.build(corpus, pack).tokens for pack in packs) <= 512
    prefixes = np.array(corpus.prefix_lengths)
    assert len(packs) < 1.15 * (lengths + 2).sum() / (512 - prefixes.max())


@given(corpora)
def test_a_pack_shows_each_example_whole_and_at_its_own_positions(corpus: Corpus) -> None:
    pack = packing.build(corpus, range(len(corpus)))
    views = [[*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)] for s in pack.segments]
    seen = {tuple(pack.ids[view]): list(pack.positions[view]) for view in views}
    for i in range(len(corpus)):
        if corpus.length(i) > corpus.prefix_lengths[corpus.kinds[i]]:
            assert seen[tuple(corpus.example(i))] == list(range(corpus.length(i)))


@given(corpora)
def test_a_pack_is_trained_on_every_answer_token_and_no_other(corpus: Corpus) -> None:
    pack = packing.build(corpus, range(len(corpus)))
    answers = [corpus.example(i)[corpus.prompt_lengths[i] :] for i in range(len(corpus))]
    assert sorted(pack.labels) == sorted(t for answer in answers for t in answer)
    assert len(pack.sources) == pack.targets == sum(map(len, answers))


def padded_loss(model: PreTrainedModel, corpus: Corpus, members: list[int]) -> torch.Tensor:
    """The recipe of 2023 with transformers alone: pad, mask the prompt, sum the losses."""
    examples = [torch.tensor(corpus.example(i)).long() for i in members]
    ids = torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, i in enumerate(members):
        prompt, length = int(corpus.prompt_lengths[i]), corpus.length(i)
        labels[row, prompt:length] = ids[row, prompt:length]
        mask[row, :length] = 1
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat(
        [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    )


@pytest.mark.parametrize("members", [range(20), range(1), range(100, 140), range(0, 240, 17)])
def test_packed_loss_and_gradient_equal_the_padded_ones(
    plain: PreTrainedModel, packed: TargetLoss, corpus: Corpus, members: range
) -> None:
    chosen = [i for i in members if corpus.targets(i) > 0]
    assert {int(corpus.kinds[i]) for i in chosen} == {0, 1} or len(chosen) == 1
    assert max(corpus.prefix_lengths) > 10  # or sharing would not be tested
    plain.zero_grad()
    packed.zero_grad()
    expected = padded_loss(plain, corpus, chosen)
    expected.backward()
    total = torch.zeros(())
    for share in packing.distribute(corpus, chosen, 640, world_size=2):
        for pack in share:
            value = torch.zeros(())
            if pack:
                value = loss.pack_loss(packed, packing.build(corpus, pack), CPU)
                value.backward()
            total += value.detach()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = gradient(packed), gradient(plain)
    assert (ours - theirs).norm() / theirs.norm() < 1e-6


def test_changing_one_example_changes_no_other_examples_loss(
    packed: TargetLoss, corpus: Corpus
) -> None:
    def hidden(source: Corpus) -> torch.Tensor:
        pack = packing.build(source, [0, 1, 2, 3])
        decoder = packed.model.base_model
        with torch.no_grad():
            return decoder(
                input_ids=torch.tensor(pack.ids)[None],
                position_ids=torch.tensor(pack.positions)[None],
                pack=attention.index(pack.segments, CPU),
            ).last_hidden_state[0]

    ids = np.array(corpus.ids)
    inside = slice(int(corpus.offsets[1]) + max(corpus.prefix_lengths) + 1, int(corpus.offsets[2]))
    ids[inside] = (ids[inside] + 7) % 900
    changed = Corpus(**{**vars(corpus), "ids": ids})
    differ = (hidden(corpus) - hidden(changed)).abs().amax(-1) > 0
    pack = packing.build(corpus, [0, 1, 2, 3])
    touched = [s for s in pack.segments if differ[s.start : s.end].any()]
    assert len(touched) == 1
    assert (
        touched[0].end - touched[0].start
        == corpus.length(1) - corpus.prefix_lengths[corpus.kinds[1]]
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("run", [attention.segmentwise, attention.blockwise])
@given(corpora, st.integers(0, 1000), st.integers(1, 9))
def test_attention_and_its_gradient_equal_dense_attention_over_the_index_tensors(
    run: Any, monkeypatch: pytest.MonkeyPatch, corpus: Corpus, seed: int, block: int
) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    pack = packing.build(corpus, range(len(corpus)))
    index = attention.index(pack.segments, CPU)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(pack.tokens, 4, 8, generator=generator, dtype=torch.float64)
    k, v = (
        torch.randn(pack.tokens, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    above = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    ours, wanted = run(*inputs, 0.3, index), dense(*inputs, index, 0.3)
    torch.testing.assert_close(ours, wanted)
    for found, right in zip(
        torch.autograd.grad(ours, inputs, above),
        torch.autograd.grad(wanted, inputs, above),
        strict=True,
    ):
        torch.testing.assert_close(found, right)


def test_a_cpu_computes_attention_in_blocks(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(attention, "segmentwise")
    pack = packing.build(corpus, range(3))
    q = torch.randn(pack.tokens, 2, 8)
    index = attention.index(pack.segments, CPU)
    heads = q.transpose(0, 1)[None]
    out, _ = attention.packed_attention(
        torch.nn.Identity(), heads, heads, heads, None, scaling=0.3, pack=index
    )
    assert torch.equal(out[0], attention.blockwise(q, q, q, 0.3, index))


@pytest.mark.parametrize(
    ("dtype", "capability", "fused"),
    [
        (torch.bfloat16, (9, 0), True),
        (torch.float16, (8, 0), True),
        (torch.float32, (9, 0), False),  # FlashAttention takes half precision only
        (torch.float16, (7, 5), False),  # and no GPU before Ampere
        (torch.bfloat16, None, False),
    ],
)
def test_the_fused_kernel_is_used_where_it_runs(
    dtype: torch.dtype, capability: tuple[int, int] | None, fused: bool
) -> None:
    assert attention.has_kernel(dtype, capability) is fused


def test_segmentwise_attention_stays_on_the_device_of_the_queries(corpus: Corpus) -> None:
    meta = torch.device("meta")
    pack = packing.build(corpus, range(3))
    q, k = (torch.empty(pack.tokens, heads, 8, device=meta) for heads in (4, 2))
    out = attention.segmentwise(q, k, k, 0.3, attention.index(pack.segments, meta))
    assert (out.device, out.shape) == (meta, q.shape)


@given(corpora)
def test_the_index_names_each_segments_keys_and_the_longest(corpus: Corpus) -> None:
    pack = packing.build(corpus, range(len(corpus)))
    index = attention.index(pack.segments, CPU)
    queries, keys = (torch.diff(ends).tolist() for ends in (index.cu_q, index.cu_k))
    assert queries == [s.end - s.start for s in pack.segments]
    assert keys == [s.prefix_end - s.prefix_start + s.end - s.start for s in pack.segments]
    assert (index.max_q, index.max_k) == (max(queries), max(keys))
    assert (index.cu_q[-1], index.cu_k[-1]) == (pack.tokens, len(index.gather))
    assert index.cu_q.dtype == index.cu_k.dtype == torch.int32
    for s, seen in zip(pack.segments, index.gather.split(keys), strict=True):
        assert seen.tolist() == [*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)]


@given(corpora, st.integers(62, 200))
def test_filled_packs_have_one_of_eight_lengths_and_stay_within_capacity(
    corpus: Corpus, capacity: int
) -> None:
    allowed = packing.lengths(capacity)
    assert len(allowed) == 8
    assert allowed[-1] == capacity
    [shares] = packing.distribute(corpus, range(len(corpus)), capacity, 1)
    for share in shares:
        pack = packing.build(corpus, share)
        filled = packing.fill(pack, allowed)
        assert pack.tokens <= filled.tokens
        assert filled.tokens == len(filled.positions) == filled.segments[-1].end
        assert filled.tokens in allowed
        assert filled.ids[: pack.tokens].tolist() == pack.ids.tolist()
        assert filled.labels is pack.labels


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: attention.PackIndex, scaling: float
) -> torch.Tensor:
    """Variable-length attention written out: causal, aligned at the end of each segment."""
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    out = torch.zeros_like(q)
    for s in range(len(index.cu_q) - 1):
        rows = slice(int(index.cu_q[s]), int(index.cu_q[s + 1]))
        keys = index.gather[int(index.cu_k[s]) : int(index.cu_k[s + 1])]
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * scaling
        late = torch.ones(scores.shape[1:]).triu(scores.shape[2] - scores.shape[1] + 1).bool()
        weights = scores.masked_fill(late, -torch.inf).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v[keys])
    return out


def test_a_rank_without_examples_runs_a_pack_that_adds_nothing(
    packed: TargetLoss, corpus: Corpus
) -> None:
    packed.zero_grad()
    value = loss.pack_loss(packed, packing.idle(corpus, 0), CPU)
    value.backward()
    assert value.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in packed.parameters())
