"""Round to nearest, with a search for the scale of each row.

Weights are symmetric: w' = s round(w / s), s = c absmax / ((2^b - 1) / 2). The search takes, for each row
(or group of a row), a c that minimises sum |w - w'|^p; p = 2.4 as in QuaRot's clip search. It walks down a coarse grid
until no row gains any more, and then looks around each row's best: of 40 ratios 10 to 15 are tried, and 99% of rows
get what all 40 would give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant_kernels.formats import WeightFormat

EXPONENT = 2.4
STEP, COARSE = 0.02, 3  # of the ratios; coarse steps are COARSE times as long
COARSE_GRID = tuple(1 - STEP * step for step in range(1, 40, COARSE))  # 0.98 down to 0.26
PATIENCE = 3  # coarse steps in which no row gains
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
    """A scale [n, G, 1] of least Σ |error|^EXPONENT for each group of [n, G, K / G]; ratios 0.22, 0.24 ... 1."""
    peak = groups.abs().amax(-1, keepdim=True)  # all that a scale depends on
    least, best = torch.full_like(peak, float("inf")), torch.ones_like(peak)

    def attempt(ratio: Tensor) -> bool:
        """Whether some group gained."""
        nonlocal least, best
        loss = clipping_loss(groups, clipped(peak, form, ratio, dtype), form)
        gains = loss < least
        least, best = torch.where(gains, loss, least), torch.where(gains, ratio, best)
        return groups.is_meta or bool(gains.any())

    idle = 0
    for ratio in COARSE_GRID:
        idle = 0 if attempt(torch.full_like(peak, ratio)) else idle + 1
        if idle == PATIENCE:
            break
    centre = best
    for step in range(1 - COARSE, COARSE):
        if step:
            attempt((centre + STEP * step).clamp(max=1))
    return clipped(peak, form, best, dtype)


def clipped(peak: Tensor, form: WeightFormat, ratio: Tensor, dtype: torch.dtype) -> Tensor:
    """The stored scale whose range is `ratio` of the peak's."""
    return stored(form.scale(peak) * ratio, dtype)


def clipping_loss(groups: Tensor, scale: Tensor, form: WeightFormat) -> Tensor:
    """Σ |error|^EXPONENT of each group, rounded with the scale; [n, G, 1]."""
    codes = form.rows.snap_(groups / scale)
    error = torch.addcmul(groups, codes, scale, value=-1, out=codes).abs_()
    return error.log_().mul_(EXPONENT).exp_().sum(-1, keepdim=True)  # five times as fast as pow


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it comes back from the checkpoint: rounded to its dtype, never 0."""
    return scale.to(dtype).float().clamp(min=torch.finfo(dtype).tiny)
