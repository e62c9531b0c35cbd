"""Quantizers with gradients: the convention's values bit for bit, and the gradients that the module states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotquant.learn.quantizers import fake_quantize, fake_quantize_weight
from rotquant.weights import rtn
from rotquant_kernels import convention
from rotquant_kernels.formats import KVFormat, RowFormat, WeightFormat


def rows(seed: int, scale: float = 1.0) -> torch.Tensor:
    """Rows with outliers, of one sign only, constant and zero: every branch of the convention."""
    x = torch.randn(12, 48, generator=torch.Generator().manual_seed(seed)) * scale
    x[1] *= 1e-30
    x[2, 5] = 300 * scale
    x[3] = 0
    x[4] = x[4].abs() + scale
    x[5] = -x[5].abs() - scale
    x[6] = 2.5 * scale
    return x


def served(x: torch.Tensor, bits: int, symmetric: bool, clip: float) -> torch.Tensor:
    scale, zero = convention.qparams(x, bits, symmetric, clip)
    return convention.dequantize(convention.quantize(x, scale, zero, bits), scale, zero)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2, 3, 4, 8]), st.booleans(), st.sampled_from([0.3, 0.7, 0.95, 1.0]))
def test_values_are_the_conventions(seed, bits, symmetric, clip):
    for x in (rows(seed), rows(seed, 1e4), rows(seed).bfloat16()):
        expected = served(x, bits, symmetric, clip)
        assert torch.equal(fake_quantize(x, RowFormat(bits, symmetric, clip)), expected)
        assert torch.equal(RowFormat(bits, symmetric, clip).fake_quantize(x), expected)
        assert torch.equal(fake_quantize(x, RowFormat(bits, symmetric), torch.tensor(clip)), expected)
        for shift in (x, x * 1e4, x * 1e-7):  # float16 scales at both of their limits
            cached = KVFormat(symmetric, clip, 1.0, 0).key.fake_quantize(shift)
            assert torch.equal(
                fake_quantize(shift, KVFormat(symmetric, 1.0, 1.0, 0).value, torch.full((12, 1), clip)), cached
            )


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_those_of_rtn(group, dtype):
    weight = rows(3)
    form = WeightFormat(4, group)
    scale = rtn.weight_scale(weight, form, dtype)
    expected = form.dequantize(form.quantize(weight, scale), scale)
    assert torch.equal(fake_quantize_weight(weight, form, dtype=dtype), expected)
    assert torch.equal(fake_quantize_weight(weight, form, torch.ones(12, 48 // (group or 48)), dtype), expected)


def test_rows_that_are_not_numbers_stay_so():
    x = rows(0)
    x[0, 3], x[7, 3] = torch.nan, torch.inf
    for symmetric in (True, False):
        y = fake_quantize(x, RowFormat(4, symmetric))
        assert y[[0, 7]].isnan().all()
        assert y[8:].isfinite().all()


def straight_through(x: torch.Tensor, bits: int, symmetric: bool, clip: torch.Tensor) -> torch.Tensor:
    """The textbook's form of the same function, all by autograd."""
    low, high = convention.int_range(bits)
    rounded = lambda v: v + (v.round() - v).detach()  # noqa: E731
    if symmetric:
        scale, zero = x.abs().amax(-1, keepdim=True) * clip / ((high - low) / 2), torch.zeros(())
    else:
        smallest = x.amin(-1, keepdim=True).clamp(max=0) * clip
        scale = (x.amax(-1, keepdim=True).clamp(min=0) * clip - smallest) / (high - low)
        zero = rounded(low - smallest / scale)
    return (rounded(x / scale + zero).clamp(low, high) - zero) * scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [0.5, 0.9, 1.0])
def test_gradients_are_those_of_the_straight_through_estimator(symmetric, clip):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 40, generator=generator, dtype=torch.float64).requires_grad_()
    ratio = torch.full((6, 1), clip, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    mine = torch.autograd.grad(fake_quantize(x, RowFormat(4, symmetric), ratio), (x, ratio), upstream)
    book = torch.autograd.grad(straight_through(x, 4, symmetric, ratio), (x, ratio), upstream)
    for a, b in zip(mine, book, strict=True):
        assert torch.allclose(a, b, atol=1e-10)
        assert a.abs().max() > 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounded_scales_pass_gradients_on(symmetric):
    """float16 scales move a few codes by one, and the gradients of these with them; all others are the same."""
    generator = torch.Generator().manual_seed(2)
    x, upstream = torch.randn(2, 20, 32, generator=generator)
    x.requires_grad_()
    clip = torch.tensor(0.8, requires_grad=True)
    exact = torch.autograd.grad(fake_quantize(x, RowFormat(4, symmetric), clip), (x, clip), upstream)
    pairs = [fake_quantize(x, KVFormat(symmetric, 1.0, 1.0, 0).key, clip)]
    pairs += [fake_quantize_weight(x, WeightFormat(), clip, torch.float16)] if symmetric else []
    for y in pairs:
        grads = torch.autograd.grad(y, (x, clip), upstream)
        assert (grads[0] - exact[0]).norm() < 0.02 * exact[0].norm()
        assert torch.allclose(grads[1], exact[1], rtol=0.02)


@pytest.mark.parametrize("symmetric", [True, False])
def test_saturated_entries_are_smooth(symmetric):
    """Where every entry saturates nothing is rounded, so numerical derivatives must agree."""
    signs = torch.tensor([[1.0, -1, 1, -1, 1, -1, 1, -1]], dtype=torch.float64)
    x = (signs * torch.linspace(1, 1.1, 8, dtype=torch.float64)).requires_grad_()
    clip = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    if symmetric:
        assert torch.autograd.gradcheck(lambda a, c: fake_quantize(a, RowFormat(4, True), c), (x, clip))
    else:  # the zero point depends on the ratio of the extremes alone, so the values are linear in the clip ratio
        y = fake_quantize(x, RowFormat(4, False), clip)
        assert y.unique().numel() == 2
        assert torch.allclose(torch.autograd.grad(y[0, 0], clip)[0], y[0, 0] / clip)


def test_a_learned_clip_ratio_finds_the_best_one():
    """Gaussian rows: the clip with the least error is near 0.7 at d = 1024, where 1.0 has much more."""
    y = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0))
    clip = torch.tensor(1.0, requires_grad=True)
    optimiser = torch.optim.Adam([clip], lr=0.03)
    for _ in range(40):
        optimiser.zero_grad()
        (y - fake_quantize(y, RowFormat(4, True), clip)).square().mean().backward()
        optimiser.step()
    grid = [i / 50 for i in range(25, 51)]
    errors = [(y - fake_quantize(y, RowFormat(4, True), c)).square().mean().item() for c in grid]
    learned = (y - fake_quantize(y, RowFormat(4, True), clip.item())).square().mean().item()
    assert learned < 1.01 * min(errors) < 0.8 * errors[-1]
