"""The packs that are counted in advance are the packs the trainer makes."""

import dataclasses
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from alpaca.folder import load_tokenizer
from alpaca.plan import workload
from alpaca.recipe import packing, steps
from alpaca.recipe.arguments import Arguments
from alpaca.recipe.corpus import Corpus, open_corpus, split
from alpaca.records import read_records
from alpaca.tokens import Codec

SEEDS = Path(__file__).resolve().parent.parent / "data" / "seed_tasks.jsonl"


def made_up(examples: list[tuple[int, int, bool]], shared: tuple[int, int]) -> Corpus:
    """A corpus of examples given as tokens after the prefix, how many of them are prompt, kind."""
    kinds = np.asarray([kind for _, _, kind in examples], dtype=np.uint8)
    own = np.asarray([size for size, _, _ in examples])
    lengths = own + np.asarray(shared)[kinds]
    prompts = np.asarray([min(size, prompt) for size, prompt, _ in examples])
    return Corpus(
        ids=np.zeros(int(lengths.sum()), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=(prompts + np.asarray(shared)[kinds]).astype(np.int32),
        kinds=kinds,
        prefix_lengths=shared,
        truncated=0,
    )


def trained(corpus: Corpus, arguments: Arguments, ranks: int) -> dict[str, int]:
    """What the training loop computes, with the packs it builds."""
    members, _ = split(corpus, arguments.eval_fraction, arguments.seed)
    schedule = steps.schedule(arguments, len(members), ranks)
    found = {"tokens": 0, "real": 0, "padded": 0, "targets": 0, "attended": 0, "packs": 0}
    for step in range(schedule.steps):
        chunk = [members[i] for i in schedule.indices(step)]
        batch = arguments.per_device_train_batch_size
        if arguments.packing:
            shares = packing.distribute(corpus, chunk, arguments.pack_tokens, ranks)
        else:
            shares = packing.batches(chunk, batch, ranks)
        found["packs"] += len(shares[0])
        found["real"] += sum(corpus.length(i) for i in chunk)
        found["padded"] += packing.padded_tokens(corpus, chunk, batch)
        for pack in (pack for share in shares for pack in share):
            if not pack:
                found["tokens"] += 1  # an idle rank's
                continue
            built = packing.build(corpus, pack, padded=not arguments.packing)
            found["tokens"] += built.tokens
            found["targets"] += built.targets
            for s in built.segments:
                own = s.end - s.start
                found["attended"] += own * (own + 1) // 2 + own * (s.prefix_end - s.prefix_start)
    return found


def counted(corpus: Corpus, arguments: Arguments, ranks: int) -> dict[str, int]:
    members, _ = split(corpus, arguments.eval_fraction, arguments.seed)
    schedule = steps.schedule(arguments, len(members), ranks)
    work = workload.count(corpus, members, schedule, arguments, ranks)
    assert work.exact
    assert work.steps == schedule.steps
    return {
        name: getattr(work, name)
        for name in ("tokens", "real", "padded", "targets", "attended", "packs")
    }


@given(
    st.lists(
        st.tuples(st.integers(1, 50), st.integers(0, 40), st.booleans()), min_size=3, max_size=40
    ),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.integers(1, 3),
    st.integers(0, 80),
    st.booleans(),
)
def test_counted_work_is_what_the_loop_computes(
    examples: list[tuple[int, int, bool]],
    shared: tuple[int, int],
    ranks: int,
    capacity: int,
    packed: bool,
) -> None:
    corpus = made_up(
        [(max(size, prompt + 1), prompt, kind) for size, prompt, kind in examples], shared
    )
    arguments = Arguments(
        model_max_length=60,
        max_tokens_per_pack=60 + capacity,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        packing=packed,
    )
    assert counted(corpus, arguments, ranks) == trained(corpus, arguments, ranks)


def test_the_largest_pack_of_real_data_is_found(tiny_model: Path, tmp_path: Path) -> None:
    corpus = open_corpus(SEEDS, Codec(load_tokenizer(tiny_model)), tmp_path, 512)
    arguments = Arguments(num_train_epochs=1, eval_fraction=0.1)
    members, _ = split(corpus, arguments.eval_fraction, arguments.seed)
    assert len(members) == 216
    schedule = steps.schedule(arguments, len(members), 1)
    work = workload.count(corpus, members, schedule, arguments, 1)
    tokens, keys = 0, 0
    for step in range(schedule.steps):
        chunk = [members[i] for i in schedule.indices(step)]
        for pack in packing.distribute(corpus, chunk, arguments.pack_tokens, 1)[0]:
            built = packing.build(corpus, pack)
            if built.tokens > tokens:
                tokens = built.tokens
                keys = sum(s.end - s.start + s.prefix_end - s.prefix_start for s in built.segments)
    assert (work.largest.tokens, work.largest.keys) == (tokens, keys)
    assert work.largest.tokens > arguments.pack_tokens // 2


def test_sampled_steps_estimate_what_all_steps_compute(tiny_model: Path, tmp_path: Path) -> None:
    corpus = open_corpus(SEEDS, Codec(load_tokenizer(tiny_model)), tmp_path, 512)
    arguments = Arguments(gradient_accumulation_steps=1, num_train_epochs=4)
    schedule = steps.schedule(arguments, len(corpus), 1)
    whole, part = (
        workload.count(corpus, range(len(corpus)), schedule, arguments, 1, most=most)
        for most in (10_000, 300)
    )
    assert whole.exact
    assert not part.exact
    assert part.largest.tokens == arguments.pack_tokens >= whole.largest.tokens
    assert part.largest.keys >= whole.largest.keys
    assert part.tokens != whole.tokens
    assert abs(part.tokens / whole.tokens - 1) < 0.1


def test_estimated_lengths_repeat_the_data_set_to_the_size_asked_for() -> None:
    records = read_records(SEEDS)
    arguments = Arguments()
    once = workload.estimated(records, arguments)
    many = workload.estimated(records, arguments, 10 * len(records))
    assert len(once) == len(records)
    assert len(many) == 10 * len(records)
    assert int(many.offsets[-1]) == 10 * int(once.offsets[-1])
    longest = dataclasses.replace(arguments, model_max_length=64)
    assert max(np.diff(workload.estimated(records, longest).offsets)) == 64
