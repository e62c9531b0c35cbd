"""Triton attention over 4-bit pages for many rows a sequence: prefill, mixed batches. See `kv4_tiles`.

The products have the usual orientation, in which softmax runs along a thread's own registers:

    S [rows, tokens] = q Kᵀ,    O [rows, d] = P V
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


@triton.jit
def bits(x):
    """Numbers that float16 holds, as its bits in the low half of int32."""
    return x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def half(word):
    """The low half of int32 as a float16's number, float32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_words(
    plane, pages, first, begin, end, cache_block, DIM: tl.constexpr, PAGE: tl.constexpr, SYMMETRIC: tl.constexpr,
    ASSEMBLER: tl.constexpr,
):  # fmt: skip
    """What is known of each token of a tile, in the order of `place_of`, two int32 [TILE] from low to high bits.

        scale of K 16, of V 16;      zero of K 4, of V 4, place in the tile 8, dither 16

    A thread multiplies by those of 32 tokens or more: unpacked they are more registers than there are, so they are
    unpacked where they are used. The assembler keeps the compiler from doing it where they are loaded, or, what does
    not change, in front of the loop.
    """
    order = place_of(tl.arange(0, TILE))
    key, value, key_zero, value_zero = load_scales(
        plane, pages, first + order, begin, end, cache_block, DIM, PAGE, SYMMETRIC
    )
    scales = bits(key) | bits(value) << 16
    rest = key_zero.to(tl.int32) | value_zero.to(tl.int32) << 4 | order << 8 | bits(dither_of(order)) << 16
    if ASSEMBLER:
        scales = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [scales], dtype=tl.int32, is_pure=False, pack=1)
        rest = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [rest], dtype=tl.int32, is_pure=False, pack=1)
    return scales, rest


@triton.jit(do_not_specialize=PER_STEP)
def prefill(
    query, cache, query_start, seq_lens, table, cos_sin, out, partial, state, query_token, query_head, cache_block,
    cache_head, table_row, out_token, out_head, tokens, sequences, splits, window, factor, cap, DIM: tl.constexpr,
    PADDED: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr,
    HELD: tl.constexpr, SYMMETRIC: tl.constexpr, ROPE: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    ASSEMBLER: tl.constexpr,
):  # fmt: skip
    """As `kv4_decode.decode`, with ROWS at least 64."""
    sequence, token, head, any, valid, seen, begin, end = rows_of(
        query_start, seq_lens, tokens, sequences, window, GROUP, ROWS, WINDOWED
    )
    if any:
        head += tl.program_id(1) * GROUP
        dim = tl.arange(0, PADDED)
        inside = valid[:, None] & (dim < DIM)[None, :]
        query_low, query_high, query_sum, unit = load_queries(
            query + token * query_token + head * query_head, dim, inside, seen - 1, cos_sin, factor, ROWS, PADDED,
            BLOCK, STAGES, NORM, HELD, ROPE, PAIRS,
        )  # fmt: skip
        lowest = tl.min(tl.where(valid, seen, 1 << 30), 0)
        ones = tl.full([TILE // 2, 16], 1, tl.int8)
        plane = cache + tl.program_id(1).to(tl.int64) * cache_head
        pages = table + sequence.to(tl.int64) * table_row

        largest = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, PADDED], tl.float32)
        start, stop = part_of(begin, end, splits)
        for tile in range(start, stop):
            first = tile * TILE
            keys, values = load_codes(plane, pages, first, begin, end, cache_block, DIM, PADDED, PAGE)
            scales, rest = load_words(plane, pages, first, begin, end, cache_block, DIM, PAGE, SYMMETRIC, ASSEMBLER)
            keys_low, keys_high = keys_of(keys, PADDED, ASSEMBLER)
            dots = tl.dot(query_low, tl.trans(keys_low), out_dtype=tl.int32)
            dots = tl.dot(query_high, tl.trans(keys_high), dots, out_dtype=tl.int32)
            p = dots.to(tl.float32) - query_sum[:, None] * (rest & 15).to(tl.float32)[None, :]  # exact: all below 2^24
            p = p * unit[:, None] * half(scales)[None, :]
            if CAPPED:
                p = capped(p, cap)
            whole = (first + TILE <= lowest) & (first >= end - window) if WINDOWED else first + TILE <= lowest
            if not whole:  # the others see all of it
                place = first + (rest >> 8 & 255)
                p = tl.where(place[None, :] < seen[:, None], p, float("-inf"))
                if WINDOWED:
                    p = tl.where(place[None, :] >= seen[:, None] - window, p, float("-inf"))
            highest = tl.maximum(tl.max(p, 1), LOWEST)
            p = tl.exp2(p - highest[:, None])
            fresh = tl.sum(p, 1)
            p = p * half(scales >> 16)[None, :]
            heaviest = tl.max(p, 1)
            p = rint(p * tl.where(heaviest > 1e-30, MOST_WEIGHT / heaviest, 0.0)[:, None] + half(rest >> 16)[None, :])
            zero_sum = tl.sum(p * (rest >> 4 & 15).to(tl.float32)[None, :], 1)
            weights = tl.reshape((p - OFFSET).to(tl.int8), [ROWS, 2, TILE // 2])
            weights_low, weights_high = tl.split(tl.permute(weights, (0, 2, 1)))
            values_low, values_high = values_of(values, PADDED, ASSEMBLER)
            plain = tl.dot(values_low, ones, out_dtype=tl.int32)
            plain = tl.dot(values_high, ones, plain, out_dtype=tl.int32)
            offset = tl.max(plain, 1) * OFFSET  # all columns are the same
            mixed = tl.dot(weights_low, tl.trans(values_low), out_dtype=tl.int32)
            mixed = tl.dot(weights_high, tl.trans(values_high), mixed, out_dtype=tl.int32) + offset[None, :]

            before = largest
            largest = tl.maximum(before, highest)
            fade, gain = tl.exp2(before - largest), tl.exp2(highest - largest)
            total = total * fade + fresh * gain
            gain = gain * (heaviest / MOST_WEIGHT)
            sums = sums * fade[:, None] + (mixed.to(tl.float32) - zero_sum[:, None]) * gain[:, None]

        if not PARTS:
            sums = sums / tl.where(total == 0, 1.0, total)[:, None]
            result = out + (token * out_token + head * out_head)[:, None] + dim[None, :]
            tl.store(result, sums.to(out.dtype.element_ty), mask=inside)
        else:
            index = (token * HEADS + head) * splits + tl.program_id(2)
            tl.store(state + index, largest, mask=valid)
            tl.store(state + tokens.to(tl.int64) * HEADS * splits + index, total, mask=valid)
            filled = valid & (total != 0)
            tl.store(partial + index[:, None] * PADDED + dim[None, :], sums, mask=filled[:, None])
