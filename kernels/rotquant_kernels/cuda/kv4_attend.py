"""Triton kernels for attention over pages of 4-bit codes, on integers: softmax(scale q Kᵀ) V in tiles of 128 tokens.

As on the CPU (`csrc/kv4_attention.h`): a query is int8 times one scale, so q Kᵀ is an exact product with K's codes;
softmax weights times V's scales are rounded, with a dither, to 0..255 with one scale a row and tile. Tiles start
at fixed positions and their integers depend on nothing else, so what a token gets does not depend on its batch but
for the order in which float32 sums of tiles are merged.

Both products are transposed, so that the codes are the matrix unit's first operand, which may come from registers:

    S [tokens, rows] = K qᵀ,    O [d, rows] = Vᵀ P,    rows = (token, query head) pairs that share a KV head

A page's tile of 16 x 16 codes is read in memory's order, 16 bytes a thread. Four bytes of it that lie together are
four steps of one channel: masked with 0x0f0f0f0f they are a register of an int8 operand. Low and high nibbles are
the two halves of the sum, each a product of its own; a nibble costs 3/8 of an instruction before the product.
The matrix unit takes signed bytes only, so weights are 128 too low and 128 Σ v is added, a product with ones:
7 bits would add more than a fifth of the error that 4-bit K and V made.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rotquant_kernels.cuda.kv4_rows import hadamard, halves, largest_magnitude, rint

TILE = tl.constexpr(128)  # tokens
LOWEST = tl.constexpr(-3.0e38)
MOST_WEIGHT = tl.constexpr(255.0)
SEQUENCES = tl.constexpr(256)  # looked at together


@triton.jit
def nibbles(packed, ASSEMBLER: tl.constexpr):
    """Low and high nibbles of bytes as int8, four at a time."""
    if ASSEMBLER:
        low = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x0f0f0f0f;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
        high = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f; }", "=r,r", [packed], dtype=tl.int8,
            is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low, high = (packed & 15).to(tl.int8), (packed >> 4).to(tl.int8)
    return low, high


@triton.jit
def sequence_of(query_start, sequences, block, TOKENS: tl.constexpr):
    """The sequence whose queries program `block` takes; `sequences` for the padding behind the last one.

    Sequence s begins at block start[s] // TOKENS + s, which leaves it blocks enough whatever its start.
    """
    before = 0
    for first in range(0, sequences + 1, SEQUENCES):
        s = first + tl.arange(0, SEQUENCES)
        start = tl.load(query_start + s, mask=s <= sequences, other=1 << 30)
        before += tl.sum((start // TOKENS + s <= block).to(tl.int32))
    return before - 1


@triton.jit
def tile_of_keys(stored, SUBTILES: tl.constexpr, PADDED: tl.constexpr):
    """Bytes [subtiles, 8 PADDED] as [128 tokens, PADDED / 2]; tokens in the order of `place_of`."""
    parts = tl.reshape(stored, [SUBTILES, PADDED // 8, 2, 2, 4, 4])  # dims, s, high, t of the token, t of the dim
    return tl.reshape(tl.permute(parts, (3, 0, 2, 4, 1, 5)), [SUBTILES * 16, PADDED // 2])


@triton.jit
def tile_of_values(stored, SUBTILES: tl.constexpr, PADDED: tl.constexpr):
    """Bytes [subtiles, 8 PADDED] as [PADDED, 64 pairs of tokens]."""
    parts = tl.reshape(stored, [SUBTILES, PADDED // 16, 2, 16, 4])  # dims, s, dim, t
    return tl.reshape(tl.permute(parts, (1, 3, 0, 2, 4)), [PADDED, SUBTILES * 8])


@triton.jit
def place_of(row):
    """Position in the tile of row `row`: tokens that V keeps in low nibbles first, then those in high ones."""
    pair = row % (TILE // 2)
    return pair // 8 * 16 + pair // 4 % 2 * 8 + row // (TILE // 2) * 4 + pair % 4


@triton.jit
def dither_of(place):
    """-1/2 to 1/2, spread evenly over any stretch of tokens: the position with its bits reversed."""
    reversed = (place & 1) * 64 + (place & 2) * 16 + (place & 4) * 4 + (place & 8)
    reversed += (place & 16) // 4 + (place & 32) // 16 + (place & 64) // 64
    return (reversed.to(tl.float32) + 0.5) / TILE - 0.5


@triton.jit
def attend(
    query, cache, query_start, seq_lens, table, out, partial, state, query_token, query_head, cache_block, cache_head,
    table_row, out_token, out_head, tokens, sequences, factor, DIM: tl.constexpr, PADDED: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, SYMMETRIC: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, ASSEMBLER: tl.constexpr,
):  # fmt: skip
    """One block of ROWS rows, one KV head, one of SPLITS parts of the context.

    Writes out where the context is not split, else partial [tokens, heads, splits, PADDED] and state
    [2, tokens, heads, splits] (largest exponent, sum of weights). factor is scale * log2(e).
    """
    SUBTILES: tl.constexpr = TILE // 16
    TOKENS: tl.constexpr = ROWS // GROUP
    block, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = sequence_of(query_start, sequences, block, TOKENS)
    padding = sequence == sequences
    start = tl.load(query_start + sequence)
    stop = tl.load(query_start + sequence + 1, mask=sequence < sequences, other=tokens)
    steps = stop - start
    step = (block - start // TOKENS - sequence) * TOKENS
    if step < steps:
        row = tl.arange(0, ROWS)
        token, own = step + row // GROUP, head * GROUP + row % GROUP
        valid = (row < TOKENS * GROUP) & (token < steps)
        row_token = (start + token).to(tl.int64)
        dim = tl.arange(0, PADDED)
        inside = valid[:, None] & (dim < DIM)[None, :]
        at = query + row_token[:, None] * query_token + own[:, None] * query_head + dim[None, :]
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if BLOCK > 0:
            x = hadamard(x, ROWS, PADDED, BLOCK, STAGES, NORM)
        most = largest_magnitude(x)
        codes = rint(x * tl.where(most > 1e-30, 127.0 / most, 0.0)[:, None])
        query_sum = tl.sum(codes, 1)
        unit = most * (factor / 127.0)
        low, high = halves(codes.to(tl.int8), ROWS, PADDED)
        query_low, query_high = tl.trans(low), tl.trans(high)

        length = tl.load(seq_lens + sequence, mask=sequence < sequences, other=0)
        end = tl.where(padding, 0, length - steps + tl.minimum(step + TOKENS, steps))
        seen = tl.where(valid, length - steps + token + 1, 0)
        part = tl.cdiv(tl.cdiv(end, TILE), SPLITS) * TILE
        place = place_of(tl.arange(0, TILE))
        dither = dither_of(place)[:, None]
        subtile, byte = tl.arange(0, SUBTILES) * 16, tl.arange(0, 8 * PADDED)
        planes = cache + head.to(tl.int64) * cache_head
        pages = table + sequence.to(tl.int64) * table_row

        ones = tl.full([TILE // 2, 16], 1, tl.int8)
        largest = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([PADDED, ROWS], tl.float32)
        for first in range(split * part, tl.minimum(end, (split + 1) * part), TILE):
            position = first + subtile
            page = tl.load(pages + position // PAGE, mask=position < end, other=0).to(tl.int64)
            tiles = planes + page * cache_block + position % PAGE // 16 * (8 * DIM)
            tiles = tiles[:, None] + byte[None, :]
            there = (position < end)[:, None] & (byte < 8 * DIM)[None, :]
            keys = tl.load(tiles, mask=there, other=0)
            values = tl.load(tiles + PAGE * DIM // 2, mask=there, other=0)

            position = first + place
            visible = position < end
            page = tl.load(pages + position // PAGE, mask=visible, other=0).to(tl.int64)
            at = planes + page * cache_block + PAGE * DIM
            scales = at.to(tl.pointer_type(tl.float16), bitcast=True) + position % PAGE
            key_scale = tl.load(scales, mask=visible, other=0.0).to(tl.float32)
            value_scale = tl.load(scales + PAGE, mask=visible, other=0.0).to(tl.float32)
            key_scale = tl.where(value_scale == value_scale, key_scale, value_scale)  # NaN shows in the sum of weights
            value_scale = tl.where(value_scale == value_scale, value_scale, 0.0)
            key_zero, value_zero = tl.full([TILE], 8.0, tl.float32), tl.full([TILE], 8.0, tl.float32)
            if not SYMMETRIC:
                zeros = (at + 4 * PAGE).to(tl.pointer_type(tl.int8), bitcast=True) + position % PAGE
                key_zero += tl.load(zeros, mask=visible, other=0).to(tl.float32)
                value_zero += tl.load(zeros + PAGE, mask=visible, other=0).to(tl.float32)

            low, high = nibbles(keys, ASSEMBLER)
            dots = tl.dot(tile_of_keys(low, SUBTILES, PADDED), query_low, out_dtype=tl.int32)
            dots = tl.dot(tile_of_keys(high, SUBTILES, PADDED), query_high, dots, out_dtype=tl.int32)
            x = dots.to(tl.float32) - key_zero[:, None] * query_sum[None, :]  # exact: all below 2^24
            x = x * key_scale[:, None] * unit[None, :]
            x = tl.where(position[:, None] < seen[None, :], x, float("-inf"))
            highest = tl.maximum(tl.max(x, 0), LOWEST)
            x = tl.exp2(x - highest[None, :])
            fresh = tl.sum(x, 0)
            x = x * value_scale[:, None]
            heaviest = tl.max(x, 0)
            x = rint(x * tl.where(heaviest > 1e-30, MOST_WEIGHT / heaviest, 0.0)[None, :] + dither)
            zero_sum = tl.sum(x * value_zero[:, None], 0)
            weights = tl.reshape((x - 128.0).to(tl.int8), [2, TILE // 2, ROWS])
            weights_low, weights_high = tl.split(tl.permute(weights, (1, 2, 0)))
            low, high = nibbles(values, ASSEMBLER)
            low, high = tile_of_values(low, SUBTILES, PADDED), tile_of_values(high, SUBTILES, PADDED)
            dots = tl.dot(low, ones, out_dtype=tl.int32)
            dots = tl.dot(high, ones, dots, out_dtype=tl.int32)
            offset = tl.max(dots, 1) * 128  # all columns are the same
            dots = tl.dot(low, weights_low, out_dtype=tl.int32)
            dots = tl.dot(high, weights_high, dots, out_dtype=tl.int32) + offset[:, None]

            before = largest
            largest = tl.maximum(before, highest)
            fade, gain = tl.exp2(before - largest), tl.exp2(highest - largest)
            total = total * fade + fresh * gain
            gain = gain * (heaviest / MOST_WEIGHT)
            sums = sums * fade[None, :] + (dots.to(tl.float32) - zero_sum[None, :]) * gain[None, :]

        if SPLITS == 1:
            sums = sums / tl.where(total == 0, 1.0, total)[None, :]
            at = out + row_token[None, :] * out_token + own[None, :] * out_head + dim[:, None]
            tl.store(at, sums.to(out.dtype.element_ty), mask=valid[None, :] & (dim < DIM)[:, None])
        else:
            index = (row_token * HEADS + own) * SPLITS + split
            tl.store(state + index, largest, mask=valid)
            tl.store(state + tokens.to(tl.int64) * HEADS * SPLITS + index, total, mask=valid)
            filled = valid & (total != 0)
            tl.store(partial + index[None, :] * PADDED + dim[:, None], sums, mask=filled[None, :])


@triton.jit
def merge(
    partial, state, out, out_token, out_head, tokens, HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One row of the result from its parts; 0 where all of them are empty (padding)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, PADDED)
    index = (token * HEADS + head) * SPLITS + split
    largest = tl.load(state + index)
    total = tl.load(state + tokens.to(tl.int64) * HEADS * SPLITS + index)
    filled = total != 0
    sums = tl.load(partial + index[:, None] * PADDED + dim[None, :], mask=filled[:, None], other=0.0)
    gain = tl.exp2(largest - tl.max(largest, 0))
    whole = tl.sum(total * gain, 0)
    row = tl.sum(sums * gain[:, None], 0) / tl.where(whole == 0, 1.0, whole)
    tl.store(out + token * out_token + head * out_head + dim, row.to(out.dtype.element_ty), mask=dim < DIM)
