"""RoPE inside the launches of the 4-bit KV cache, in the place of a kernel of vLLM's in front of them.

    before    q, k = rotary_emb(positions, q, k);  write(R3 k, v);  attend(R3 q)
    joined    q, k as they are;                    write(R3 RoPE k, v);  attend(R3 RoPE q)

A row of q or k stands where its token stands in its sequence, which both launches know: vLLM counts a sequence's
positions from 0 and chooses slots by them. K is then written inside attention's own op, which knows the step. Products
and sums are rounded as models do (`rope.turned`). Needs modules whose forward is known, which `compat` lists; what it
does not know keeps vLLM's kernel: a Llama 4 that scales its queries, sections of positions (M-RoPE), partial kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rotquant_kernels.backends import backend_of
from rotquant_kernels.cuda.rope import Rope
from vllm_rotquant import compat
from vllm_rotquant.holders import Holders

ROOM = 64  # positions beyond a window that its start-up check stands at


class Deferred(torch.nn.Module):
    """In the place of a rotary embedding whose work is done where q and k are read."""

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query, key


def join_rope(layers: Iterable[Any], holders: Holders) -> None:
    """Gives attention layers over the 4-bit cache the RoPE in front of them, where it can.

    Args:
        layers: loaded attention layers with `KV4Impl`.
    """
    joined = 0
    for layer in layers:
        attention = holders.of(layer)
        device = next(iter(layer.buffers())).device
        if not backend_of("kv4_attention", device).turns_positions:
            continue
        found = compat.rotary_before(layer, attention)
        if found is None or len(found[0]) <= (layer.impl.window or 0) + ROOM:
            continue
        table, pairs = found
        layer.impl.rope = Rope(table.to(device, layer.dtype).contiguous(), pairs)
        layer.attn_backend = layer.attn_backend.with_rope
        attention.rotary_emb = Deferred()
        joined += 1
    if joined:
        compat.tell_compiled_graphs_apart("rotquant_rope", joined)
