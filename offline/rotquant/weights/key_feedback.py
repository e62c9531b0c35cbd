"""F of keys with error feedback, from the queries that meet them (`rotquant_kernels.formats.feedback`)."""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant.models.attention import Attention
from rotquant.models.decoder import Decoder, Linear
from rotquant.models.layer import Tensors
from rotquant_kernels import reference

DAMPING = 0.01  # of the mean energy of a channel: directions that no query of the text has


def moments(decoder: Decoder, attention: Attention, tensors: Tensors, x1: Tensor, linear: Linear, r3: int) -> Tensor:
    """Sum over tokens and over the query heads of a KV head of q qᵀ, queries as the cache's keys meet them.

    Args:
        x1: what the layer's linears read, [T, hidden]; r3: block of the Hadamard on queries and keys.
    Returns:
        float32 [kv_heads, d, d].
    """
    query, _ = decoder.query_and_gate(linear(attention.query, x1), attention)
    query, _ = decoder.behind_rope(tensors, query, linear(attention.key, x1), attention)
    query = reference.hadamard(query, r3) if r3 else query
    rows = query.movedim(-2, 0).unflatten(0, (attention.kv_heads, -1)).flatten(1, 2)  # [kv_heads, group * T, d]
    return rows.mT @ rows


def factor(total: Tensor) -> Tensor:
    """F float32 [kv_heads, d, d], upper triangular with ones on the diagonal, from sums of `moments`; on the CPU.

    With H⁻¹ = Uᵀ U, U upper triangular, F_jk = U_jk / U_jj.
    """
    h = total.double().cpu()
    damping = DAMPING * h.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    h = h + damping[:, None, None] * torch.eye(h.shape[1], dtype=h.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    return (upper / upper.diagonal(dim1=1, dim2=2)[..., None]).float()
