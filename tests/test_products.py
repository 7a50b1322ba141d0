"""fp32 products by oneDNN: the same values as torch's own, and gradients where they are wanted."""

import pytest
import torch
import torch.nn.functional as F

from alpaca.training import products


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("turned", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_values_are_those_of_fp64(rows: int, turned: bool, bias: bool) -> None:
    torch.manual_seed(rows)
    x = torch.randn(2, rows, 320)
    weight = torch.randn(320, 9001).T if turned else torch.randn(9001, 320)
    added = torch.randn(9001) if bias else None
    exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
    found = products.linear(x, weight, added)
    assert found.shape == (2, rows, 9001)
    assert (found - exact).norm() < 1e-6 * exact.norm()


def test_a_gradient_is_never_lost() -> None:
    x = torch.randn(600, 320, requires_grad=True)
    weight = torch.randn(320, 320, requires_grad=True)
    products.linear(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None


def test_long_sums_and_other_types_are_left_to_torch() -> None:
    long = torch.randn(64, products.LONGEST + 1)
    weight = torch.randn(64, products.LONGEST + 1)
    assert torch.equal(products.linear(long, weight), F.linear(long, weight))
    half = torch.randn(600, 320).bfloat16()
    assert torch.equal(products.linear(half, half), F.linear(half, half))
