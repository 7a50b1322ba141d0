"""ROUGE-L as the `rouge_score` package computes it, to the last bit, and who is nearest."""

import random

from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from alpaca.dataset.novelty import Alphabet, Index, words

WORDS = [
    *("the", "a", "quick", "brown", "fox,", "Jumps", "over;", "12", "lazy", "dogs'", "café"),
    *("ไทย", "don't", "IT'S", "x1", "--", "it"),
]


def test_equals_rouge_score_on_2000_random_pairs() -> None:
    rng = random.Random(7)
    scorer = RougeScorer(["rougeL"])
    seen = set()
    for _ in range(2000):
        target, candidate = (" ".join(rng.choices(WORDS, k=rng.randrange(0, 30))) for _ in "ab")
        expected = scorer.score(target, candidate)["rougeL"].fmeasure
        assert Index([target]).scores(candidate)[0] == expected
        seen.add(expected)
    assert len(seen) > 300  # not only zeros and ones


@given(st.text(), st.text())
def test_equals_rouge_score_on_any_text(target: str, candidate: str) -> None:
    expected = RougeScorer(["rougeL"]).score(target, candidate)["rougeL"].fmeasure
    assert Index([target]).scores(candidate)[0] == expected


def test_each_word_has_a_character_of_its_own_past_the_surrogates() -> None:
    alphabet = Alphabet()
    text = alphabet.spell(map(str, range(70_000)))
    assert len(set(text)) == 70_000
    text.encode()  # raises where a character were half of a surrogate pair
    assert alphabet.spell(["69999", "0"]) == text[-1] + text[0]


def test_nearest_are_in_order_and_earlier_first_among_equals() -> None:
    index = Index(["sort the list", "name a river", "sort this list", "sort the list"])
    found = index.nearest("Sort the list!", 3)
    assert [(item.number, round(item.score, 3)) for item in found] == [(0, 1), (3, 1), (2, 0.667)]
    assert len(index.nearest("Sort", 9)) == 4
    assert Index().nearest("Sort", 9) == []


def test_index_grows_past_its_first_size() -> None:
    index = Index(f"number {number}" for number in range(3000))
    assert len(index) == len(index.scores("number 2999")) == 3000
    assert index.nearest("number 2999")[0].number == 2999


def test_words_are_those_of_rouge() -> None:
    assert words("Don't STOP, x_1 naïve!") == ["don", "t", "stop", "x", "1", "na", "ve"]
