"""The sampler: equal to transformers' processors in distribution, and right at every edge."""

from collections.abc import Sequence

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alpaca.serving import sampling
from alpaca.serving.request import Sampling
from alpaca.serving.sampling import Draws

MANY = 2 * sampling.BLOCK + 188
VOCABULARY = 400  # above the number of candidates, so that both ways to a nucleus are taken

logits_of_any_kind = st.integers(0, 2**32 - 1).map(
    lambda seed: torch.tensor(
        numpy.random.default_rng(seed).normal(0, 1 + seed % 7, VOCABULARY), dtype=torch.float32
    )
)
any_settings = st.builds(
    Sampling,
    temperature=st.floats(1e-6, 5),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 2 * VOCABULARY),
)


def reference(logits: torch.Tensor, one: Sampling, seen: list[int]) -> torch.Tensor:
    """transformers' processors in transformers' order; probabilities (vocabulary,)."""
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(one.repetition_penalty)])
    warpers.append(TemperatureLogitsWarper(float(one.temperature)))
    if one.top_k:
        warpers.append(TopKLogitsWarper(one.top_k))
    if one.top_p < 1:
        warpers.append(TopPLogitsWarper(one.top_p))
    return warpers(torch.tensor([seen]), logits[None].clone())[0].softmax(-1)


def draws(many: Sequence[Sampling], uniforms: Sequence[float], logits: torch.Tensor) -> Draws:
    return Draws(many, uniforms, logits.shape[1], logits.device)


def choose(
    logits: torch.Tensor, many: Sequence[Sampling], uniforms: Sequence[float]
) -> torch.Tensor:
    return sampling.choose(logits, draws(many, uniforms, logits))


def ours(logits: torch.Tensor, one: Sampling) -> torch.Tensor:
    chances = sampling.probabilities(logits[None], draws([one], [0.5], logits[None]))[0]
    return chances / chances.sum()


@settings(max_examples=200, deadline=None)
@given(logits_of_any_kind, any_settings)
@example(torch.linspace(-3.9, 0, VOCABULARY), Sampling(temperature=0.25, top_p=1 - 2**-53))
def test_the_distribution_is_that_of_transformers(logits: torch.Tensor, one: Sampling) -> None:
    mine, theirs = ours(logits, one), reference(logits, one, [0])
    # At the border of the nucleus both compare a sum with top_p; rounding may decide one token, or
    # where top_p is 1 but for float32's last digit, several that hardly ever come.
    differing = (mine > 0) != (theirs > 0)
    nearly_all = one.top_p > 1 - 1e-6
    rare = nearly_all and float(torch.maximum(mine, theirs)[differing].sum()) < 1e-6
    if not differing.any() or rare:
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)
    else:
        assert int(differing.sum()) == 1
        order = logits.argsort(descending=True)
        border = int((theirs[order] > 0).sum())
        assert int(differing.nonzero()) in order[border - 1 : border + 1]


@given(logits_of_any_kind, st.floats(0.01, 5), st.sets(st.integers(0, VOCABULARY - 1), min_size=1))
def test_repetition_penalty_is_that_of_transformers(
    logits: torch.Tensor, penalty: float, seen: set[int]
) -> None:
    mask = torch.zeros(1, VOCABULARY, dtype=torch.bool)
    mask[0, list(seen)] = True
    mine = sampling.penalize(logits[None], mask, torch.tensor([[penalty]]))
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([sorted(seen)]), logits[None])
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "one",
    [
        Sampling(),
        Sampling(temperature=0.3),
        Sampling(temperature=5),
        Sampling(top_k=5),
        Sampling(top_p=0.6),
        Sampling(temperature=0.8, top_k=30, top_p=0.9),
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(one: Sampling) -> None:
    """Chi-square at 1e-4, over cells of at least 20 expected draws and one of all rarer tokens.

    The vocabulary is of three blocks, the last of them not full, so both stages of a draw count.
    """
    torch.manual_seed(0)
    logits = torch.randn(MANY) * 2
    expected = reference(logits, one, [0]).double() * 40_000
    random = sampling.generator(1, 0)
    rows = logits.repeat(200, 1)
    drawn = torch.zeros(MANY, dtype=torch.float64)
    for _ in range(200):
        tokens = choose(rows, [one] * 200, list(random.random(200)))
        drawn += torch.bincount(tokens, minlength=MANY)
    assert not drawn[expected == 0].any()
    rare = expected < 20
    pooled = [torch.cat([part[~rare], part[rare].sum()[None]]) for part in (drawn, expected)]
    drawn, expected = (part[pooled[1] >= 20] for part in pooled)
    statistic = ((drawn - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert freedom >= 2
    # 99.99% point of chi-square (Wilson and Hilferty 1931)
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < limit


@given(logits_of_any_kind, any_settings, st.floats(0, 1, exclude_max=True))
def test_what_is_drawn_was_possible(logits: torch.Tensor, one: Sampling, uniform: float) -> None:
    [token] = choose(logits[None].clone(), [one], [uniform]).tolist()
    assert ours(logits, one)[token] > 0


@given(st.floats(-50, 50), any_settings, st.floats(0, 1, exclude_max=True))
def test_equal_logits_are_equally_likely(level: float, one: Sampling, uniform: float) -> None:
    chances = ours(torch.full((VOCABULARY,), level), one)
    kept = chances[chances > 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / len(kept)))
    assert len(kept) >= min(VOCABULARY, int(one.top_p * VOCABULARY))
    choose(torch.full((1, VOCABULARY), level), [one], [uniform])


@given(any_settings, st.integers(0, VOCABULARY - 1), st.floats(0, 1, exclude_max=True))
def test_the_only_token_left_is_taken(one: Sampling, only: int, uniform: float) -> None:
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, only] = 3.0
    assert choose(logits, [one], [uniform]).tolist() == [only]


@given(logits_of_any_kind, st.sampled_from([0.0, 5e-324, 1e-45, 1e-30, 1e-6]))
def test_temperature_near_zero_is_greedy(logits: torch.Tensor, temperature: float) -> None:
    one = Sampling(temperature=temperature)
    assert choose(logits[None].clone(), [one], [0.5]).tolist() == [int(logits.argmax())]


@given(st.lists(any_settings, min_size=2, max_size=6), st.integers(0, 999))
def test_a_row_does_not_depend_on_its_neighbours(many: list[Sampling], seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(len(many), VOCABULARY)
    many = [*many[:-1], Sampling(temperature=0)]
    uniforms = list(sampling.generator(seed, 0).random(len(many)))
    together = choose(logits.clone(), many, uniforms).tolist()
    alone = [
        choose(logits[row : row + 1].clone(), [one], [uniforms[row]]).tolist()[0]
        for row, one in enumerate(many)
    ]
    assert together == alone


def test_generators_differ_by_seed_and_completion_and_repeat() -> None:
    numbers = {(s, i): sampling.generator(s, i).random() for s in (0, 1, 2**80) for i in (0, 1)}
    assert len(set(numbers.values())) == 6
    assert sampling.generator(2**80, 1).random() == numbers[2**80, 1]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_that_is_not_numbers_has_no_token_and_spoils_no_other(
    broken: float, temperature: float
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, VOCABULARY)
    one = Sampling(temperature=temperature, top_k=50, top_p=0.9)
    wanted = choose(logits, [one] * 3, [0.1, 0.5, 0.9]).tolist()
    logits[1, 7] = broken
    assert choose(logits, [one] * 3, [0.1, 0.5, 0.9]).tolist() == [wanted[0], -1, wanted[2]]
