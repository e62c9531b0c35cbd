"""Keys with error feedback: what one channel loses in rounding, those behind it make good, before they are rounded.

A score is q · k, so what counts of a key's rounding error e is q · e over the queries q that meet it,
E (q · e)² = e H eᵀ with their second moments H = E qᵀ q, where queries and keys are as the cache has them (behind RoPE
and R3). Channel after channel is rounded; with H⁻¹ = Uᵀ U, U upper triangular, the change of all later channels that
leaves the least of e H eᵀ for an error e_j of channel j is

    x_k -= e_j F_jk,  k > j,     F_jk = U_jk / U_jj

(GPTQ, arXiv:2210.17323, there of weights by the moments of inputs, once; here of every key as it is written). Scale
and zero point are those of the row as it came, so that pages, and who reads them, stay what they are. An error counts
at most `LARGEST_ERROR` steps, which only a value far beyond a clipped range would exceed: no row grows without end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant_kernels.formats.integers import RowFormat

LARGEST_ERROR = 8.0  # steps


def quantize(x: Tensor, rows: RowFormat, feedback: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of keys, each product and each difference rounded to float32 by itself.

    Args:
        x: float [..., heads, d]; feedback: F float32 [heads, d, d], of which what is above the diagonal is read.
    Returns:
        int8 codes like x, scale and zero point float32 [..., heads, 1].
    """
    scale, zero = rows.qparams(x)
    step, offset = (t.movedim(-2, 0).flatten(1) for t in (scale, zero))  # [heads, N]
    left = x.float().movedim(-2, 0).flatten(1, -2).mT.contiguous()  # [heads, d, N], changed in place
    codes = torch.empty_like(left)
    for j in range(left.shape[1]):
        codes[:, j] = rows.snap_(left[:, j] / step + offset)
        most = LARGEST_ERROR * step
        error = (left[:, j] - (codes[:, j] - offset) * step).clamp(-most, most)
        left[:, j + 1 :] -= error[:, None] * feedback[:, j, j + 1 :, None]
    codes = codes.nan_to_num_(0).to(torch.int8).mT.contiguous().unflatten(1, (*x.shape[:-2],)).movedim(0, -2)
    return codes, scale, zero


def fake_quantize(x: Tensor, rows: RowFormat, feedback: Tensor) -> Tensor:
    """x float [..., heads, d] as it comes back, float32."""
    codes, scale, zero = quantize(x, rows, feedback)
    return rows.dequantize(codes, scale, zero)
