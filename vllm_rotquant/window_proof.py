"""The start-up proof of a sliding window, of any length, in two short steps over a handful of pages.

The window's pages are one page again and again, but for its first, whose V is as large as all the others together:
with equal weights (queries of 0) a token more or less at the window's start changes the mean by far more than rounding.
What comes before is a page of scales that are NaN, so a token too many is NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_rotquant.witness import distance, exact, product, sign_of_extreme, trial

PAGE = 16  # tokens
BEFORE = 2 * PAGE  # positions that no query of a step sees
LOUDEST = 1024.0  # V of the first page, times a trial row: far within float16
CHUNK = 17  # queries of the second step, enough for kernels that treat prefill apart


def window_distance(layer: Any, metadata: type) -> float:
    """Distance of the layer's attention, as served, from the mean of V over its window: a decode step and a chunk.

    Args:
        layer: whose implementation has a window; metadata: class of a step, of three tensors.
    """
    window, kv, dim, dtype = layer.impl.window, layer.quant_method.format, layer.head_size, layer.dtype
    device = next(iter(layer.buffers())).device
    loud = min(window / PAGE, LOUDEST)
    key, value = (trial(2 * PAGE, layer.num_kv_heads, dim, dtype=dtype, device=device, seed=seed) for seed in (11, 12))
    value = value * sign_of_extreme(value).to(dtype)
    value = (
        value
        * torch.tensor([loud, loud * PAGE / window], device=device).repeat_interleave(PAGE).to(dtype)[:, None, None]
    )
    cache = torch.full((3, layer.num_kv_heads, PAGE, kv.token_bytes(dim)), 255, dtype=torch.uint8, device=device)
    layer.impl.do_kv_cache_update(layer, key, value, cache, torch.arange(PAGE, 3 * PAGE, device=device))
    stored = exact(kv.value.fake_quantize(exact(value))).flatten(1)
    errors = []
    for steps in (1, CHUNK):
        length = BEFORE + window + steps - 1
        pages = [0] * (BEFORE // PAGE) + [1] + [2] * (-(-length // PAGE) - BEFORE // PAGE - 1)
        starts, lens, table = (
            torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, steps], [length], [pages])
        )
        query = torch.zeros(steps, layer.num_heads, dim, dtype=dtype, device=device)
        got = layer.impl.forward(
            layer, query, key, value, cache, metadata(starts, lens, table), torch.empty_like(query)
        )
        expected = product(seen(window, steps) / window, stored).view(steps, layer.num_kv_heads, dim)
        errors.append(distance(got, expected.repeat_interleave(layer.num_heads // layer.num_kv_heads, 1)))
    return float(torch.tensor(errors, dtype=torch.float64).max())  # NaN where there is one


def seen(window: int, steps: int) -> Tensor:
    """How often each query sees each token of the two pages, float64 [steps, 2 PAGE]."""
    place = torch.arange(window + steps - 1)
    token = torch.where(place < PAGE, place, PAGE + place % PAGE)
    rows = [token[step : step + window].bincount(minlength=2 * PAGE) for step in range(steps)]
    return torch.stack(rows).double()
