"""Triton: pages of 4-bit K and V as numbers of 16 bits, for attention kernels that know no codes: long prefills.

A workspace (`workspace`) has pages of its own, a tile each, one sequence behind the other. K stays in R3's basis, so
the queries are turned instead. A word of a page is eight steps of one channel (`kv4_tiles`): eight dimensions of a
token of K, eight tokens of a dimension of V. Behind the end of a sequence lie zeros up to the end of its last page,
since 0 * NaN is NaN.
"""
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from rotquant_kernels.cuda.kv4_rows import PER_STEP, hadamard, load_rows, positions_of
from rotquant_kernels.cuda.kv4_tiles import TILE, load_scales

ROWS = 16  # rows of queries of a program


@triton.jit(do_not_specialize=[*PER_STEP, "first"])
def gather(
    cache, table, seq_lens, first, keys, values, cache_block, cache_head, table_row, heads, DIM: tl.constexpr,
    PADDED: tl.constexpr, PAGE: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Tile program_id(0) of sequence program_id(1), KV head program_id(2).

    keys, values [pages, TILE, heads, DIM]; sequence s has the pages from first[s] on.
    """
    sequence, head = tl.program_id(1), tl.program_id(2)
    start, end = tl.program_id(0) * TILE, tl.load(seq_lens + sequence)
    if start < end:
        plane = cache + head.to(tl.int64) * cache_head
        pages = table + sequence.to(tl.int64) * table_row
        place, dim, eighth = start + tl.arange(0, TILE), tl.arange(0, PADDED), tl.arange(0, 8)
        shift = eighth % 4 * 8 + eighth // 4 * 4
        key_scale, value_scale, key_zero, value_zero = load_scales(
            plane, pages, place, 0, end, cache_block, DIM, PAGE, SYMMETRIC
        )
        page = tl.load(pages + place // PAGE, mask=place < end, other=0).to(tl.int64)
        at = plane + page * cache_block + place % PAGE // 16 * (8 * DIM) + place % 16 * 4
        word = tl.arange(0, PADDED // 8)
        at = (at[:, None] + (word // 2 * 128 + word % 2 * 64)[None, :]).to(tl.pointer_type(tl.int32), bitcast=True)
        stored = tl.load(at, mask=(place < end)[:, None] & (word < DIM // 8)[None, :], other=0)
        codes = tl.reshape((stored[:, :, None] >> shift[None, None, :]) & 15, [TILE, PADDED])
        k = (codes.to(tl.float32) - key_zero[:, None]) * key_scale[:, None]

        eight = start + tl.arange(0, TILE // 8) * 8
        page = tl.load(pages + eight // PAGE, mask=eight < end, other=0).to(tl.int64)
        at = plane + page * cache_block + PAGE * DIM // 2 + eight % PAGE // 16 * (8 * DIM) + eight % 16 * 8
        at = (at[:, None] + (dim // 16 * 128 + dim % 16 * 4)[None, :]).to(tl.pointer_type(tl.int32), bitcast=True)
        stored = tl.load(at, mask=(eight < end)[:, None] & (dim < DIM)[None, :], other=0)
        codes = tl.reshape((stored[:, None, :] >> shift[None, :, None]) & 15, [TILE, PADDED])
        v = (codes.to(tl.float32) - value_zero[:, None]) * value_scale[:, None]

        row = (tl.load(first + sequence) + tl.program_id(0)).to(tl.int64) * TILE + tl.arange(0, TILE)
        to = (row * heads + head)[:, None] * DIM + dim[None, :]
        inside = (dim < DIM)[None, :]
        tl.store(keys + to, tl.where((place < end)[:, None], k, 0.0).to(keys.dtype.element_ty), mask=inside)
        tl.store(values + to, tl.where((place < end)[:, None], v, 0.0).to(keys.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=PER_STEP)
def turn(
    query, out, query_start, seq_lens, cos_sin, query_token, query_head, tokens, sequences, HEADS: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr,
    HELD: tl.constexpr, ROPE: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Queries in R3's basis, at their positions if ROPE; out contiguous [tokens, HEADS, DIM]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED)
    token, head = (row // HEADS).to(tl.int64), row % HEADS
    inside = (token < tokens)[:, None] & (dim < DIM)[None, :]
    position = positions_of(query_start, seq_lens, row // HEADS, sequences, ROWS) if ROPE > 0 else row
    x = load_rows(query + token * query_token + head * query_head, dim, inside, position, cos_sin, ROPE, PAIRS)
    if BLOCK > 0:
        x = hadamard(x, ROWS, PADDED, BLOCK, STAGES, NORM, HELD)
    to = out + row.to(tl.int64)[:, None] * DIM + dim[None, :]
    tl.store(to, x.to(out.dtype.element_ty), mask=inside)
