"""Packs the examples of a step: no padding, and the template computed once per pack.

Pure functions over token ids. A pack is one long sequence. For each kind of example in it, it holds
the tokens that all examples of that kind start with (the shared prefix), then each example's own
tokens. Positions are those that the example would have alone. An example's queries attend only to
its prefix and its own tokens, so losses and gradients are those of the padded recipe, step by step.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from alpaca.recipe.corpus import Corpus

Ints = npt.NDArray[np.int64]
ONE_BY_ONE = 32  # pack counts tried one after another; more than a training step ever needs


@dataclass(frozen=True)
class Segment:
    """Tokens `start:end` of a pack attend, causally, to `prefix_start:prefix_end` and themselves.

    A prefix is a segment too: one without a prefix of its own.
    """

    start: int
    end: int
    prefix_start: int
    prefix_end: int


@dataclass(frozen=True)
class Pack:
    """One forward pass.

    ids, positions: (tokens,). segments cover the tokens without gap, in order.
    sources: (targets,) positions in the pack whose hidden state predicts labels: (targets,).
    """

    ids: Ints
    positions: Ints
    segments: tuple[Segment, ...]
    sources: Ints
    labels: Ints

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return len(self.ids)

    @property
    def targets(self) -> int:
        """How many tokens it is trained on."""
        return len(self.labels)


def build(corpus: Corpus, example_ids: Sequence[int], *, padded: bool = False) -> Pack:
    """Build one pack of the examples `example_ids`.

    `padded` is the recipe of 2023, for comparison: no shared prefix, and every example followed
    by padding (never attended to) up to the length of the longest.
    """
    ids: list[npt.NDArray[np.int32]] = []
    positions, sources, labels, segments = [], [], [], []
    at = 0
    longest = max(corpus.length(i) for i in example_ids) if padded else 0
    for kind in (0, 1):
        group = [i for i in example_ids if corpus.kinds[i] == kind]
        if not group:
            continue
        shared = 0 if padded else corpus.prefix_lengths[kind]
        prefix_start, prefix_end = at, at + shared
        if shared:
            ids.append(corpus.example(group[0])[:shared])
            positions.append(np.arange(shared))
            segments.append(Segment(prefix_start, prefix_end, prefix_start, prefix_start))
            at = prefix_end
        for i in group:
            own = corpus.example(i)[shared:]
            if not len(own):  # cut off inside the prefix: nothing of its own is left
                continue
            prompt = int(corpus.prompt_lengths[i]) - shared
            size = max(len(own), longest)
            ids.append(np.pad(own, (0, size - len(own))))
            positions.append(np.arange(shared, shared + size))
            segments.append(Segment(at, at + size, prefix_start, prefix_end))
            source = at - 1 + np.arange(prompt, len(own))
            if prompt == 0 and len(source):  # the prefix's last token predicts the first target
                source[0] = prefix_end - 1
            sources.append(source)
            labels.append(own[prompt:])
            at += size
    return Pack(
        ids=_join(ids),
        positions=_join(positions),
        segments=tuple(segments),
        sources=_join(sources),
        labels=_join(labels),
    )


def _join(parts: Sequence[npt.NDArray[np.integer]]) -> Ints:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def distribute(
    corpus: Corpus, example_ids: Sequence[int], capacity: int, world_size: int
) -> list[list[list[int]]]:
    """Distribute a step's examples: `[rank][pack]` lists of example_ids.

    Every rank gets the same number of packs: the fewest that hold all examples within `capacity`
    tokens each. Examples are placed longest first, each into the emptiest pack, which balances the
    load. A rank may get an empty pack if there are fewer examples than packs.
    """
    chunk = np.asarray(example_ids, dtype=np.int64)
    shared = np.asarray(corpus.prefix_lengths)
    kinds = corpus.kinds[chunk].astype(np.int64)
    own = corpus.offsets[chunk + 1] - corpus.offsets[chunk] - shared[kinds]
    order = np.lexsort((chunk, -own))
    count, placed = _search(own[order], kinds[order], shared, capacity, world_size)
    packs = [chunk[order[placed == pack]].tolist() for pack in range(count * world_size)]
    return [packs[rank::world_size] for rank in range(world_size)]


def batches(example_ids: Sequence[int], batch: int, world_size: int) -> list[list[list[int]]]:
    """Distribute a step's examples as in 2023: `[rank][batch]`, in order, `batch` at a time."""
    count = -(-len(example_ids) // (batch * world_size))
    pieces = [
        list(example_ids[start : start + batch]) for start in range(0, len(example_ids), batch)
    ]
    pieces += [[] for _ in range(count * world_size - len(pieces))]
    return [pieces[rank::world_size] for rank in range(world_size)]


def _search(
    own: Ints, kinds: Ints, shared: Ints, capacity: int, world_size: int
) -> tuple[int, Ints]:
    """The fewest packs per rank into which `_place` fits the examples, and each example's pack.

    Counts are tried one by one, because more packs may fail where fewer do not. A large set, such
    as a held-out one, needs hundreds more than the lower bound, so after `ONE_BY_ONE` tries the
    search doubles its step and then bisects.
    """

    def placed(count: int) -> Ints | None:
        return _place(own, kinds, shared, capacity, count * world_size)

    least = max(1, -(-_lower_bound(own, kinds, shared, capacity) // world_size))
    for count in range(least, least + ONE_BY_ONE):
        if (found := placed(count)) is not None:
            return count, found
    failed, step = count, ONE_BY_ONE
    while (found := placed(failed + step)) is None:
        failed, step = failed + step, 2 * step
    count = failed + step
    while count - failed > 1:
        middle = (failed + count) // 2
        if (fewer := placed(middle)) is None:
            failed = middle
        else:
            count, found = middle, fewer
    return count, found


def _place(own: Ints, kinds: Ints, shared: Ints, capacity: int, packs: int) -> Ints | None:
    """The pack of each example, longest first: the one that it leaves emptiest; None: no fit."""
    prefixes = shared.tolist()
    # One heap of packs, as (tokens, number), for each set of prefixes in a pack, as a bit mask:
    # bit 0 is the prefix without input, bit 1 the one with input.
    heaps: list[list[tuple[int, int]]] = [[(0, pack) for pack in range(packs)], [], [], []]
    placed = np.empty(len(own), dtype=np.int64)
    for at, (size, kind) in enumerate(zip(own.tolist(), kinds.tolist(), strict=True)):
        bit, prefix = 1 << kind, prefixes[kind]
        best = None
        for present, heap in enumerate(heaps):
            if heap:
                load, pack = heap[0]
                after = (load if present & bit else load + prefix, pack, present)
                best = after if best is None or after < best else best
        assert best is not None
        load, pack, present = best
        if load + size > capacity:
            return None
        heapq.heappop(heaps[present])
        heapq.heappush(heaps[present | bit], (load + size, pack))
        placed[at] = pack
    return placed


def _lower_bound(own: Ints, kinds: Ints, shared: Ints, capacity: int) -> int:
    """A lower bound on the number of packs, from which the search starts.

    A pack also holds the prefix of each kind in it, so it has space for `capacity - shared[kind]`
    tokens of examples. It holds at most one example that is longer than half of that.
    """
    spaces = capacity - shared
    filled = Fraction(0)
    for kind, space in enumerate(spaces.tolist()):
        tokens = int(own[kinds == kind].sum())
        filled += Fraction(tokens, space) if tokens else 0
    halves = int((2 * own > spaces[kinds]).sum())
    return max(1, math.ceil(filled), halves)


def padded_tokens(corpus: Corpus, example_ids: Sequence[int], batch: int) -> int:
    """Tokens the recipe of 2023 computes: batches of `batch`, each padded to its longest."""
    lengths = [corpus.length(i) for i in example_ids]
    batches = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
    return sum(max(lengths) * len(lengths) for lengths in batches)


def lengths(capacity: int) -> tuple[int, ...]:
    """The eight lengths that packs of at most `capacity` tokens are padded to."""
    return tuple(-(-capacity * eighth // 8) for eighth in range(1, 9))


def fill(pack: Pack, lengths: Sequence[int]) -> Pack:
    """Pad the pack to the next of the ascending `lengths`; padding is never attended to."""
    end = next((length for length in lengths if length >= pack.tokens), pack.tokens)
    missing = end - pack.tokens
    if not missing:
        return pack
    nothing = np.zeros(missing, dtype=np.int64)
    return replace(
        pack,
        ids=np.concatenate([pack.ids, nothing]),
        positions=np.concatenate([pack.positions, np.arange(missing)]),
        segments=(*pack.segments, Segment(pack.tokens, end, pack.tokens, pack.tokens)),
    )


def plain(ids: Sequence[int]) -> Pack:
    """One sequence without labels, to predict the token after its last one."""
    return unlabelled([ids])


def unlabelled(sequences: Sequence[Sequence[int]]) -> Pack:
    """Sequences without labels or a shared prefix, to predict the token after each one's last."""
    ends = np.cumsum([len(ids) for ids in sequences]).tolist()
    starts = [0, *ends[:-1]]
    return Pack(
        ids=np.concatenate([np.asarray(ids, dtype=np.int64) for ids in sequences]),
        positions=np.concatenate([np.arange(len(ids)) for ids in sequences]),
        segments=tuple(Segment(a, b, a, a) for a, b in zip(starts, ends, strict=True)),
        sources=np.asarray(ends) - 1,
        labels=np.zeros(0, dtype=np.int64),
    )


def idle(corpus: Corpus, member: int) -> Pack:
    """A pack with one example's first token and no targets, for a rank that has no example."""
    return replace(plain([int(corpus.ids[corpus.offsets[member]])]), sources=_join([]))
