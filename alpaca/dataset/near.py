"""Exact and near duplicates among tens of thousands of texts, in seconds and without sampling.

Two texts are near when the ROUGE-L F-measure of their words reaches a threshold. That needs a
minimum number of common words, so two near texts share at least one of the few rarest words of
each (prefix filtering: Chaudhuri et al., 2006; Bayardo et al., 2007). An inverted index over those
words finds every candidate, and the exact score is computed for candidates only. No pair is missed.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import LCSseq

from alpaca.dataset.findings import NEAR
from alpaca.dataset.novelty import Alphabet

EPSILON = 1e-9

# A word; in scripts that put no spaces between words (from Thai on), a single character.
WORD = re.compile(r"[^\W\u0e00-\U0010ffff]+|\w")


@dataclass(frozen=True)
class Near:
    """Text `index` is near to the earlier text `other`."""

    index: int
    other: int
    score: float


def exact_duplicates(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(index, first index) of texts equal up to case and white space; empty ones are skipped."""
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        plain = " ".join(text.casefold().split())
        if plain and first.setdefault(plain, index) != index:
            yield index, first[plain]


def near_duplicates(
    texts: Sequence[str], skip: set[int], threshold: float = NEAR
) -> Iterator[Near]:
    """Each text that is near to an earlier kept text; a text near to none is kept.

    Removing every `index` therefore leaves no two near texts, and keeps one of each group.
    """
    words, rarest = _rare_first(texts)
    # (rare word, length) -> kept texts of that length that contain the word
    postings: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, text in enumerate(words):
        if index in skip or not text:
            continue
        near = [
            Near(index, other, 2 * common / (len(text) + len(words[other])))
            for least, candidates in _candidates(rarest[index], postings, threshold)
            for other in candidates
            if (common := LCSseq.similarity(text, words[other], score_cutoff=least))
        ]
        if near:
            yield min(near, key=lambda found: (-found.score, found.other))
        else:
            shortest = _ceil(len(text) * threshold / (2 - threshold))
            for word in _prefix(rarest[index], _least(len(text), shortest, threshold)):
                postings[word, len(text)].append(index)


def _candidates(
    rarest: list[int], postings: dict[tuple[int, int], list[int]], threshold: float
) -> Iterator[tuple[int, set[int]]]:
    """For each length a near text can have: the common words it needs, and the candidates."""
    length = len(rarest)
    shortest = _ceil(length * threshold / (2 - threshold))
    longest = math.floor(length * (2 - threshold) / threshold + EPSILON)
    for other in range(shortest, longest + 1):
        least = _least(length, other, threshold)
        prefix = _prefix(rarest, least)
        found = {index for word in prefix for index in postings.get((word, other), ())}
        if found:
            yield least, found


def _prefix(rarest: list[int], least: int) -> list[int]:
    """The rarest words; a text with `least` words in common contains at least one of them."""
    return rarest[: len(rarest) - least + 1]


def _least(length: int, other: int, threshold: float) -> int:
    """Common words that texts of these lengths need: F = 2 common / (length + other)."""
    return _ceil(threshold * (length + other) / 2)


def _ceil(value: float) -> int:
    """Round up, but not for the rounding error of a product like 0.9 * 10 / 2."""
    return math.ceil(value - EPSILON)


def _rare_first(texts: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Each text as one character per word, and its words as numbers, rarest first.

    The second `the` of a text has a different number from the first, so overlap counts repeats.
    """
    alphabet = Alphabet()
    words = [alphabet.spell(WORD.findall(text.lower())) for text in texts]
    numbers: dict[tuple[str, int], int] = {}
    numbered = []
    for text in words:
        seen: Counter[str] = Counter()
        ids = []
        for word in text:
            ids.append(numbers.setdefault((word, seen[word]), len(numbers)))
            seen[word] += 1
        numbered.append(ids)
    frequency = Counter(number for ids in numbered for number in ids)
    for ids in numbered:
        ids.sort(key=lambda number: (frequency[number], number))
    return words, numbered
