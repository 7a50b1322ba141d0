"""Dithered masters round to their base weights, and small updates survive rounding on average."""

import pytest
import torch

from alpaca.rounding import LOW_BITS, dither, random_bits, stochastic

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a 16-bit type: zeros, subnormals and powers of two among them."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    return patterns[patterns.float().isfinite()]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("stored", "compute"), [(BF16, BF16), (FP16, BF16), (FP16, FP16), (FP32, BF16), (FP32, FP16)]
)
def test_every_master_still_rounds_to_its_base_weight_in_the_file_and_in_the_forward_pass(
    stored: torch.dtype, compute: torch.dtype, seed: int
) -> None:
    base = every_number(compute if stored is FP32 else stored).to(stored)
    masters = base.float().clone()
    dither(masters, stored, compute, seed, "w")
    assert masters.to(stored).equal(base) or stored is FP32
    assert masters.to(compute).equal(base.float().to(compute))
    moved = masters != base.float()
    assert moved.float().mean() > 0.98
    assert not moved[base == 0].any()
    assert masters.signbit().equal(base.signbit())  # -0 stays -0
    bits = masters.view(torch.int32) - base.float().view(torch.int32)
    half = 1 << (min(LOW_BITS[compute], LOW_BITS[stored] or 16) - 1)
    assert bits.abs().max() < half
    assert bits.abs().max() > 0.99 * half


def test_a_bf16_base_keeps_its_fp16_forward_pass() -> None:
    base = every_number(BF16)
    base = base[base.float().abs() < 65504]
    masters = base.float().clone()
    dither(masters, BF16, FP16, 0, "w")
    assert masters.half().equal(base.half())
    assert (masters != base.float()).float().mean() > 0.98


def test_fp32_compute_and_weights_finer_than_bf16_are_left_alone() -> None:
    base = torch.randn(1000)
    for stored, compute in ((BF16, FP32), (FP32, BF16)):
        masters = base.clone()
        dither(masters, stored, compute, 0, "w")
        assert masters.equal(base)


def test_weights_that_are_no_numbers_stay_so_for_the_loader_to_refuse() -> None:
    masters = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan, -torch.nan])
    for seed in range(20):
        noisy = masters.clone()
        dither(noisy, BF16, BF16, seed, "w")
        assert noisy[1:].view(torch.int32).equal(masters[1:].view(torch.int32))


@pytest.mark.parametrize("update", [2e-5, -2e-5, 3e-6, -1e-4])
def test_the_forward_weights_follow_an_update_far_smaller_than_their_rounding(
    update: float,
) -> None:
    base = torch.tensor([0.03, -0.03, 0.0625, 1e-3, -0.9]).bfloat16().float()
    seeds = 4000
    changes = torch.zeros(len(base), dtype=torch.float64)
    for seed in range(seeds):
        masters = base.clone()
        dither(masters, BF16, BF16, seed, "w")
        changes += ((masters + update).bfloat16().float() - base).double()
    step = torch.ldexp(torch.ones(len(base)), torch.frexp(base).exponent - 8)
    # A weight flips by one step with the odds |update| / step: a binomial's standard error.
    odds = (abs(update) / step).frac()
    error = step * (odds * (1 - odds) / seeds).sqrt() + 2e-3 * step
    assert ((changes / seeds - update).abs() < 5 * error).all()
    assert (base + 2e-5).bfloat16()[0] == base[0].bfloat16()  # without dither it would be lost


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_stochastic_rounding_keeps_the_mean_and_picks_a_neighbour(dtype: torch.dtype) -> None:
    value = torch.full((200_000,), 0.0300123)
    rounded = stochastic(value, dtype, 1, "w").float()
    low, high = sorted(set(rounded.tolist()))
    assert low < 0.0300123 < high
    assert torch.nextafter(torch.tensor(low).to(dtype), torch.tensor(1.0, dtype=dtype)) == high
    assert rounded.mean().item() == pytest.approx(0.0300123, abs=4 * (high - low) / 2 / 447)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_stochastic_rounding_leaves_numbers_of_the_type_as_they_are(dtype: torch.dtype) -> None:
    every = every_number(dtype)
    for seed in range(3):
        assert stochastic(every.float(), dtype, seed, "w").equal(every)
    odd = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 3.3898e38])
    assert stochastic(odd, dtype, 0, "w").isfinite().tolist() == [False] * 4 + [dtype is BF16]


def test_the_noise_of_a_shard_is_that_part_of_the_whole_tensors() -> None:
    whole = random_bits(7, "w", 0, 1000)
    for start in (0, 1, 15, 16, 333, 992):
        assert random_bits(7, "w", start, 1000 - start).equal(whole[start:])
    assert not random_bits(8, "w", 0, 1000).equal(whole)
    assert not random_bits(7, "v", 0, 1000).equal(whole)
    assert int(whole.min()) >= 0
    assert 30_000 < whole.float().mean() < 35_500
    masters = torch.randn(3 << 20).bfloat16().float()  # three times what is worked on at once
    parts = masters.clone()
    dither(masters, BF16, BF16, 7, "w")
    dither(parts[: 5 << 18], BF16, BF16, 7, "w")
    dither(parts[5 << 18 :], BF16, BF16, 7, "w", start=5 << 18)
    assert parts.equal(masters)
