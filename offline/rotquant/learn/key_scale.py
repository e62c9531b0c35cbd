"""S_qk before anything is learned: keys are cached in few bits, queries are not, so difficulty moves to the queries.

A rotated head (R3) of keys is rounded in steps of its norm, with an error that is even over its channels. With factors
s on keys and 1 / s on queries, the error of a score is therefore, up to a constant,

    E |s k|²  E |q / s|²  =  (Σ s_i² K_i) (Σ Q_i / s_i²),     K_i = E k_i²,  Q_i = E q_i²

which is least, (Σ sqrt(K_i Q_i))² by Cauchy and Schwarz, for s_i² = sqrt(Q_i / K_i). RoPE moves energy between the two
channels of a pair, and keeps their sum: K_i and Q_i are of pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant.models import Layer, Tensors
from rotquant.models.attention import Attention
from rotquant.models.decoder import bias_of, rms_norm

FLOOR = 1e-6  # of the mean energy: channels with less count as this


def key_scale(kind: Layer, attention: Attention, tensors: Tensors, x: Tensor) -> Tensor:
    """Factors of keys, float64 [kv_heads, qk_factors], geometric mean 1; one row where norms of queries and keys take
    them.

    Args:
        tensors: of the layer; x: sample of what queries and keys read, float32 [n, hidden].
    """
    query, key = (_behind_norm(kind, attention, tensors, name, x) for name in (attention.query, attention.key))
    heads = 1 if attention.key_norm and attention.query_norm else attention.kv_heads
    energies = (_energies(y, attention).view(heads, -1, attention.qk_factors).mean(1) for y in (query, key))
    q, k = (e.clamp(min=FLOOR * e.mean().item()).clamp(min=torch.finfo(torch.float64).tiny) for e in energies)
    log = (q.log() - k.log()) / 4
    return (log - log.mean(-1, keepdim=True)).exp()


def _behind_norm(kind: Layer, attention: Attention, tensors: Tensors, linear: str, x: Tensor) -> Tensor:
    """Heads of queries or keys before RoPE, float32 [n, heads, d]."""
    y = torch.nn.functional.linear(x.to(tensors[f"{linear}.weight"]), tensors[f"{linear}.weight"])
    bias = bias_of(tensors, linear)
    is_query = linear == attention.query
    size = attention.head_dim * (2 if is_query and attention.gated else 1)
    rows = (y if bias is None else y + bias).unflatten(-1, (-1, size))[..., : attention.head_dim]
    norm = attention.query_norm if is_query else attention.key_norm
    return rms_norm(rows, tensors[f"{norm}.weight"], kind.eps) if norm else rows


def _energies(heads: Tensor, attention: Attention) -> Tensor:
    """Mean squares of the pairs that RoPE turns, then of the other channels; float64 [heads, qk_factors], CPU."""
    found = heads.double().square().mean(0).cpu()
    half = attention.rotary // 2
    paired = (found[:, :half] + found[:, half : 2 * half]) / 2
    return torch.cat((paired, found[:, 2 * half :]), dim=-1)
