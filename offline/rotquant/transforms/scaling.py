"""Scales per channel: difficulty is moved from activations to weights before a rotation spreads it.

    x Wᵀ = (x Λ⁻¹) (W Λ)ᵀ                 Λ = diag(λ), λ_j = max|x_j|^alpha / max|W_j|^(1 - alpha)   (SmoothQuant)
         = (x Λ⁻¹ H) (W Λ H)ᵀ             (SmoothRot, arXiv 2506.05413)

A rotation alone leaves a token with outliers o_i a peak near Σ|o_i| / sqrt(d); scaling the outliers down first lowers
that peak. At up → down Λ⁻¹ folds into up_proj's rows, so it costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
