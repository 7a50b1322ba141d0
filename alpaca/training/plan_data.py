"""What a run will compute, counted in advance: the same packs, without their tokens.

The packs of a step are a pure function of the examples' lengths, so they can be made before
there is a model. Where no tokenizer is at hand, or no data yet, lengths are estimated, and the
plan says so.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alpaca.prompt import PREFIXES, render
from alpaca.records import Record
from alpaca.training import packing
from alpaca.training.arguments import Arguments
from alpaca.training.corpus import Corpus
from alpaca.training.steps import Schedule

BYTES_PER_TOKEN = 4.0  # of English; LLaMA's tokenizers lie a little above and below
MOST_PLACED = 400_000  # examples, counting every epoch: about 4 s; more are sampled


@dataclass(frozen=True)
class Load:
    """The largest pack: its tokens, the keys its segments attend to, its target tokens.

    `repeated`: a step has more than one, so gradients of earlier ones lie there beside it.
    """

    tokens: int
    keys: int
    targets: int
    repeated: bool = False


@dataclass(frozen=True)
class Work:
    """What all steps together compute, on all ranks.

    `attended`: pairs of a query and a key; `packs`: of one rank. `exact`: nothing is estimated.
    """

    examples: int
    steps: int
    batch: int
    tokens: int
    padded: int
    targets: int
    attended: int
    packs: int
    largest: Load
    exact: bool


def members(corpus: Corpus, arguments: Arguments) -> list[int]:
    """Indices of the examples that are trained on: with targets, and not held out."""
    usable = [i for i in range(len(corpus)) if corpus.targets(i) > 0]
    held = 0 if arguments.eval_data_path else round(arguments.eval_fraction * len(usable))
    order = [int(i) for i in np.random.default_rng([arguments.seed]).permutation(usable)]
    return sorted(order[held:])


def count(
    corpus: Corpus, train: Sequence[int], schedule: Schedule, arguments: Arguments,
    world_size: int, *, exact: bool = True, most: int = MOST_PLACED,
) -> Work:  # fmt: skip
    """Make the packs of every step, or of evenly chosen ones where that are more than `most`."""
    stride = max(1, -(-schedule.steps * schedule.batch // most))
    total = np.zeros(5, dtype=np.int64)  # tokens, padded, targets, attended, packs
    largest = Load(0, 0, 0)
    chosen = range(0, schedule.steps, stride)
    lengths = np.diff(corpus.offsets)
    targets = lengths - corpus.prompt_lengths.astype(np.int64)
    index = np.asarray(train, dtype=np.int64)
    for step in chosen:
        chunk = index[schedule.indices(step)]
        packs = _packs(corpus, chunk, lengths, arguments, world_size)
        tokens, keys, aims, attended = _measure(corpus, packs, lengths, targets, arguments.packing)
        total += (tokens.sum(), _padded(lengths[chunk], arguments.per_device_train_batch_size),
                  aims.sum(), attended, len(packs) // world_size)  # fmt: skip
        top = int(tokens.argmax())
        if tokens[top] > largest.tokens:
            repeated = len(packs) > world_size
            largest = Load(int(tokens[top]), int(keys[top]), int(aims.max()), repeated)
    scaled = [int(value) * schedule.steps // max(1, len(chosen)) for value in total]
    return Work(
        examples=len(train), steps=schedule.steps, batch=schedule.batch, tokens=scaled[0],
        padded=scaled[1], targets=scaled[2], attended=scaled[3], packs=scaled[4],
        largest=largest, exact=exact and stride == 1,
    )  # fmt: skip


Ints = npt.NDArray[np.int64]


def _packs(
    corpus: Corpus, chunk: Ints, lengths: Ints, arguments: Arguments, world_size: int
) -> list[Ints]:
    """The packs of one step, of all ranks, as `packing.distribute` and `batches` make them."""
    if not arguments.packing:
        batch = arguments.per_device_train_batch_size
        shares = packing.batches(list(map(int, chunk)), batch, world_size)
        return [np.asarray(pack, dtype=np.int64) for share in shares for pack in share]
    shared = np.asarray(corpus.prefix_lengths)
    kinds = corpus.kinds[chunk].astype(np.int64)
    own = lengths[chunk] - shared[kinds]
    order = np.lexsort((chunk, -own))
    capacity = arguments.pack_tokens
    total = int(own.sum() + shared.sum())
    packs = max(1, -(-total // (capacity * world_size)))
    while (
        placed := _place(own[order], kinds[order], shared, capacity, packs * world_size)
    ) is None:
        packs += 1
    return [chunk[order[placed == pack]] for pack in range(packs * world_size)]


def _place(own: Ints, kinds: Ints, shared: Ints, capacity: int, packs: int) -> Ints | None:
    """For each example, longest first, its pack: the one it leaves emptiest; None: no room."""
    load = np.zeros(packs, dtype=np.int64)
    missing = np.repeat(shared[:, None], packs, axis=1)  # prefix tokens a pack doesn't hold yet
    placed = np.empty(len(own), dtype=np.int64)
    for at, (size, kind) in enumerate(zip(own.tolist(), kinds.tolist(), strict=True)):
        after = load + missing[kind]
        best = int(after.argmin())
        if after[best] + size > capacity:
            return None
        load[best] = after[best] + size
        missing[kind, best] = 0
        placed[at] = best
    return placed


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
            longest = int(lengths[pack].max())
            found[:, at] = (longest * len(pack), longest * len(pack), targets[pack].sum())
            attended += len(pack) * longest * (longest + 1) // 2
            continue
        prefix = shared[corpus.kinds[pack]]
        own = lengths[pack] - prefix
        present = shared[np.unique(corpus.kinds[pack])]
        tokens = int(own.sum() + present.sum())
        found[:, at] = (tokens, int((own + prefix)[own > 0].sum() + present.sum()),
                        targets[pack].sum())  # fmt: skip
        attended += int((own * (own + 1) // 2 + own * prefix).sum())
        attended += int((present * (present + 1) // 2).sum())
    return found[0], found[1], found[2], attended


def _padded(lengths: Ints, batch: int) -> int:
    """As `packing.padded_tokens`: batches of `batch`, each padded to its longest."""
    pieces = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
    return sum(int(piece.max()) * len(piece) for piece in pieces)


def estimated(records: Sequence[Record], arguments: Arguments, examples: int = 0) -> Corpus:
    """A corpus without tokens: lengths from the texts' bytes, repeated to `examples` examples."""
    number = examples or len(records)
    limit = arguments.model_max_length
    texts = [render(record.instruction, record.input) for record in records]
    prompts = np.asarray([min(limit, _tokens(text)) for text in texts])
    answers = np.asarray([_tokens(record.output) + 1 for record in records])
    kinds = np.asarray([bool(record.input) for record in records], dtype=np.uint8)
    at = np.arange(number) % len(records)
    totals = np.minimum(limit, prompts + answers)[at]
    return Corpus(
        ids=np.zeros(0, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(totals)]).astype(np.int64),
        prompt_lengths=prompts[at].astype(np.int32),
        kinds=kinds[at],
        prefix_lengths=(_tokens(PREFIXES[0]), _tokens(PREFIXES[1])),
        truncated=int((prompts + answers > limit)[at].sum()),
    )


def _tokens(text: str) -> int:
    return max(1, round(len(text.encode()) / BYTES_PER_TOKEN))


def remembered(note: Path) -> dict[str, Any] | None:
    """What an earlier plan noted about where a data set's tokens are, or None."""
    try:
        found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found
