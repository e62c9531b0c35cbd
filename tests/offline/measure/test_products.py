"""bfloat16 products made of float32 ones are those that torch computes, and only where the CPU would emulate them."""

import pytest
import torch

from rotquant.measure import products
from rotquant.measure.products import ROWS, FastProducts, slow


@pytest.fixture
def emulating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "product_dtype", lambda dtype, device: torch.float32)


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_the_same_up_to_the_order_of_its_sum(emulating: None, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(576, 1000, bias=bias).bfloat16(), torch.randn(2, ROWS, 576).bfloat16()
    with torch.no_grad():
        wanted = layer(x)
        with FastProducts():
            found = layer(x)
    exact = torch.nn.functional.linear(
        x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
    )
    step = 2.0**-8 * exact.abs() + 1e-5  # half a step of bfloat16
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= step).all()
    assert (found != wanted).double().mean() < 0.01


def test_one_rounding_only(emulating: None) -> None:
    """257 ones and a bias of one are 258; a sum rounded one by one stays at 256, where steps of two begin."""
    layer = torch.nn.Linear(257, 1).bfloat16()
    with torch.no_grad(), FastProducts():
        layer.weight.fill_(1)
        layer.bias.fill_(1)
        assert (layer(torch.ones(ROWS, 257).bfloat16()) == 258).all()


def test_what_is_left_alone(emulating: None) -> None:
    assert slow(torch.ones(ROWS, 8).bfloat16())
    assert not slow(torch.ones(ROWS - 1, 8).bfloat16())
    assert not slow(torch.ones(ROWS, 8))
    assert not slow(torch.ones(ROWS, 8).half())


def test_a_cpu_that_multiplies_bfloat16_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "product_dtype", lambda dtype, device: dtype)
    assert not slow(torch.ones(ROWS, 8).bfloat16())
