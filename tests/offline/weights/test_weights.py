"""RTN with clip search, and GPTQ."""

import pytest
import torch

from rotquant.errors import RotQuantError
from rotquant.weights import gptq, rtn
from rotquant_kernels.formats import WeightFormat


def correlated(rows: int, columns: int) -> torch.Tensor:
    mix = torch.randn(columns, columns) / columns**0.5
    return torch.randn(rows, columns) @ mix + 0.5 * torch.randn(rows, 1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_scales_are_stored_before_codes_are_made():
    weight = torch.randn(16, 64)
    scale = rtn.weight_scale(weight, WeightFormat(), torch.bfloat16)
    assert torch.equal(scale, scale.bfloat16().float())
    assert torch.allclose(scale[:, 0], weight.abs().amax(1) / 7.5, rtol=0.01)


def test_clip_search_lowers_the_error():
    weight = torch.randn(32, 256)
    weight[:, 5] *= 6
    errors, form = [], WeightFormat()
    for search in (False, True):
        scale = rtn.weight_scale(weight, form, torch.float32, clip_search=search)
        errors.append((form.dequantize(form.quantize(weight, scale), scale) - weight).abs().pow(2.4).sum())
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("group", [0, 64])
def test_the_coarse_walk_finds_what_every_ratio_would(group):
    """All 40 ratios, on rows of light and of heavy tails: nearly all rows get the same, none a much worse one."""
    weight = torch.randn(64, 256) * torch.rand(64, 1).exp()
    weight[32:] *= torch.randn(32, 256).abs()
    form = WeightFormat(4, group)
    groups = form.grouped(weight)
    ratios = [torch.full((*groups.shape[:2], 1), 1 - step / 50) for step in range(40)]
    peak = groups.abs().amax(-1, keepdim=True)
    every = torch.stack([rtn.clipping_loss(groups, rtn.clipped(peak, form, r, torch.float32), form) for r in ratios])
    scale = rtn.weight_scale(weight, form, torch.float32, clip_search=True)
    found = rtn.clipping_loss(groups, scale.unsqueeze(-1), form)
    least = every.amin(0)
    assert (found <= least * 1.0001).float().mean() > 0.95
    assert found.sum() < 1.002 * least.sum()


def test_gptq_is_its_definition():
    """Column by column: round, and spread the error over all columns that follow."""
    weight, x = torch.randn(6, 160).double(), correlated(400, 160)
    prepared = gptq.columns(x.T @ x / len(x))
    scale = rtn.weight_scale(weight, WeightFormat(4, 32), torch.float32)
    rest, wanted = weight.clone(), torch.empty(6, 160)
    for place, column in enumerate(prepared.order.tolist()):
        s = scale[:, column // 32].double()
        wanted[:, column] = (rest[:, column] / s).round().clamp(-8, 7)
        error = (rest[:, column] - wanted[:, column] * s) / prepared.upper[place, place]
        rest[:, prepared.order] -= error[:, None] * prepared.upper[place].double() * (torch.arange(160) >= place)
    codes = gptq.quantize(weight, scale, prepared, WeightFormat(4, 32))
    assert (codes != wanted).float().mean() < 0.01  # float32 against float64 at a tie


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rounding_on_correlated_inputs(group, act_order):
    x, weight = correlated(2000, 192), torch.randn(48, 192)
    form = WeightFormat(4, group)
    scale = rtn.weight_scale(weight, form, torch.float32)
    hessian = x.T @ x / len(x)
    rounded = form.dequantize(form.quantize(weight, scale), scale)
    better = form.dequantize(gptq.quantize(weight, scale, gptq.columns(hessian, act_order=act_order), form), scale)
    error = [((w - weight) @ x.T).square().sum() for w in (rounded, better)]
    assert error[1] < 0.7 * error[0]


def test_gptq_is_rounding_where_inputs_are_independent():
    weight = torch.randn(8, 64)
    scale = rtn.weight_scale(weight, WeightFormat(), torch.float32)
    codes = gptq.quantize(weight, scale, gptq.columns(torch.eye(64)), WeightFormat())
    assert torch.equal(codes, WeightFormat().quantize(weight, scale))


def test_refit_takes_back_what_quantization_does_to_every_token():
    """A first token that is quantized the same wrong way each time is mapped to its exact output again."""
    x = torch.randn(4000, 48)
    x[::8] = 20 * torch.randn(48)
    seen = x + 0.1 * torch.randn_like(x)
    seen[::8] = x[0] * (1 + 0.2 * torch.randn(48))
    weight = torch.randn(16, 48)
    hessian, drift = (a.T @ seen / len(x) for a in (seen, x - seen))
    fitted = gptq.refit(weight, drift, gptq.factor(hessian, damping=1e-4))
    before, after = (((x @ weight.T - seen @ w.T)[::8]).norm() for w in (weight, fitted))
    assert after < 0.1 * before
    residual = (x @ weight.T - seen @ fitted.T).T @ seen / len(x)  # the gradient of the squared error
    assert residual.abs().max() < 0.01 * (weight @ (hessian + drift)).abs().max()


def test_refit_changes_nothing_where_inputs_are_exact():
    x, weight = torch.randn(500, 32), torch.randn(8, 32)
    assert torch.equal(gptq.refit(weight, torch.zeros(32, 32), gptq.factor(x.T @ x / len(x), 0.01)), weight)


def test_gptq_survives_dead_and_singular_inputs():
    x, weight = correlated(10, 64), torch.randn(8, 64)
    x[:, 3] = 0
    scale = rtn.weight_scale(weight, WeightFormat(), torch.float32)
    codes = gptq.quantize(weight, scale, gptq.columns(x.T @ x), WeightFormat())
    assert (codes[:, 3] == 0).all()
    with pytest.raises(RotQuantError, match="singular"):
        gptq.inverse_factor(torch.full((4, 4), float("nan")), 0.01)
    with pytest.raises(RotQuantError, match="singular"):
        gptq.factor(torch.full((4, 4), float("nan")), 0.01)
