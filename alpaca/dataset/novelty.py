"""ROUGE-L of one instruction against all instructions kept so far, exact and fast.

Tokens are those of the `rouge_score` package (lower case, runs of ASCII letters and digits). Each
distinct token becomes one character, so the longest common subsequence of two token lists is that
of two strings, which rapidfuzz finds with bit-parallel arithmetic (Hyyrö, 2004). The F-measure is
computed with rouge_score's operations in the same order, so it is equal to the last bit.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

THRESHOLD = 0.7  # the recipe's: an instruction this close to an earlier one is not new

# Characters for tokens: every code point except the surrogates, which are not valid text.
SURROGATES = range(0xD800, 0xE000)
LAST = 0x10FFFF


@dataclass(frozen=True)
class Neighbour:
    """An instruction of the index, by its number, and its ROUGE-L F-measure (0 to 1)."""

    number: int
    score: float


def words(text: str) -> list[str]:
    """The tokens ROUGE is defined on: `rouge_score`'s, without stemming."""
    return re.findall(r"[a-z0-9]+", text.lower())


class Alphabet:
    """Gives each distinct token a character of its own, and spells texts with them."""

    def __init__(self) -> None:
        """Start with no token known."""
        self._characters: dict[str, str] = {}

    def spell(self, tokens: Iterable[str]) -> str:
        """One character a token; a token not seen before gets the next free character."""
        return "".join([self._characters.get(token) or self._new(token) for token in tokens])

    def _new(self, token: str) -> str:
        code = len(self._characters) + 1
        if code >= SURROGATES.start:
            code += len(SURROGATES)
        assert code <= LAST, "more than a million distinct words"
        self._characters[token] = chr(code)
        return self._characters[token]


class Index:
    """The instructions kept so far, in the order in which they were added."""

    def __init__(self, instructions: Iterable[str] = ()) -> None:
        """Start from instructions that are already kept (the seed tasks)."""
        self._alphabet = Alphabet()
        self._texts: list[str] = []
        self._lengths = np.zeros(1024)
        for instruction in instructions:
            self.add(instruction)

    def __len__(self) -> int:
        """How many instructions are kept."""
        return len(self._texts)

    def add(self, instruction: str) -> None:
        """Keep one more instruction; its number is how many there were before."""
        text = self._alphabet.spell(words(instruction))
        if len(self._texts) == len(self._lengths):
            self._lengths = np.concatenate([self._lengths, np.zeros(len(self._lengths))])
        self._lengths[len(self._texts)] = len(text)
        self._texts.append(text)

    def scores(self, instruction: str) -> np.ndarray:
        """ROUGE-L F-measure to every instruction kept: float64, (len(self),)."""
        text = self._alphabet.spell(words(instruction))
        common = process.cdist([text], self._texts, scorer=LCSseq.similarity, dtype=np.int32)[0]
        return f_measure(common, len(text), self._lengths[: len(self._texts)])

    def nearest(self, instruction: str, count: int = 1) -> list[Neighbour]:
        """The `count` nearest instructions, nearest first; earlier ones first among equals."""
        scores = self.scores(instruction)
        # A full sort of 52,000 scores would cost a third of the comparison itself.
        edge = np.partition(scores, -count)[-count] if count < len(scores) else 0.0
        close = np.flatnonzero(scores >= edge)
        order = close[np.argsort(-scores[close], kind="stable")][:count]
        return [Neighbour(int(number), float(scores[number])) for number in order]


def f_measure(common: np.ndarray, length: int, lengths: np.ndarray) -> np.ndarray:
    """F-measure from common subsequence lengths (n,) and the lengths compared; 0 without common."""
    if length == 0:
        return np.zeros(len(common))
    precision = common / np.maximum(lengths, 1)
    recall = common / length
    total = precision + recall
    result = np.zeros(len(common))
    np.divide(2 * precision * recall, total, out=result, where=total > 0)
    return result
