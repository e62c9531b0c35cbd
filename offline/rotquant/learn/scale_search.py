"""How far a site's scales should go: alpha of `transforms.scaling.smooth_scale` by least error on a grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rotquant.learn.quantizers import fake_quantize, fake_quantize_weight
from rotquant.transforms.scaling import smooth_scale
from rotquant_kernels.formats import RowFormat, WeightFormat


def search_scale(
    x: Tensor,
    weight: Tensor,
    rotate: Callable[[Tensor], Tensor],
    rows: RowFormat,
    weights: WeightFormat,
    step: float = 0.05,
) -> tuple[float | None, Tensor, dict[float | None, float]]:
    """The alpha of a grid with the least output error |Q(x Λ⁻¹ H) Q(W Λ H)ᵀ - x Wᵀ|² / |x Wᵀ|² on a sample.

    Args:
        x: sample of inputs, float [n, K]; the maxima are the sample's.
        weight: float [N, K]; x and W are rounded to nearest, in their formats.
        rotate: rows [..., K] to x H, e.g. `lambda x: hadamard(x, block)`.
        step: distance of alphas in 0 .. 1.
    Returns:
        alpha, or None where no scale at all is best; λ float64 [K]; the error of each alpha tried.
    """
    exact = x.float() @ weight.float().mT
    x_max, w_max = x.abs().amax(0), weight.abs().amax(0)
    scales: dict[float | None, Tensor] = {None: torch.ones_like(x_max, dtype=torch.float64)}
    scales |= {alpha: smooth_scale(x_max, w_max, alpha) for alpha in (i * step for i in range(round(1 / step) + 1))}
    errors = {}
    for alpha, scale in scales.items():
        seen = fake_quantize(rotate(x.float() / scale.to(x)), rows)
        stored = fake_quantize_weight(rotate(weight.float() * scale.to(weight)), weights)
        errors[alpha] = ((seen @ stored.mT - exact).square().sum() / exact.square().sum()).item()
    best = min(errors, key=lambda alpha: errors[alpha])
    return best, scales[best], errors
