"""Which examples make a step, and its learning rate: pure functions of seed and step."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca.recipe.arguments import Arguments
from alpaca.recipe.steps import schedule

RECIPE = Arguments(per_device_train_batch_size=4, gradient_accumulation_steps=8)


def test_the_published_run_has_609_steps_of_256() -> None:
    made = schedule(RECIPE, examples=52_002, world_size=8)
    assert (made.batch, made.steps, made.steps_per_epoch) == (256, 609, 203)


@given(
    examples=st.integers(1, 200),
    batch=st.integers(1, 32),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_an_epoch_shows_no_example_twice_and_drops_less_than_a_batch(
    examples: int, batch: int, epochs: int, seed: int
) -> None:
    arguments = replace(
        RECIPE,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_train_epochs=epochs,
        seed=seed,
    )
    made = schedule(arguments, examples, world_size=1)
    for epoch in range(epochs):
        first = epoch * made.steps_per_epoch
        seen = [
            i for step in range(first, first + made.steps_per_epoch) for i in made.indices(step)
        ]
        assert len(seen) == len(set(seen)) > examples - batch
        assert set(seen) <= set(range(examples))


def test_data_order_depends_on_seed_and_step_not_on_ranks() -> None:
    eight = schedule(replace(RECIPE, gradient_accumulation_steps=1), 999, world_size=8)
    one = schedule(RECIPE, 999, world_size=1)
    assert one.batch == eight.batch
    assert [one.indices(k) for k in range(40)] == [eight.indices(k) for k in range(40)]
    other = schedule(replace(RECIPE, seed=1), 999, world_size=1)
    assert one.indices(0) != other.indices(0)
    assert one.indices(0) != one.indices(one.steps_per_epoch)  # epochs are shuffled apart


def test_the_published_run_warms_up_for_19_steps() -> None:
    assert schedule(RECIPE, 52_002, world_size=8).warmup == 19  # ceil(0.03 x 609)


@pytest.mark.parametrize(("limit", "scale"), [(0.0, 1.0), (1.0, 0.2), (10.0, 1.0)])
def test_gradients_are_clipped_to_the_norm_and_not_at_all_to_0(limit: float, scale: float) -> None:
    import torch

    from alpaca.training.loop import clip

    module = torch.nn.Linear(2, 1, bias=False)
    module.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip(module, limit) == 5.0
    assert torch.allclose(module.weight.grad, scale * torch.tensor([[3.0, 4.0]]))
