"""Triton kernel that rotates, quantizes and stores K and V of one step; pages as `reference.kv4_write` leaves them.

Float32 in the convention's order, divisions rounded to nearest, no fused multiply-add (`enable_fp_fusion=False`).
A byte of V holds two tokens, which different programs may write at once: V's nibbles are changed by
an atomic exclusive or, which leaves the other nibbles of the word alone.
"""
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from rotquant_kernels.cuda.kv4_rows import (
    PER_STEP,
    hadamard,
    halves,
    largest_magnitude,
    load_rows,
    positions_of,
    rint,
)
from rotquant_kernels.cuda.rows_steps import CORRECTED

EPSILON = tl.constexpr(1.1920928955078125e-07)
LARGEST_ERROR = tl.constexpr(8.0)  # as of `formats.feedback`
HALF_TINY, HALF_MAX = tl.constexpr(6.103515625e-05), tl.constexpr(65504.0)


@triton.jit
def codes_fed_back(
    x, scale, zero, feedback, dim, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Codes of keys [ROWS, PADDED] as `formats.feedback.quantize`; feedback: pointer to the head's F."""
    codes = tl.zeros_like(x)
    most = LARGEST_ERROR * scale
    for j in range(DIM):
        here = tl.full([ROWS, 1], j, tl.int32)
        value = tl.gather(x, here, 1).reshape(ROWS)
        code = rint(tl.minimum(tl.maximum(tl.div_rn(value, scale) + zero, -8.0), 7.0))
        error = tl.minimum(tl.maximum(value - (code - zero) * scale, -most), most)
        codes = tl.where(dim[None, :] == j, code[:, None], codes)
        passed = tl.load(feedback + j * DIM + dim, mask=(dim > j) & (dim < DIM), other=0.0)
        x -= error[:, None] * passed[None, :]
    return codes


@triton.jit
def quantized(
    x, clip, feedback, dim, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, SYMMETRIC: tl.constexpr,
    FEEDBACK: tl.constexpr, ASSEMBLER: tl.constexpr,
):  # fmt: skip
    """`convention.kv_qparams` and `quantize` of rows [ROWS, PADDED], with error feedback if FEEDBACK.

    Returns float16 scale [ROWS] as int16 bits, zero point int32 [ROWS], codes + 8 int32 [ROWS, PADDED].
    """
    most = largest_magnitude(x)
    smallest = tl.minimum(tl.min(x, 1), 0.0) * clip
    if SYMMETRIC:
        scale = tl.div_rn(most * clip, tl.full(most.shape, 7.5, tl.float32))
    else:
        span = tl.maximum(tl.max(x, 1), 0.0) * clip - smallest
        scale = tl.div_rn(span, tl.full(most.shape, 15.0, tl.float32))
    finite = (most == most) & (scale < float("inf"))
    scale = tl.where(scale == 0, EPSILON, scale)
    half = tl.minimum(tl.maximum(scale, HALF_TINY), HALF_MAX).to(tl.float16)
    scale = half.to(tl.float32)
    zero = tl.zeros_like(scale)
    if not SYMMETRIC:
        zero = rint(tl.minimum(tl.maximum(-8.0 - tl.div_rn(smallest, scale), -8.0), 7.0))
        zero = tl.where(finite, zero, 0.0)
    if FEEDBACK:
        codes = codes_fed_back(x, scale, zero, feedback, dim, ROWS, DIM, PADDED)
    else:
        codes = codes_of(x, scale, zero, ASSEMBLER)
    codes = tl.where(finite[:, None], codes, 0.0).to(tl.int32) + 8
    return tl.where(finite, half.to(tl.int16, bitcast=True), 0x7E00).to(tl.int16), zero.to(tl.int32), codes


@triton.jit
def codes_of(x, scale, zero, ASSEMBLER: tl.constexpr):
    """Codes, as floats, of rows that are rounded to nearest."""
    if ASSEMBLER:  # as `rows_steps.divided`, of a scale that float16 holds: nothing overflows
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        codes = tl.inline_asm_elementwise(
            CORRECTED, "=f,f,f,f", [x, scale[:, None], inverse[:, None]], tl.float32, True, 1
        )
    else:
        codes = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    return rint(tl.minimum(tl.maximum(codes + zero[:, None], -8.0), 7.0))


@triton.jit(do_not_specialize=PER_STEP)
def write(
    key, value, cache, slots, query_start, seq_lens, cos_sin, feedback, key_token, key_head, value_token, value_head,
    cache_block, cache_head, count, sequences, k_clip, v_clip, DIM: tl.constexpr, PADDED: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, HELD: tl.constexpr,
    SYMMETRIC: tl.constexpr, ROPE: tl.constexpr, PAIRS: tl.constexpr, FEEDBACK: tl.constexpr, TOKENS: tl.constexpr,
    ASSEMBLER: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one KV head. Strides in elements of key and value and in bytes of the cache.

    query_start [sequences + 1] and seq_lens say at which positions K stands, which is turned to them if ROPE.
    feedback: F float32 [heads, DIM, DIM] if FEEDBACK.
    """
    token, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, PADDED)
    slot = tl.load(slots + token, mask=token < count, other=-1)
    stored = slot >= 0
    slot = tl.where(stored, slot, 0)
    place = (slot % PAGE).to(tl.int32)
    plane = cache + slot // PAGE * cache_block + head * cache_head
    tile = plane + place // 16 * (8 * DIM)
    rows = token.to(tl.int64)[:, None]
    inside = stored[:, None] & (dim < DIM)[None, :]

    position = positions_of(query_start, seq_lens, token, sequences, TOKENS) if ROPE > 0 else token
    start = key + token.to(tl.int64) * key_token + head * key_head
    x = load_rows(start, dim, inside, position, cos_sin, ROPE, PAIRS)
    if BLOCK > 0:
        x = hadamard(x, TOKENS, PADDED, BLOCK, STAGES, NORM, HELD)
    passed = feedback + head * DIM * DIM if FEEDBACK else feedback
    k_scale, k_zero, codes = quantized(
        x, k_clip, passed, dim, TOKENS, DIM, PADDED, SYMMETRIC, FEEDBACK, ASSEMBLER
    )  # fmt: skip
    low, high = halves(codes, TOKENS, PADDED)
    byte = tl.arange(0, PADDED // 2)
    at = tile[:, None] + (byte // 4 * 64 + byte % 4)[None, :] + (place % 16 * 4)[:, None]
    tl.store(at, (low | high << 4).to(tl.uint8), mask=stored[:, None] & (byte < DIM // 2)[None, :])

    x = tl.load(value + rows * value_token + head * value_head + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    v_scale, v_zero, codes = quantized(x, v_clip, feedback, dim, TOKENS, DIM, PADDED, SYMMETRIC, False, ASSEMBLER)
    shift = (place % 4 * 8 + place // 4 % 2 * 4)[:, None]
    words = (tile + PAGE * DIM // 2 + place % 16 // 8 * 64)[:, None] + (dim // 16 * 128 + dim % 16 * 4)[None, :]
    words = words.to(tl.pointer_type(tl.int32), bitcast=True)
    before = tl.load(words, mask=inside, other=0)
    tl.atomic_xor(words, (before ^ (codes << shift)) & (15 << shift), mask=inside, sem="relaxed")

    scales = (plane + PAGE * DIM).to(tl.pointer_type(tl.int16), bitcast=True) + place
    tl.store(scales, k_scale, mask=stored)
    tl.store(scales + PAGE, v_scale, mask=stored)
    if not SYMMETRIC:
        tl.store(plane + PAGE * (DIM + 4) + place, ((k_zero + 8) | (v_zero + 8) << 4).to(tl.uint8), mask=stored)
