"""Round to nearest, with a search for the scale of each row.

Weights are symmetric: w' = s round(w / s), s = c absmax / ((2^b - 1) / 2). The search takes, for each row
(or group of a row), the c on a grid that minimises sum |w - w'|^p; p = 2.4 as in QuaRot's clip search.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant_kernels.formats import WeightFormat

EXPONENT = 2.4
GRID = tuple(1 - step / 100 for step in range(0, 80, 2))  # down to 0.22
CACHED = 1 << 17  # weights searched at a time, so that the steps of a trial stay in the processor's cache


def weight_scale(
    weight: Tensor, form: WeightFormat, dtype: torch.dtype, *, clip_search: bool = False, clip: Tensor | None = None
) -> Tensor:
    """Scales of a weight matrix.

    Args:
        weight: float [N, K].
        dtype: in which the checkpoint stores scales; they are rounded to it here, before any code is made.
        clip: known ratios [N, G], which take the search's place.
    Returns:
        float32 [N, G].
    """
    groups = form.grouped(weight.float())
    scale = form.scale(groups)
    if clip is not None:
        return stored(scale.squeeze(-1) * clip.to(scale), dtype)
    if not clip_search:
        return stored(scale, dtype).squeeze(-1)
    rows = max(1, CACHED // weight.shape[1])
    return torch.cat([searched(part, form, dtype) for part in groups.split(rows)]).squeeze(-1)


def searched(groups: Tensor, form: WeightFormat, dtype: torch.dtype) -> Tensor:
    """The scale [n, G, 1] of GRID with the least Σ |error|^EXPONENT for each group of [n, G, K / G]."""
    peak = groups.abs().amax(-1, keepdim=True)  # all that a scale depends on
    scale = stored(form.scale(peak), dtype)
    best = torch.full_like(scale, float("inf"))
    for ratio in GRID:
        trial = stored(form.scale(peak, ratio), dtype)
        error = groups - form.round(groups, trial).float() * trial
        loss = error.abs_().log_().mul_(EXPONENT).exp_().sum(-1, keepdim=True)  # five times as fast as pow
        scale = torch.where(loss < best, trial, scale)
        best = torch.minimum(loss, best)
    return scale


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it comes back from the checkpoint: rounded to its dtype, never 0."""
    return scale.to(dtype).float().clamp(min=torch.finfo(dtype).tiny)
