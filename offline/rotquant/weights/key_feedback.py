"""F of keys with error feedback, from the queries that meet them (`rotquant_kernels.formats.feedback`).

RoPE turns what a query is by where it stands: y = c ∘ x + s ∘ J x with the cosines and sines c, s [d] of its position
(1 and 0 of channels that it leaves alone) and J (x1, x2) = (-x2, x1) on the halves that it turns. Calibration windows
are shorter than the contexts of a server, so that moments are taken in front of RoPE, C = E xᵀ x, and turned to all
positions that the model is made for:

    E yᵀ y = E[cᵀc] ∘ C + E[cᵀs] ∘ C Jᵀ + E[sᵀc] ∘ J C + E[sᵀs] ∘ J C Jᵀ

Small positions are more frequent than large ones, nobody knows by how much: each octave counts the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rotquant.models.attention import Attention
from rotquant.models.decoder import Decoder, Linear
from rotquant.models.layer import Tensors
from rotquant_kernels import reference

DAMPING = 0.01  # of the mean energy of a channel: directions that no query of the text has
POSITIONS = 4096  # at most so many stand for all


def moments(decoder: Decoder, attention: Attention, tensors: Tensors, x1: Tensor, linear: Linear) -> Tensor:
    """Sum over tokens, and over the query heads of a KV head, of xᵀ x, queries in front of RoPE.

    Args:
        x1: what the layer's linears read, [T, hidden].
    Returns:
        float32 [kv_heads, d, d].
    """
    still = replace(decoder, cos=torch.ones_like(decoder.cos), sin=torch.zeros_like(decoder.sin))
    query, _ = decoder.query_and_gate(linear(attention.query, x1), attention)
    query, _ = still.behind_rope(tensors, query, linear(attention.key, x1), attention)
    rows = query.movedim(-2, 0).unflatten(0, (attention.kv_heads, -1)).flatten(1, 2)  # [kv_heads, group * T, d]
    return rows.mT @ rows


def turned(total: Tensor, decoder: Decoder, attention: Attention) -> Tensor:
    """E yᵀ y of queries behind RoPE, up to a factor, float64 [kv_heads, d, d]; total: sums of `moments`."""
    half, size = attention.rotary // 2, attention.head_dim
    angles = angles_of(decoder)[:, : 2 * half]
    cos, sin = torch.ones(len(angles), size, dtype=angles.dtype), torch.zeros(len(angles), size, dtype=angles.dtype)
    cos[:, : 2 * half], sin[:, : 2 * half] = angles.cos(), angles.sin()
    c = total.double().cpu()
    left, right, n = _quarter(c, half), _quarter(c.mT, half).mT, len(angles)
    both = _quarter(left.mT, half).mT
    parts = ((cos, cos, c), (cos, sin, right), (sin, cos, left), (sin, sin, both))
    return sum((a.T @ b / n * m for a, b, m in parts), torch.zeros(()))


def angles_of(decoder: Decoder) -> Tensor:
    """Of the positions that stand for all, float64 [n, channels that RoPE turns]."""
    first = torch.atan2(decoder.sin[1:2].double(), decoder.cos[1:2].double()).cpu()  # of one position
    places = torch.linspace(0, 1, POSITIONS, dtype=torch.float64)
    return (decoder.longest**places).floor()[:, None] * first


def _quarter(m: Tensor, half: int) -> Tensor:
    """J m, of rows: the first half of the turned ones is minus the second, the second the first; 0 elsewhere."""
    return torch.cat((-m[:, half : 2 * half], m[:, :half], torch.zeros_like(m[:, 2 * half :])), dim=1)


def factor(h: Tensor, r3: int) -> Tensor:
    """F float32 [kv_heads, d, d], upper triangular with ones on the diagonal, for moments h [kv_heads, d, d]; CPU.

    Behind R3 they are R h R; with their inverse Uᵀ U, U upper triangular, F_jk = U_jk / U_jj.

    Args:
        r3: block of the Hadamard on queries and keys, 0 for none.
    """
    h = reference.hadamard(reference.hadamard(h, r3).mT.contiguous(), r3) if r3 else h
    damping = DAMPING * h.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    h = h + damping[:, None, None] * torch.eye(h.shape[1], dtype=h.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    return (upper / upper.diagonal(dim1=1, dim2=2)[..., None]).float()
