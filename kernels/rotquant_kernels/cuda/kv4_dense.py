"""Attention over 4-bit pages for long prefills: K and V as numbers of 16 bits, then an attention kernel for those.

    workspace = gather(pages)            per layer, K in R3's basis            `kv4_gather`
    out       = dense(q R3, workspace)   who computes it is the caller's: FlashAttention, where there is one

The int8 kernel of long rows (`kv4_prefill`) unpacks a tile of the pages for every 64 rows of queries; here that
happens once. Rounding K, V and q to bfloat16 adds 2^-9 of each, far less than what 4 bits have lost.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from rotquant_kernels.cuda import kv4_gather
from rotquant_kernels.cuda.kv4 import WARPS, check, check_pages, common, strides, table_of
from rotquant_kernels.cuda.rope import Rope, constants
from rotquant_kernels.cuda.workspace import PAGE, Dense, Workspace


def gather(
    cache: Tensor, block_table: Tensor, seq_lens: Tensor, room: Workspace, dim: int, dtype: torch.dtype, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """`reference.kv4_gather`: K and V of sequences, [pages, PAGE, KV heads, d] each.

    Raises:
        RuntimeError: naming the argument whose shape, dtype or layout is not supported.
    """
    pages = check_pages(cache, dim, symmetric, 0)
    integers = (block_table, seq_lens, room.first)
    check(all(one.dtype == torch.int32 for one in integers), "block_table, seq_lens, first must be int32")
    check(block_table.stride(1) == 1, "block_table must have a row a sequence")
    heads, sequences = cache.shape[1], seq_lens.shape[0]
    keys, values = (torch.empty((room.pages, PAGE, heads, dim), dtype=dtype, device=cache.device) for _ in range(2))
    shared = common(dim, cache.shape[2], 0, symmetric, 1, 1)
    shared = {name: shared[name] for name in ("DIM", "PADDED", "PAGE", "SYMMETRIC")}
    kv4_gather.gather[triton.cdiv(room.longest, PAGE), sequences, heads](
        pages, block_table, seq_lens, room.first, keys, values, *strides(pages), block_table.stride(0), heads,
        **shared, num_warps=max(shared["PADDED"] // 16, 1), enable_fp_fusion=False,
    )  # fmt: skip
    return keys, values


def turned(
    query: Tensor, rotate: int, query_start: Tensor | None = None, seq_lens: Tensor | None = None,
    rope: Rope | None = None,
) -> Tensor:  # fmt: skip
    """Queries [T, heads, d] in R3's basis, contiguous, in their dtype; at their positions first where there is RoPE."""
    tokens, heads, dim = query.shape
    out = torch.empty((tokens, heads, dim), dtype=query.dtype, device=query.device)
    shared = common(dim, 16, rotate, True, kv4_gather.ROWS, WARPS)
    shared = {name: shared[name] for name in ("DIM", "PADDED", "BLOCK", "STAGES", "NORM", "HELD")} | constants(rope)
    sequences = 0 if seq_lens is None else seq_lens.shape[0]
    kv4_gather.turn[triton.cdiv(tokens * heads, kv4_gather.ROWS),](
        query, out, query_start, seq_lens, table_of(rope, query), *strides(query), tokens, sequences, HEADS=heads,
        **shared, ROWS=kv4_gather.ROWS, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def attention(
    query: Tensor, cache: Tensor, query_start: Tensor, seq_lens: Tensor, block_table: Tensor, out: Tensor,
    scale: float, rotate: int, symmetric: bool, room: Workspace, most_new: int, dense: Dense, rope: Rope | None = None,
) -> None:  # fmt: skip
    """`reference.kv4_attention` of sequences that have room in a workspace; no padding behind them.

    Args:
        most_new: of the tokens of a sequence in this step; rope: as `kv4.attention` takes it.
    """
    keys, values = gather(cache, block_table, seq_lens, room, query.shape[2], query.dtype, symmetric)
    placed = turned(query, rotate, *((query_start, seq_lens, rope) if rope else ()))
    dense(placed, keys, values, out, query_start, seq_lens, room.table, most_new, room.longest, scale)
