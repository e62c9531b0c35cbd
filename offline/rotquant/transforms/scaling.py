"""Scales per channel: difficulty is moved from activations to weights before a rotation spreads it.

    x Wᵀ = (x Λ⁻¹) (W Λ)ᵀ                 Λ = diag(λ), λ_j = max|x_j|^alpha / max|W_j|^(1 - alpha)   (SmoothQuant)
         = (x Λ⁻¹ H) (W Λ H)ᵀ             (SmoothRot, arXiv 2506.05413)

A rotation alone leaves a token with outliers o_i a peak near Σ|o_i| / sqrt(d); scaling the outliers down first lowers
that peak. At up → down Λ⁻¹ folds into up_proj's rows, so it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rotquant.learn.quantizers import fake_quantize, fake_quantize_weight

FLOOR = 1e-5  # of the largest channel: smaller ones count as this
LIMIT = 1e4  # no scale is further than this from the geometric mean


def smooth_scale(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """λ float64 [K], geometric mean 1 (a common factor changes no code of a quantizer).

    Args:
        x_max, w_max: largest |x| and |W| of each input channel, float [K] >= 0. A channel of zeros counts as FLOOR
            of the largest, so dead inputs and unused ones get scales that hide them from the other side.
        alpha: 0 (weights made even) to 1 (activations made even).
    """
    logs = [m.double().clamp(min=FLOOR * m.max().double()).clamp(min=1e-30).log() for m in (x_max, w_max)]
    log = alpha * logs[0] - (1 - alpha) * logs[1]
    limit = torch.tensor(LIMIT, dtype=log.dtype).log().item()
    return (log - log.mean()).clamp(-limit, limit).exp()


def search_scale(
    x: Tensor,
    weight: Tensor,
    rotate: Callable[[Tensor], Tensor],
    act_bits: int = 4,
    act_symmetric: bool = True,
    act_clip: float = 1.0,
    weight_bits: int = 4,
    step: float = 0.05,
) -> tuple[float | None, Tensor, dict[float | None, float]]:
    """The alpha of a grid with the least output error |Q(x Λ⁻¹ H) Q(W Λ H)ᵀ - x Wᵀ|² / |x Wᵀ|² on a sample.

    Args:
        x: sample of inputs, float [n, K]; the maxima are the sample's.
        weight: float [N, K]; x and W are quantized per token and per output channel, rounded to nearest.
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
        seen = fake_quantize(rotate(x.float() / scale.to(x)), act_bits, act_symmetric, act_clip)
        stored = fake_quantize_weight(rotate(weight.float() * scale.to(weight)), weight_bits)
        errors[alpha] = ((seen @ stored.mT - exact).square().sum() / exact.square().sum()).item()
    best = min(errors, key=lambda alpha: errors[alpha])
    return best, scales[best], errors
