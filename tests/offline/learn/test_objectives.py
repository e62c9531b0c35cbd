"""Objectives against hand calculations and numerical derivatives; targets against what they promise."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotquant.learn import objectives, targets
from rotquant_kernels import convention
from rotquant_kernels.formats import RowFormat

GAUSS = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
LOSSES = {
    "quantization": partial(objectives.quantization_error, rows=RowFormat()),
    "gsr": partial(objectives.gsr_loss, rows=RowFormat(symmetric=False)),
    "whip": objectives.whip,
    "kurtosis": objectives.kurtosis,
}


def test_quantization_error_is_that_of_the_served_arithmetic():
    y = GAUSS[:8, :256]
    scale, zero = convention.qparams(y, 4, False, 0.8)
    error = (y - convention.dequantize(convention.quantize(y, scale, zero, 4), scale, zero)).square().sum(1)
    loss = objectives.quantization_error(y, RowFormat(4, False, 0.8))
    assert loss.item() == pytest.approx((error.sum() / y.square().sum()).item(), rel=1e-5)
    weights = torch.tensor([4.0] + [0.0] * 7)
    loss = objectives.quantization_error(y, RowFormat(4, False), 0.8, weights)
    assert loss.item() == pytest.approx((error[0] / y[0].square().sum()).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("d", "symmetric", "clip", "gain"), [(4096, 0, 0.7, 0.65), (4096, 1, 0.65, 0.6), (128, 0, 0.9, 0.97)]
)
def test_the_best_clip_ratio_of_gaussian_tokens(d, symmetric, clip, gain):
    """Wide tokens want much more clipping than short ones: the rows of a residual stream, and the heads of KV."""
    y = GAUSS.reshape(-1, d)
    errors = {
        c: objectives.quantization_error(y, RowFormat(4, bool(symmetric), c)).item()
        for c in [i / 20 for i in range(10, 21)]
    }
    best = min(errors, key=lambda c: errors[c])
    assert best == pytest.approx(clip, abs=0.06)
    assert errors[best] < gain * errors[1.0]


def test_gsr_by_hand_and_as_prediction_of_the_rounding_error():
    y = torch.tensor([[3.0, -1.0, -1.0, -1.0]])
    assert objectives.gsr_loss(y, RowFormat(4, False)).item() == pytest.approx((4 / 15) ** 2 / 12 / 3)
    assert objectives.gsr_loss(y, RowFormat(4, True)).item() == pytest.approx((6 / 15) ** 2 / 12 / 3)
    for symmetric in (True, False):
        error = objectives.quantization_error(GAUSS, RowFormat(4, symmetric))
        assert objectives.gsr_loss(GAUSS, RowFormat(4, symmetric)).item() == pytest.approx(error.item(), rel=0.05)


def test_losses_by_hand():
    corner = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    peak = torch.tensor([[4.0, 0.0, 0.0, 0.0]])
    assert objectives.whip(corner).item() == pytest.approx(math.exp(-1))
    assert objectives.whip(peak).item() == pytest.approx((3 + math.exp(-2)) / 4)
    assert objectives.kurtosis(corner).item() == pytest.approx(0.8)
    assert objectives.kurtosis(torch.linspace(-1, 1, 20001)[None]).item() == pytest.approx(0, abs=1e-3)
    assert objectives.kurtosis(GAUSS).item() == pytest.approx(1.2, abs=0.02)
    assert objectives.whip(torch.cat((corner, peak)), torch.tensor([3.0, 1.0])).item() == pytest.approx(
        (3 * math.exp(-1) + (3 + math.exp(-2)) / 4) / 4
    )


def test_kl_top():
    teacher, student = GAUSS[:4, :50].double(), GAUSS[4:8, :50].double().requires_grad_()
    p, log_q = teacher.softmax(-1), student.log_softmax(-1)
    full = (p * (p.log() - log_q)).sum(-1).mean()
    assert objectives.kl_top(student, teacher, 50).item() == pytest.approx(full.item())
    assert objectives.kl_top(student, teacher, 1000).item() == pytest.approx(full.item())
    index = p.topk(7).indices
    part = (p * (p.log() - log_q)).gather(-1, index).sum(-1).mean()
    assert objectives.kl_top(student, teacher, 7).item() == pytest.approx(part.item())
    sharp = torch.zeros(1, 4, dtype=torch.float64)
    sharp[0, 0] = 5
    assert objectives.kl_top(2 * sharp, sharp, 1) < 0  # the partial sum of the docstring
    assert torch.autograd.gradcheck(lambda s: objectives.kl_top(s, teacher, 7), student)


@pytest.mark.parametrize("name", ["gsr", "whip", "kurtosis"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients(name, weighted):
    y = GAUSS[:3, :9].double().requires_grad_()
    weights = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64) if weighted else None
    assert torch.autograd.gradcheck(lambda v: LOSSES[name](v, weights=weights), y)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_do_not_depend_on_the_size_of_rows_or_on_copies(name):
    y = GAUSS[:6, :128]
    loss = LOSSES[name](y).item()
    assert LOSSES[name](y * 1000).item() == pytest.approx(loss, rel=1e-4)
    twice = LOSSES[name](torch.cat((y, y[:1])), weights=torch.ones(7)).item()
    assert twice == pytest.approx(LOSSES[name](y, weights=torch.tensor([2.0] + [1] * 5)).item(), rel=1e-5)
    assert LOSSES[name](torch.zeros(2, 16)).isfinite()


ROWS = {
    "clipped": partial(targets.clipped_target, kappa=1.5),
    "clipped about the mean": partial(targets.clipped_target, kappa=1.5, symmetric=False),
    "corner": targets.corner_target,
    "quantized": partial(targets.quantized_target, rows=RowFormat()),
}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(sorted(ROWS)))
def test_targets_are_homogeneous_and_no_longer_than_the_row(seed, name):
    y = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    target = ROWS[name](y)
    assert target.dtype == y.dtype
    assert torch.allclose(ROWS[name](4 * y), 4 * target)
    assert name == "quantized" or (target.norm(dim=1) <= y.norm(dim=1) * (1 + 1e-9)).all()


def test_targets_are_what_they_say():
    y = GAUSS[:4, :101].double() + 3
    clipped = targets.clipped_target(y, 1.5, symmetric=False)
    sigma = y.std(1, correction=0)
    assert torch.allclose(clipped.amax(1) - clipped.amin(1), 3 * sigma)
    assert ((clipped - y)[(y - y.mean(1, keepdim=True)).abs() < 1.5 * sigma[:, None]] == 0).all()
    rms = (y * y).mean(1).sqrt()
    assert torch.allclose(targets.clipped_target(y, 1.2).amax(1), 1.2 * rms)
    assert torch.allclose(targets.corner_target(y).abs(), rms[:, None].expand_as(y))
    assert (targets.corner_target(torch.zeros(1, 3)) == 0).all()
    scale, zero = convention.qparams(y, 4, True, 0.9)
    served = convention.dequantize(convention.quantize(y.float(), scale, zero, 4), scale, zero)
    assert torch.allclose(targets.quantized_target(y, RowFormat(4, True, 0.9)), served.double(), atol=1e-5)
