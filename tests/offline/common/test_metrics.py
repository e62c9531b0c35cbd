"""Every metric on cases whose answer is known, and what each must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotquant.common import metrics
from rotquant.learn.quantizers import fake_quantize
from rotquant.weights import rtn
from rotquant_kernels import convention
from rotquant_kernels.formats import RowFormat, WeightFormat


def random_rows(seed: int, rows: int = 8, d: int = 16) -> Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FLAT = torch.tensor([[1.0, -1.0] * 8])
SPIKE = torch.nn.functional.one_hot(torch.tensor([3]), 16).double()
ZERO = torch.zeros(1, 16)


def gsr(x: torch.Tensor, rows: RowFormat) -> torch.Tensor:
    return metrics.gsr(x, rows.step(x))


def test_peak_to_rms() -> None:
    assert metrics.peak_to_rms(3 * FLAT).item() == pytest.approx(1)
    assert metrics.peak_to_rms(-5 * SPIKE).item() == pytest.approx(4)


def test_gsr_is_step_over_standard_deviation() -> None:
    assert gsr(FLAT, RowFormat(4, True)).item() == pytest.approx(1 / 7.5)
    assert gsr(FLAT, RowFormat(8, False)).item() == pytest.approx(2 / 255)
    ramp = torch.arange(16.0)[None]  # all positive: the symmetric range wastes half
    assert gsr(ramp, RowFormat(4, False)).item() == pytest.approx(1 / math.sqrt((16**2 - 1) / 12))
    assert gsr(ramp, RowFormat(4, True)).item() == pytest.approx(2 / math.sqrt((16**2 - 1) / 12))


def test_kurtosis() -> None:
    assert metrics.kurtosis(FLAT).item() == pytest.approx(1)
    assert metrics.kurtosis(torch.linspace(-1, 1, 20001)[None]).item() == pytest.approx(1.8, abs=1e-3)
    p = 1 / 16  # a Bernoulli variable
    assert metrics.kurtosis(SPIKE).item() == pytest.approx((1 - 3 * p * (1 - p)) / (p * (1 - p)))
    assert metrics.kurtosis(random_rows(0, 1, 100_000)).item() == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_step_is_that_of_the_served_arithmetic(bits: int, symmetric: bool) -> None:
    x = torch.cat((random_rows(3), random_rows(4) + 9)).float()
    torch.testing.assert_close(RowFormat(bits, symmetric).step(x), convention.qparams(x, bits, symmetric)[0][:, 0])


def test_rows_of_zeros_are_finite_and_have_finite_gradients() -> None:
    """Learning meets them; reports leave them out."""
    both = torch.cat((ZERO, FLAT)).requires_grad_()
    figures = (
        metrics.peak_to_rms(both),
        gsr(both, RowFormat(4, True)),
        metrics.rounding_error(both, RowFormat(4, True).step(both)),
        metrics.kurtosis(both),
        metrics.relative_error(both, 0.9 * both),
    )
    for figure in figures:
        assert figure.tolist()[0] == 0 < figure.tolist()[1]
        assert torch.autograd.grad(figure.sum(), both, retain_graph=True)[0].isfinite().all()


def test_error_and_snr() -> None:
    error = metrics.relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]])).item()
    assert error == pytest.approx(1 / 25)
    assert metrics.snr_db(error) == pytest.approx(13.979, abs=1e-3)
    assert metrics.snr_db(0) == math.inf


def test_uniform_values_have_the_textbook_snr() -> None:
    """Power A²/3 over Δ²/12 with Δ = A / 7.5."""
    x = torch.linspace(-1, 1, 20001)[None]
    error = metrics.relative_error(x, fake_quantize(x, RowFormat(4, True))).item()
    assert metrics.snr_db(error) == pytest.approx(10 * math.log10(4 * 7.5**2), abs=0.1)


def test_difficulty() -> None:
    assert metrics.difficulty(torch.full((9,), 4.0)).item() == 0
    assert metrics.difficulty(SPIKE[0]).item() == pytest.approx(math.sqrt(1 - 1 / 16))
    assert metrics.difficulty(torch.tensor([3.0, 1.0])).item() == pytest.approx(1 / math.sqrt(5))


def test_qsur_of_known_ellipsoids() -> None:
    zero = torch.zeros(2)
    long = torch.diag(torch.tensor([1.0, 4.0]))
    turned = torch.tensor([[2.5, 1.5], [1.5, 2.5]])  # the same ellipse turned by 45 degrees
    assert metrics.qsur(zero, 7 * torch.eye(2)).item() == pytest.approx(1)
    assert metrics.qsur(zero, long).item() == pytest.approx(math.sqrt(2) / 2)
    assert metrics.qsur(zero, turned).item() == pytest.approx(math.sqrt(2) / math.sqrt(2.5))
    reach = math.sqrt(metrics.chi2_quantile(2))
    assert metrics.qsur(torch.tensor([3.0, 0.0]), torch.eye(2)).item() == pytest.approx(2 * reach / (3 + 2 * reach))
    assert metrics.qsur(torch.zeros(3), torch.diag(torch.tensor([1.0, 1.0, 0.0]))).item() < 0.1


def test_chi2_quantile() -> None:
    assert metrics.chi2_quantile(2) == pytest.approx(-2 * math.log(0.01), rel=3e-3)  # exponential
    samples = random_rows(1, 40_000, 50).square().sum(-1)
    assert metrics.chi2_quantile(50) == pytest.approx(samples.quantile(0.99).item(), rel=0.01)


def test_massive() -> None:
    peaks = torch.tensor([1.0, 2.0, 50.0, 3.0, 2.0, 19.0, 2.0])
    assert metrics.massive(peaks).tolist() == [2]
    assert metrics.massive(peaks, factor=9).tolist() == [2, 5]


def test_rounding_error_is_what_rounding_makes() -> None:
    weight = random_rows(2, 64, 512).float()
    weight[3] *= 100
    for group in (0, 128):
        form = WeightFormat(4, group)
        scale = rtn.weight_scale(weight, form, torch.float32)
        steps = scale.square().mean(-1).sqrt()
        made = metrics.relative_error(weight, form.dequantize(form.quantize(weight, scale), scale))
        assert metrics.rounding_error(weight, steps).mean().item() == pytest.approx(made.mean().item(), rel=0.03)
    rows = random_rows(5) - random_rows(5).mean(-1, keepdim=True)
    predicted = metrics.rounding_error(rows, RowFormat(4, False).step(rows))
    torch.testing.assert_close(predicted, gsr(rows, RowFormat(4, False)).square() / 12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), factor=st.sampled_from([1e-3, 0.37, 1.0, 40.0]))
def test_figures_do_not_depend_on_scale_or_order(seed: int, factor: float) -> None:
    x = random_rows(seed)
    other = factor * x[:, torch.randperm(16, generator=torch.Generator().manual_seed(seed))]
    for figure in (metrics.peak_to_rms, metrics.kurtosis, lambda y: gsr(y, RowFormat(4, False))):
        torch.testing.assert_close(figure(other).double(), figure(x).double(), rtol=1e-5, atol=0)
    norms = x.square().sum(0).sqrt()
    assert metrics.difficulty(factor * norms).item() == pytest.approx(metrics.difficulty(norms).item())
    mean, covariance = x.mean(0), x.T.cov() + torch.eye(16)
    scaled = metrics.qsur(factor * mean, factor**2 * covariance).item()
    assert scaled == pytest.approx(metrics.qsur(mean, covariance).item(), rel=1e-4)
    assert 0 < scaled <= 1
    assert bool((metrics.peak_to_rms(x) >= 1).all() and (metrics.peak_to_rms(x) <= 4).all())
