"""Packs the examples of a step: no padding, and the template computed once per pack.

Pure functions over token ids. A pack is one long sequence. For each kind of example in it, it holds
the tokens that all examples of that kind start with (the shared prefix), then each example's own
tokens. Positions are those that the example would have alone. An example's queries attend only to
its prefix and its own tokens, so losses and gradients are those of the padded recipe, step by step.

A preference pair is its prompt, once, and two answers that each attend to the prompt.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from alpaca.recipe.corpus import Corpus

Ints = npt.NDArray[np.int64]
Range = tuple[int, int]  # where in a pack tokens begin and end
NOTHING = (0, 0)
ONE_BY_ONE = 32  # pack counts tried one after another; more than a training step ever needs


@dataclass(frozen=True)
class Segment:
    """Tokens `start:end` of a pack attend, causally, to `prefix_start:prefix_end` and themselves.

    A prefix is an earlier segment, and what that attends to is attended to as well: the template
    by a pair's prompt, and both by its answers.
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
    owners: (targets,) of preference pairs, else empty: of pair i, 2i at its chosen answer's targets
    and 2i + 1 at its rejected one's.
    """

    ids: Ints
    positions: Ints
    segments: tuple[Segment, ...]
    sources: Ints
    labels: Ints
    owners: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return len(self.ids)

    @property
    def targets(self) -> int:
        """How many tokens it is trained on."""
        return len(self.labels)

    @property
    def answers(self) -> int:
        """How many answers its preference pairs have: two each."""
        return int(self.owners[-1]) + 1 if len(self.owners) else 0

    def attended(self) -> int:
        """Pairs of a token and one that it attends to: itself, and all before it in its sequence.

        A segment's first position says how many tokens come before it.
        """
        firsts = [int(self.positions[s.start]) for s in self.segments]
        sizes = [s.end - s.start for s in self.segments]
        return sum(n * first + n * (n + 1) // 2 for n, first in zip(sizes, firsts, strict=True))


def build(corpus: Corpus, example_ids: Sequence[int], *, padded: bool = False) -> Pack:
    """Build one pack of the examples `example_ids`.

    `padded` is the recipe of 2023, for comparison: no shared prefix, and every sequence followed
    by padding (never attended to) up to the length of the longest.
    """
    made = _Layout()
    longest = max(max(corpus.alone(i)) for i in example_ids) if padded else 0
    for kind in (0, 1):
        group = [i for i in example_ids if corpus.kinds[i] == kind]
        if not group:
            continue
        shared = 0 if padded else corpus.prefix_lengths[kind]
        prefix = made.add(corpus.example(group[0])[:shared], 0, NOTHING)
        for i in group:
            prompt = int(corpus.prompt_lengths[i])
            if corpus.rejected_lengths is None:
                made.add(corpus.example(i)[shared:], shared, prefix, prompt, longest)
            elif padded:
                for answer in corpus.answers(i):
                    sequence = np.concatenate([corpus.example(i)[:prompt], answer])
                    made.add(sequence, 0, NOTHING, prompt, longest)
            else:
                before = made.add(corpus.example(i)[shared:prompt], shared, prefix)
                for answer in corpus.answers(i):
                    made.add(answer, prompt, before, prompt)
    return made.pack(pairs=corpus.rejected_lengths is not None)


class _Layout:
    """A pack while it is built, segment by segment."""

    def __init__(self) -> None:
        self.at = 0
        self.ids: list[npt.NDArray[np.integer]] = []
        self.positions: list[Ints] = []
        self.segments: list[Segment] = []
        self.sources: list[Ints] = []
        self.labels: list[npt.NDArray[np.integer]] = []

    def add(
        self,
        own: npt.NDArray[np.integer],
        first: int,
        prefix: Range,
        prompt: int | None = None,
        size: int = 0,
    ) -> Range:
        """Add tokens that continue `prefix` at position `first`, padded to `size`.

        From position `prompt` on they are targets; None: none is. Returns where they are, or
        `prefix` if there are none (such as of an example that was cut off inside the prefix).
        """
        if not len(own):
            return prefix
        start, size = self.at, max(len(own), size)
        self.ids.append(np.pad(own, (0, size - len(own))))
        self.positions.append(np.arange(first, first + size))
        self.segments.append(Segment(start, start + size, *prefix))
        if prompt is not None:
            sources = start - 1 + np.arange(prompt - first, len(own))
            if prompt == first and len(sources):  # the prefix's last token predicts the first one
                sources[0] = prefix[1] - 1
            self.sources.append(sources)
            self.labels.append(own[prompt - first :])
        self.at += size
        return start, start + size

    def pack(self, *, pairs: bool) -> Pack:
        """The pack; with `pairs`, its sequences are chosen and rejected answers in turn."""
        owners = [np.full(len(part), i) for i, part in enumerate(self.labels)] if pairs else []
        return Pack(
            ids=_join(self.ids),
            positions=_join(self.positions),
            segments=tuple(self.segments),
            sources=_join(self.sources),
            labels=_join(self.labels),
            owners=_join(owners),
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
    batches = (example_ids[start : start + batch] for start in range(0, len(example_ids), batch))
    lengths = [[length for i in batch for length in corpus.alone(i)] for batch in batches]
    return sum(max(sequences) * len(sequences) for sequences in lengths)


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
