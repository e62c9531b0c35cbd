"""Triton attention over 4-bit pages for few rows a sequence: decoding, speculative tokens. See `kv4_tiles`.

Products are transposed, so that the tile is the matrix unit's long side and its codes the operand that may come from
registers; the rows are the short side, 8 at least:

    S [tokens, rows] = K qᵀ,    O [d, rows] = Vᵀ P

The context of a sequence is cut into parts, which `merge` puts together.
"""
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from rotquant_kernels.cuda.kv4_rows import PER_STEP, rint
from rotquant_kernels.cuda.kv4_tiles import (
    LOWEST,
    MOST_WEIGHT,
    OFFSET,
    TILE,
    capped,
    dither_of,
    keys_of,
    load_codes,
    load_queries,
    load_scales,
    part_of,
    place_of,
    rows_of,
    values_of,
)


@triton.jit(do_not_specialize=PER_STEP)
def decode(
    query, cache, query_start, seq_lens, table, cos_sin, out, partial, state, query_token, query_head, cache_block,
    cache_head, table_row, out_token, out_head, tokens, sequences, splits, window, factor, cap, DIM: tl.constexpr,
    PADDED: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr,
    HELD: tl.constexpr, SYMMETRIC: tl.constexpr, ROPE: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    ASSEMBLER: tl.constexpr,
):  # fmt: skip
    """One block of rows, one KV head, one part of the context.

    factor: scale * log2(e); cap, if CAPPED: of scores, times log2(e).
    A row sees the last `window` positions up to its own if WINDOWED, else all of them.
    Writes `out` where the context is whole (not PARTS, splits 1), else partial [tokens, heads, splits, PADDED] and
    state [2, tokens, heads, splits]: largest exponent, sum of weights.
    """
    sequence, token, head, any, valid, seen, begin, end = rows_of(
        query_start, seq_lens, tokens, sequences, window, GROUP, ROWS, WINDOWED
    )
    if any:
        head += tl.program_id(1) * GROUP
        dim = tl.arange(0, PADDED)
        inside = valid[:, None] & (dim < DIM)[None, :]
        low, high, query_sum, unit = load_queries(
            query + token * query_token + head * query_head, dim, inside, seen - 1, cos_sin, factor, ROWS, PADDED,
            BLOCK, STAGES, NORM, HELD, ROPE, PAIRS,
        )  # fmt: skip
        query_low, query_high = tl.trans(low), tl.trans(high)
        order = place_of(tl.arange(0, TILE))
        dither = dither_of(order)[:, None]
        ones = tl.full([TILE // 2, ROWS], 1, tl.int8)
        plane = cache + tl.program_id(1).to(tl.int64) * cache_head
        pages = table + sequence.to(tl.int64) * table_row

        largest = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([PADDED, ROWS], tl.float32)
        start, stop = part_of(begin, end, splits)
        for tile in range(start, stop):
            first = tile * TILE
            keys, values = load_codes(plane, pages, first, begin, end, cache_block, DIM, PADDED, PAGE)
            place = first + order
            key_scale, value_scale, key_zero, value_zero = load_scales(
                plane, pages, place, begin, end, cache_block, DIM, PAGE, SYMMETRIC
            )
            keys_low, keys_high = keys_of(keys, PADDED, ASSEMBLER)
            dots = tl.dot(keys_low, query_low, out_dtype=tl.int32)
            dots = tl.dot(keys_high, query_high, dots, out_dtype=tl.int32)
            p = dots.to(tl.float32) - key_zero[:, None] * query_sum[None, :]  # exact: all below 2^24
            p = p * key_scale[:, None] * unit[None, :]
            if CAPPED:
                p = capped(p, cap)
            p = tl.where(place[:, None] < seen[None, :], p, float("-inf"))
            if WINDOWED:
                p = tl.where(place[:, None] >= seen[None, :] - window, p, float("-inf"))
            highest = tl.maximum(tl.max(p, 0), LOWEST)
            p = tl.exp2(p - highest[None, :])
            fresh = tl.sum(p, 0)
            p = p * value_scale[:, None]
            heaviest = tl.max(p, 0)
            p = rint(p * tl.where(heaviest > 1e-30, MOST_WEIGHT / heaviest, 0.0)[None, :] + dither)
            zero_sum = tl.sum(p * value_zero[:, None], 0)
            weights = tl.reshape((p - OFFSET).to(tl.int8), [2, TILE // 2, ROWS])
            weights_low, weights_high = tl.split(tl.permute(weights, (1, 2, 0)))
            values_low, values_high = values_of(values, PADDED, ASSEMBLER)
            plain = tl.dot(values_low, ones, out_dtype=tl.int32)
            plain = tl.dot(values_high, ones, plain, out_dtype=tl.int32)
            mixed = tl.dot(values_low, weights_low, out_dtype=tl.int32)
            mixed = tl.dot(values_high, weights_high, mixed, out_dtype=tl.int32) + plain * OFFSET

            before = largest
            largest = tl.maximum(before, highest)
            fade, gain = tl.exp2(before - largest), tl.exp2(highest - largest)
            total = total * fade + fresh * gain
            gain = gain * (heaviest / MOST_WEIGHT)
            sums = sums * fade[None, :] + (mixed.to(tl.float32) - zero_sum[None, :]) * gain[None, :]

        if not PARTS:
            sums = sums / tl.where(total == 0, 1.0, total)[None, :]
            result = out + (token * out_token + head * out_head)[None, :] + dim[:, None]
            tl.store(result, sums.to(out.dtype.element_ty), mask=valid[None, :] & (dim < DIM)[:, None])
        else:
            index = (token * HEADS + head) * splits + tl.program_id(2)
            tl.store(state + index, largest, mask=valid)
            tl.store(state + tokens.to(tl.int64) * HEADS * splits + index, total, mask=valid)
            filled = valid & (total != 0)
            tl.store(partial + index[None, :] * PADDED + dim[:, None], sums, mask=filled[None, :])


@triton.jit(do_not_specialize=PER_STEP)
def merge(
    partial, state, out, out_token, out_head, tokens, splits, HEADS: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr, MOST: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One row of the result from its parts, at most MOST, TOGETHER at a time; 0 where all are empty (padding)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, PADDED)
    begin = (token * HEADS + head) * splits
    totals = state + tokens.to(tl.int64) * HEADS * splits
    every = tl.arange(0, MOST)
    most = tl.max(tl.load(state + begin + every, mask=every < splits, other=LOWEST), 0)
    row, whole = tl.zeros([PADDED], tl.float32), tl.zeros([TOGETHER], tl.float32)
    for first in range(0, splits, TOGETHER):
        split = first + tl.arange(0, TOGETHER)
        index, there = begin + split, split < splits
        total = tl.load(totals + index, mask=there, other=0.0)
        filled = total != 0
        gain = tl.exp2(tl.load(state + index, mask=there, other=LOWEST) - most)
        sums = tl.load(partial + index[:, None] * PADDED + dim[None, :], mask=filled[:, None], other=0.0)
        row += tl.sum(sums * gain[:, None], 0)
        whole += total * gain
    total = tl.sum(whole, 0)
    row = row / tl.where(total == 0, 1.0, total)
    tl.store(out + token * out_token + head * out_head + dim, row.to(out.dtype.element_ty), mask=dim < DIM)
