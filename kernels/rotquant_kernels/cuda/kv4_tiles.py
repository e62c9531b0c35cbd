"""What both Triton attention kernels share: which rows a program takes, integer queries, tiles of 128 tokens.

As on the CPU (`csrc/kv4_attention.h`): a query is int8 times one scale, so q Kᵀ is an exact product with K's codes;
softmax weights times V's scales are rounded, with a dither, to 0..255 with one scale a row and tile. Tiles start at
fixed positions and their integers depend on nothing else, so what a token gets does not depend on its batch but for
the order in which float32 sums of tiles are merged.

A page's tile of 16 x 16 codes is read in memory's order, 16 bytes a thread. Four bytes of it that lie together are
four steps of one channel: masked with 0x0f0f0f0f they are a register of an int8 operand. Low and high nibbles are
the two halves of the sum, each a product of its own; a nibble costs 3/8 of an instruction before the product.
The matrix unit takes signed bytes only, so weights are stored 128 too low and 128 Σ v is added, a product with ones:
7 bits would add more than a fifth of the error that 4-bit K and V made.

Names: rows are (token, query head) pairs that share a KV head, ROWS of them a program; PADDED is the head size
rounded up to a power of two.
"""
# ruff: noqa: N803, N806

from __future__ import annotations

import triton
import triton.language as tl

from rotquant_kernels.cuda.kv4_rows import SEQUENCES, hadamard, halves, largest_magnitude, load_rows, rint

TILE = tl.constexpr(128)  # tokens
LOWEST = tl.constexpr(-3.0e38)
MOST_WEIGHT = tl.constexpr(255.0)
OFFSET = tl.constexpr(128)


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
def rows_of(
    query_start, seq_lens, tokens, sequences, window, GROUP: tl.constexpr, ROWS: tl.constexpr, WINDOWED: tl.constexpr
):
    """This program's part of the batch.

    Returns its sequence; token and query head (of its group) of each row, int [ROWS]; whether any row exists, and
    which; the positions that rows see: up to which each does, 0 for padding, and from where to where any does. Without
    WINDOWED all see from position 0, else row r from seen[r] - window on.
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    block = tl.program_id(0)
    sequence = sequence_of(query_start, sequences, block, TOKENS)
    real = sequence < sequences
    start = tl.load(query_start + sequence)
    steps = tl.load(query_start + sequence + 1, mask=real, other=tokens) - start
    row = tl.arange(0, ROWS)
    first = (block - start // TOKENS - sequence) * TOKENS
    step = first + row // GROUP
    valid = (row < TOKENS * GROUP) & (step < steps)
    length = tl.load(seq_lens + sequence, mask=real, other=0)
    seen = tl.where(valid & real, length - steps + step + 1, 0)
    # Not the largest of `seen`: behind a reduction Triton's analysis loses the alignment of a loop's loads.
    end = tl.where(real, length - steps + tl.minimum(first + TOKENS, steps), 0)
    begin = tl.where(real, tl.maximum(length - steps + first + 1 - window, 0), 0) if WINDOWED else 0
    return sequence, (start + step).to(tl.int64), row % GROUP, first < steps, valid, seen, begin, end


@triton.jit
def part_of(begin, end, splits):
    """The tiles, from the first up to and not including the last, of this program's part of the positions."""
    skipped, tiles = begin // TILE, tl.cdiv(end, TILE)
    part, split = tl.cdiv(tiles - skipped, splits), tl.program_id(2)
    return skipped + split * part, tl.minimum(tiles, skipped + (split + 1) * part)


