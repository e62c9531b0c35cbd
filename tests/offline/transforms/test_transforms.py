"""Rotations: orders, orthogonality, and what a RandomHadamard does to rows and columns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotquant.transforms.hadamard import RandomHadamard, hadamard_rows, largest_order, paley, split_order
from rotquant_kernels import reference

SIZES = [2, 12, 20, 24, 28, 36, 44, 60, 64, 96, 148, 176, 184, 768, 896, 1536, 3072, 3584, 4096, 5120]


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 36, 44, 48, 60, 76, 148])
def test_paley_matrices_are_hadamard(order):
    h = paley(order)
    assert h is not None
    assert (h.abs() == 1).all()
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))


def test_orders_without_a_construction_are_not_invented():
    assert paley(6) is None
    assert split_order(7) is None
    assert largest_order(7 * 8) == 56  # 28 * 2
    assert largest_order(13 * 2) == 2
    assert split_order(188) is None  # known since 2005, by neither construction


@pytest.mark.parametrize("size", SIZES)
def test_hadamard_rows_is_a_rotation(size):
    x = torch.randn(16, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    y = hadamard_rows(x, largest_order(size))
    assert torch.allclose(y @ y.T, x @ x.T, atol=1e-9 * size)
    assert not torch.allclose(y, x)


@pytest.mark.parametrize("size", [1, 2, 64, 512])
def test_two_products_are_the_butterflies_that_serve(size):
    x = torch.randn(3, 2 * size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    assert torch.allclose(hadamard_rows(x, size), reference.hadamard(x, size), atol=1e-12)


@settings(deadline=None)
@given(st.sampled_from([16, 40, 96]), st.integers(0, 2**31))
def test_rows_and_columns_are_one_matrix(size, seed):
    generator = torch.Generator().manual_seed(seed)
    rotation = RandomHadamard(size, generator)
    r = rotation.rows(torch.eye(size, dtype=torch.float64))
    w = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    assert torch.allclose(rotation.columns(w), r.T @ w, atol=1e-10)
    assert torch.allclose(r @ r.T, torch.eye(size, dtype=torch.float64), atol=1e-10)


def test_a_rotation_spreads_one_large_value():
    x = torch.zeros(1, 4096, dtype=torch.float64)
    x[0, 7] = 1000
    rotated = RandomHadamard(4096, torch.Generator().manual_seed(0)).rows(x)
    assert rotated.abs().max() == pytest.approx(1000 / 64)
