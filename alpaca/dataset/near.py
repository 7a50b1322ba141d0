"""Exact and near duplicates among tens of thousands of texts, in seconds and without sampling.

Two texts are near when the ROUGE-L F-measure of their words reaches a threshold. That needs a
minimum of common words, so two near texts must share one among the rarest few of each (prefix
filtering: Chaudhuri et al., 2006; Bayardo et al., 2007). An inverted index over those finds every
candidate, and the exact score is computed for candidates only: nothing is missed.
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
    """Each text that is near to an earlier one which is itself not near to an earlier one.

    Leaving out every `index` therefore leaves no two near texts, and one of each group stays.
    """
    words, rarest = _rare_first(texts)
    # (rare word, length) -> kept texts of that length which hold the word
    holders: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, text in enumerate(words):
        if index in skip or not text:
            continue
        near = [
            Near(index, other, 2 * common / (len(text) + len(words[other])))
            for least, candidates in _candidates(rarest[index], holders, threshold)
            for other in candidates
            if (common := LCSseq.similarity(text, words[other], score_cutoff=least))
        ]
        if near:
            yield min(near, key=lambda found: (-found.score, found.other))
        else:
            shortest = _ceil(len(text) * threshold / (2 - threshold))
            for word in _prefix(rarest[index], _least(len(text), shortest, threshold)):
                holders[word, len(text)].append(index)


def _candidates(
    rarest: list[int], holders: dict[tuple[int, int], list[int]], threshold: float
) -> Iterator[tuple[int, set[int]]]:
    """For each length a near text can have: the common words it needs, and who may have them."""
    length = len(rarest)
    shortest = _ceil(length * threshold / (2 - threshold))
    longest = math.floor(length * (2 - threshold) / threshold + EPSILON)
    for other in range(shortest, longest + 1):
        least = _least(length, other, threshold)
        prefix = _prefix(rarest, least)
        found = {index for word in prefix for index in holders.get((word, other), ())}
        if found:
            yield least, found


def _prefix(rarest: list[int], least: int) -> list[int]:
    """The rarest words, of which a text with `least` words in common must hold one."""
    return rarest[: len(rarest) - least + 1]


def _least(length: int, other: int, threshold: float) -> int:
    """Common words that texts of these lengths need: F = 2 common / (length + other)."""
    return _ceil(threshold * (length + other) / 2)


def _ceil(value: float) -> int:
    """The next whole number, with room for the last bit of a product like 0.9 * 10 / 2."""
    return math.ceil(value - EPSILON)


def _rare_first(texts: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Each text as one character a word, and its words as numbers, rarest first.

    The second `the` of a text is another word than its first: overlap counts repetitions.
    """
    alphabet = Alphabet()
    words = [alphabet.spell(WORD.findall(text.lower())) for text in texts]
    numbers: dict[tuple[str, int], int] = {}
    held = []
    for text in words:
        seen: Counter[str] = Counter()
        mine = []
        for word in text:
            mine.append(numbers.setdefault((word, seen[word]), len(numbers)))
            seen[word] += 1
        held.append(mine)
    frequency = Counter(number for mine in held for number in mine)
    for mine in held:
        mine.sort(key=lambda number: (frequency[number], number))
    return words, held