@triton.jit
def load_queries(
    start, dim, inside, position, cos_sin, factor, ROWS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, NORM: tl.constexpr, HELD: tl.constexpr, ROPE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Rotated queries (`load_rows`) as int8 [ROWS, PADDED / 2] in the order of low and of high nibbles.

    Returns these two, the sum of each row's integers and what makes its products exponents of 2; NaN where the row is
    not finite. factor is scale * log2(e).
    """
    x = load_rows(start, dim, inside, position, cos_sin, ROPE, PAIRS)
    if BLOCK > 0:
        x = hadamard(x, ROWS, PADDED, BLOCK, STAGES, NORM, HELD)
    most = largest_magnitude(x)
    codes = rint(x * tl.where(most > 1e-30, 127.0 / most, 0.0)[:, None])
    low, high = halves(codes.to(tl.int8), ROWS, PADDED)
    return low, high, tl.sum(codes, 1), most * (factor / 127.0)


@triton.jit
def load_codes(
    plane, pages, first, begin, end, cache_block, DIM: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr
):
    """Bytes of K and V of the tile at `first`, uint8 [TILE / 16, 8 PADDED] each; 0 in 16 tokens of which none is from
    `begin` up to `end`: their page may be gone."""
    place, byte = first + tl.arange(0, TILE // 16) * 16, tl.arange(0, 8 * PADDED)
    kept = (place < end) & (place + 16 > begin)
    page = tl.load(pages + place // PAGE, mask=kept, other=0).to(tl.int64)
    at = (plane + page * cache_block + place % PAGE // 16 * (8 * DIM))[:, None] + byte[None, :]
    there = kept[:, None] & (byte < 8 * DIM)[None, :]
    return tl.load(at, mask=there, other=0), tl.load(at + PAGE * DIM // 2, mask=there, other=0)


@triton.jit
def load_scales(
    plane, pages, place, begin, end, cache_block, DIM: tl.constexpr, PAGE: tl.constexpr, SYMMETRIC: tl.constexpr
):
    """Scales of K and V at the positions `place` and the zero points of their stored codes, float32.

    A NaN scale of V is given to K instead, so that it shows in the sum of weights.
    """
    there = (place < end) & (place >= begin)
    page = tl.load(pages + place // PAGE, mask=there, other=0).to(tl.int64)
    at = plane + page * cache_block + PAGE * DIM
    scales = at.to(tl.pointer_type(tl.float16), bitcast=True) + place % PAGE
    keys = tl.load(scales, mask=there, other=0.0).to(tl.float32)
    values = tl.load(scales + PAGE, mask=there, other=0.0).to(tl.float32)
    keys = tl.where(values == values, keys, values)
    values = tl.where(values == values, values, 0.0)
    key_zero, value_zero = tl.full([TILE], 8.0, tl.float32), tl.full([TILE], 8.0, tl.float32)
    if not SYMMETRIC:
        zeros = tl.load(at + 4 * PAGE + place % PAGE, mask=there, other=0)
        key_zero, value_zero = (zeros & 15).to(tl.float32), (zeros >> 4).to(tl.float32)
    return keys, values, key_zero, value_zero


@triton.jit
def capped(x, cap):
    """cap tanh(x / cap); NaN for NaN."""
    e = tl.exp2(tl.abs(x) * (-2.8853900817779268 / cap))
    size = cap * (1 - e) / (1 + e)
    return tl.where(x < 0, -size, size)


@triton.jit
def nibbles(packed, ASSEMBLER: tl.constexpr):
    """Low and high nibbles of bytes as int8, four at a time where there is an assembler."""
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
def keys_of(stored, PADDED: tl.constexpr, ASSEMBLER: tl.constexpr):
    """Low and high codes of K, int8 [TILE tokens, PADDED / 2] each; tokens in the order of `place_of`."""
    low, high = nibbles(stored, ASSEMBLER)
    low = tl.reshape(low, [TILE // 16, PADDED // 8, 2, 2, 4, 4])  # dims; s, high, t of the token; t of the dim
    high = tl.reshape(high, [TILE // 16, PADDED // 8, 2, 2, 4, 4])
    low = tl.reshape(tl.permute(low, (3, 0, 2, 4, 1, 5)), [TILE, PADDED // 2])
    return low, tl.reshape(tl.permute(high, (3, 0, 2, 4, 1, 5)), [TILE, PADDED // 2])


@triton.jit
def values_of(stored, PADDED: tl.constexpr, ASSEMBLER: tl.constexpr):
    """Codes of V of the first and the second half of the tokens, int8 [PADDED, TILE / 2] each."""
    low, high = nibbles(stored, ASSEMBLER)
    low = tl.reshape(low, [TILE // 16, PADDED // 16, 2, 16, 4])  # dims; s; dim; t
    high = tl.reshape(high, [TILE // 16, PADDED // 16, 2, 16, 4])
    low = tl.reshape(tl.permute(low, (1, 3, 0, 2, 4)), [PADDED, TILE // 2])
    return low, tl.reshape(tl.permute(high, (1, 3, 0, 2, 4)), [PADDED, TILE // 2])


@triton.jit
def place_of(index):
    """Position in the tile of token `index`: those that V keeps in low nibbles first, then those in high ones."""
    pair = index % (TILE // 2)
    return pair // 8 * 16 + pair // 4 % 2 * 8 + index // (TILE // 2) * 4 + pair % 4


@triton.jit
def dither_of(place):
    """-1/2 to 1/2, spread evenly over any stretch of tokens: the position with its bits reversed."""
    turned = (place & 1) * 64 + (place & 2) * 16 + (place & 4) * 4 + (place & 8)
    turned += (place & 16) // 4 + (place & 32) // 16 + (place & 64) // 64
    return (turned.to(tl.float32) + 0.5) / TILE - 0.5
