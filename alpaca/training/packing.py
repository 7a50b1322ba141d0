"""Examples of one optimizer step to packs: no padding, and the template computed once per pack.

Pure functions over token ids. A pack is one long sequence: for each kind of example present, the
tokens all examples of that kind start with (the shared prefix), then each example's own tokens.
Positions are those the example would have alone, and an example's queries see its prefix and
its own tokens only, so losses and gradients are those of the padded recipe, step by step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from alpaca.training.corpus import Corpus

Ints = npt.NDArray[np.int64]


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


def build(corpus: Corpus, members: Sequence[int], *, padded: bool = False) -> Pack:
    """Lay the examples `members` out as one pack.

    `padded` is the recipe of 2023, for comparison: no shared prefix, and every example followed
    by tokens that nobody looks at, up to the length of the longest.
    """
    ids: list[npt.NDArray[np.int32]] = []
    positions, sources, labels, segments = [], [], [], []
    at = 0
    longest = max(corpus.length(i) for i in members) if padded else 0
    for kind in (0, 1):
        group = [i for i in members if corpus.kinds[i] == kind]
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
        ids=_join(ids), positions=_join(positions), segments=tuple(segments),
        sources=_join(sources), labels=_join(labels),
    )  # fmt: skip


def _join(parts: Sequence[npt.NDArray[np.integer]]) -> Ints:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def distribute(
    corpus: Corpus, members: Sequence[int], capacity: int, world_size: int
) -> list[list[list[int]]]:
    """Share a step's examples out: `[rank][pack]` lists of members.

    Every rank gets the same number of packs, the fewest that hold all examples within `capacity`
    tokens each; longest first into the emptiest pack, which levels the load. A rank may get an
    empty pack where there are fewer examples than packs.
    """
    chunk = np.asarray(members, dtype=np.int64)
    shared = np.asarray(corpus.prefix_lengths)
    kinds = corpus.kinds[chunk].astype(np.int64)
    own = corpus.offsets[chunk + 1] - corpus.offsets[chunk] - shared[kinds]
    order = np.lexsort((chunk, -own))
    count = max(1, -(-int(own.sum() + shared.sum()) // (capacity * world_size)))
    while (
        placed := _place(own[order], kinds[order], shared, capacity, count * world_size)
    ) is None:
        count += 1
    packs = [chunk[order[placed == pack]].tolist() for pack in range(count * world_size)]
    return [packs[rank::world_size] for rank in range(world_size)]


def batches(members: Sequence[int], batch: int, world_size: int) -> list[list[list[int]]]:
    """Share a step's examples out as in 2023: `[rank][batch]`, in order, `batch` at a time."""
    count = -(-len(members) // (batch * world_size))
    pieces = [list(members[start : start + batch]) for start in range(0, len(members), batch)]
    pieces += [[] for _ in range(count * world_size - len(pieces))]
    return [pieces[rank::world_size] for rank in range(world_size)]


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


def padded_tokens(corpus: Corpus, members: Sequence[int], batch: int) -> int:
    """Tokens the recipe of 2023 computes: batches of `batch`, each padded to its longest."""
    lengths = [corpus.length(i) for i in members]
    batches = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
    return sum(max(lengths) * len(lengths) for lengths in batches)


def lengths(capacity: int) -> tuple[int, ...]:
    """The eight lengths that packs of at most `capacity` tokens are filled up to."""
    return tuple(-(-capacity * eighth // 8) for eighth in range(1, 9))


def fill(pack: Pack, lengths: Sequence[int]) -> Pack:
    """The pack with a segment that nobody looks at, up to the next of the ascending `lengths`."""
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
    """One sequence without targets, whose last token is asked what follows."""
    nothing = np.zeros(0, dtype=np.int64)
    return Pack(
        ids=np.asarray(ids, dtype=np.int64),
        positions=np.arange(len(ids)),
        segments=(Segment(0, len(ids), 0, 0),),
        sources=np.asarray([len(ids) - 1]),
        labels=nothing,
    )


def idle(corpus: Corpus, member: int) -> Pack:
    """A pack with one example's first token and no targets, for a rank that has no example."""
    return replace(plain([int(corpus.ids[corpus.offsets[member]])]), sources=_join([]))
