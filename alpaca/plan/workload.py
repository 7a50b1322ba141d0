"""What a run will compute, counted in advance: the same packs, without their tokens.

The packs of a step are a pure function of the examples' lengths, so they can be made before
there is a model. Without a tokenizer or without the data, lengths are estimated, and the plan
says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from alpaca.pairs import Pair
from alpaca.prompt import PREFIXES, render
from alpaca.recipe import packing
from alpaca.recipe.arguments import PackingFlags
from alpaca.recipe.corpus import Corpus
from alpaca.recipe.steps import Schedule
from alpaca.records import Record

BYTES_PER_TOKEN = 4.0  # of English; LLaMA's tokenizers are a little above or below
MOST_PLACED = 400_000  # examples over all epochs; with more, steps are sampled


@dataclass(frozen=True)
class LargestPack:
    """The largest pack: its tokens, the keys its segments attend to, its target tokens.

    `repeated`: a step has several packs, so gradients of earlier packs are in memory too.
    """

    tokens: int
    keys: int
    targets: int
    repeated: bool = False

    def filled(self, capacity: int) -> "LargestPack":
        """This pack scaled up to `capacity` tokens of the same kind of examples."""
        if not 0 < self.tokens < capacity:
            return self
        keys, targets = (n * capacity // self.tokens for n in (self.keys, self.targets))
        return LargestPack(capacity, keys, targets, self.repeated)


@dataclass(frozen=True)
class Workload:
    """What all steps together compute, on all ranks.

    `real`: tokens of the sequences themselves; `tokens`: computed, with a shared prefix once per
    pack; `padded`: computed by the recipe of 2023. `attended`: pairs of a query and a key; `packs`:
    of one rank. `exact`: nothing is estimated. `reference`: each pack is also computed forward
    without the adapter, as DPO does.
    """

    examples: int
    steps: int
    batch: int
    tokens: int
    real: int
    padded: int
    targets: int
    attended: int
    packs: int
    largest: LargestPack
    exact: bool
    reference: bool = False


def count(
    corpus: Corpus,
    train: Sequence[int],
    schedule: Schedule,
    flags: PackingFlags,
    world_size: int,
    *,
    exact: bool = True,
    most: int = MOST_PLACED,
) -> Workload:
    """Make the packs of every step, or of evenly spaced steps if they have over `most` examples.

    Where steps are sampled, the largest pack is assumed to be full.
    """
    stride = max(1, -(-schedule.steps * schedule.batch // most))
    total = np.zeros(6, dtype=np.int64)  # tokens, real, padded, targets, attended, packs
    largest = LargestPack(0, 0, 0)
    chosen = range(0, schedule.steps, stride)
    lengths = np.diff(corpus.offsets)
    targets = lengths - corpus.prompt_lengths.astype(np.int64)
    for step in chosen:
        chunk = [train[i] for i in schedule.indices(step)]
        packs = _packs(corpus, chunk, flags, world_size)
        tokens, keys, pack_targets, attended = _measure(
            corpus, packs, lengths, targets, flags.packing
        )
        padded = packing.padded_tokens(corpus, chunk, flags.per_device_train_batch_size)
        real = lengths[chunk].sum()
        if corpus.rejected_lengths is not None:  # each answer with a prompt of its own
            real += corpus.prompt_lengths[chunk].sum()
        pack_count = len(packs) // world_size
        total += (tokens.sum(), real, padded, pack_targets.sum(), attended, pack_count)
        top = int(tokens.argmax())
        repeated = largest.repeated or len(packs) > world_size
        if tokens[top] > largest.tokens:
            largest = LargestPack(int(tokens[top]), int(keys[top]), int(pack_targets.max()))
        largest = replace(largest, repeated=repeated)
    if flags.packing and (stride > 1 or flags.torch_compile):
        # compiled layers get packs that are filled up with padding
        largest = largest.filled(flags.pack_tokens)
    scaled = [int(value) * schedule.steps // max(1, len(chosen)) for value in total]
    return Workload(
        examples=len(train),
        steps=schedule.steps,
        batch=schedule.batch,
        tokens=scaled[0],
        real=scaled[1],
        padded=scaled[2],
        targets=scaled[3],
        attended=scaled[4],
        packs=scaled[5],
        largest=largest,
        exact=exact and stride == 1,
        reference=corpus.rejected_lengths is not None,
    )


Ints = npt.NDArray[np.int64]


def _packs(
    corpus: Corpus, example_ids: Sequence[int], flags: PackingFlags, world_size: int
) -> list[Ints]:
    """The packs of one step, of all ranks."""
    if flags.packing:
        by_rank = packing.distribute(corpus, example_ids, flags.pack_tokens, world_size)
    else:
        by_rank = packing.batches(example_ids, flags.per_device_train_batch_size, world_size)
    in_order = (pack for packs in zip(*by_rank, strict=True) for pack in packs)
    return [np.asarray(pack, dtype=np.int64) for pack in in_order]


def _measure(
    corpus: Corpus, packs: list[Ints], lengths: Ints, targets: Ints, packed: bool
) -> tuple[Ints, Ints, Ints, int]:
    """For each pack its tokens, keys and targets; and all pairs of a query and a key."""
    shared = np.asarray(corpus.prefix_lengths)
    found = np.zeros((3, len(packs)), dtype=np.int64)
    attended = 0
    for at, pack in enumerate(packs):
        if not len(pack):
            found[:, at] = (1, 1, 0)  # an idle rank computes one token
            continue
        if not packed:
            alone = [length for i in pack for length in corpus.alone(i)]
            longest, padded = max(alone), max(alone) * len(alone)
            found[:, at] = (padded, padded, targets[pack].sum())
            attended += padded * (longest + 1) // 2
            continue
        prefix = shared[corpus.kinds[pack]]
        own = lengths[pack] - prefix
        present = shared[np.unique(corpus.kinds[pack])]
        tokens = int(own.sum() + present.sum())
        found[:, at] = (
            tokens,
            int((own + prefix)[own > 0].sum() + present.sum()),
            targets[pack].sum(),
        )
        attended += int((own * (own + 1) // 2 + own * prefix).sum())
        attended += int((present * (present + 1) // 2).sum())
        if corpus.rejected_lengths is not None:
            # Both answers attend to the prompt, and neither to the other.
            rejected = corpus.rejected_lengths[pack].astype(np.int64)
            found[1, at] += 2 * int(corpus.prompt_lengths[pack][rejected > 0].sum())
            attended -= int((rejected * (targets[pack] - rejected)).sum())
    return found[0], found[1], found[2], attended


def estimated(
    records: Sequence[Record] | Sequence[Pair], flags: PackingFlags, examples: int = 0
) -> Corpus:
    """A corpus without tokens: lengths from the texts' bytes, repeated to `examples` examples."""
    number = examples or len(records)
    limit = flags.model_max_length
    texts = [render(record.instruction, record.input) for record in records]
    prompts = np.asarray([min(limit, _tokens(text)) for text in texts])
    first = [r.output if isinstance(r, Record) else r.chosen for r in records]
    answers = np.asarray([_tokens(text) + 1 for text in first])
    others = [_tokens(r.rejected) + 1 if isinstance(r, Pair) else 0 for r in records]
    rejected = np.minimum(limit - prompts, others)
    kinds = np.asarray([bool(record.input) for record in records], dtype=np.uint8)
    at = np.arange(number) % len(records)
    totals = (np.minimum(limit, prompts + answers) + rejected)[at]
    return Corpus(
        ids=np.zeros(0, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(totals)]).astype(np.int64),
        prompt_lengths=prompts[at].astype(np.int32),
        kinds=kinds[at],
        prefix_lengths=(_tokens(PREFIXES[0]), _tokens(PREFIXES[1])),
        truncated=int((prompts + np.maximum(answers, others) > limit)[at].sum()),
        rejected_lengths=rejected[at].astype(np.int32) if flags.loss == "dpo" else None,
    )


def _tokens(text: str) -> int:
    return max(1, round(len(text.encode()) / BYTES_PER_TOKEN))
