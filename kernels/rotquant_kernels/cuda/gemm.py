"""Triton: the integer product of quantized activations and 4- or 8-bit weights, and its float32 epilogue.

    y = (Σ_g (acc_g - z_x sum_g) s_w,g) s_x + (x T) D U + bias      in the reference's order, never fused (`rows.EXACT`)

The product is made transposed, weights on the left: a 4-bit weight is unpacked in registers, where the tensor cores
of every generation take their left operand (wgmma on Hopper, mma.sync elsewhere). A nibble becomes 16 q in an int8 by
one shift or mask, no sign to extend; acc is 16 times too large until it is shifted back, exactly.
Where tiles are too few to fill the device, the columns are split: programs leave sums of integers, and a second launch
adds them up and scales them. Neither tiles nor splits change a result, so no result depends on its batch: `tiles`.
"""

# ruff: noqa: N803, N806 (Triton's compile-time constants are upper case)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotquant_kernels.cuda import layout, rows, scaled_mm
from rotquant_kernels.cuda.device import device_of
from rotquant_kernels.cuda.tiles import Shape, Tiles, tiles
from rotquant_kernels.cuda.unpack import unpacked

PER_STEP = [
    "tokens",
    "splits",
    "part",
]  # arguments that change from step to step: no kernel is compiled for one of them
TOGETHER = tl.constexpr(8)
SUM_TILE = (64, 16)  # channels, tokens of a program that adds up parts


@triton.jit
def nibbles(w, ASM: tl.constexpr):
    """16 times the low and the high nibbles of int8 w, int8 as well; four bytes an instruction (the interpreter
    knows no assembly)."""
    if ASM:
        low = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }", "=r,r", [w], tl.int8, True, 4
        )
        high = tl.inline_asm_elementwise("and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [w], tl.int8, True, 4)
    else:
        low = w << 4
        high = w & -16
    return low, high


@triton.jit
def step(acc, words, codes, first, n, m, tokens, columns, line,
         BITS: tl.constexpr, TK: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """acc [n, m] plus the products of the columns first .. first + TK; `line` bytes hold a chunk of every channel."""
    BYTES: tl.constexpr = TK * BITS // 8
    byte = tl.arange(0, BYTES)
    words += first * BITS // 128 * line
    w = tl.load(words + (byte // 16 * line.to(tl.int32) + byte % 16)[None, :] + (n * 16)[:, None])
    inside = (m < tokens)[None, :]
    if BITS == 4 and BYTES >= 32:
        k = first + byte // 16 * 32 + byte % 16
        at = codes + (m * columns)[None, :] + k[:, None]
        low, high = nibbles(w, ASM)
        mask = inside if EVEN else inside & (k < columns)[:, None]
        acc = tl.dot(low, tl.load(at, mask, 0), acc, out_dtype=tl.int32)
        mask = inside if EVEN else inside & (k + 16 < columns)[:, None]
        return tl.dot(high, tl.load(at + 16, mask, 0), acc, out_dtype=tl.int32)
    column = tl.arange(0, TK)
    if BITS == 4:  # a chunk alone: both halves of its bytes are one product, of the least columns that int8 takes
        low, high = nibbles(w, ASM)
        w = tl.reshape(tl.join(low, high), [w.shape[0], TK])
        column = column % 2 * 16 + column // 2
    k = first + column
    mask = inside if EVEN else inside & (k < columns)[:, None]
    return tl.dot(w, tl.load(codes + (m * columns)[None, :] + k[:, None], mask, 0), acc, out_dtype=tl.int32)


@triton.jit
def scaled(acc, sums, weight_scale, zero, n, channels, SYMMETRIC: tl.constexpr, BITS: tl.constexpr):
    """(acc - z_x sum) s_w of one group, float32 [n, m]; sums and weight_scale point at the group's row."""
    acc = acc >> 4 if BITS == 4 else acc
    if not SYMMETRIC:
        acc = acc - tl.load(sums + n)[:, None] * zero[None, :]
    return acc.to(tl.float32) * tl.load(weight_scale, n < channels, 0)[:, None]


@triton.jit
def place(channels, tokens, TN: tl.constexpr, TM: tl.constexpr):
    """The tile of channels and the tile of tokens of this program: TOGETHER tiles of tokens take the same weights one
    after the other, so that these are read from the cache."""
    tiles_n, tiles_m = tl.cdiv(channels, TN), tl.cdiv(tokens, TM)
    program = tl.program_id(0)
    first = program // (tiles_n * TOGETHER) * TOGETHER
    height = tl.minimum(tiles_m - first, TOGETHER)
    inside = program % (tiles_n * TOGETHER)
    return inside // height, first + inside % height


@triton.jit
def finish(
    y, n, m, scales, down, up, bias, out, tokens, channels, rank, RANK: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """Scales, adds and stores a tile: y float32 [n, m], Σ_g (acc_g - z_x sum_g) s_w,g."""
    y = y * tl.load(scales + m, m < tokens, 0)[None, :]
    if RANK > 0:
        for part in range(RANK // 16):  # more of it at once, and on Blackwell a loop of one step, spill registers
            r = part * 16 + tl.arange(0, 16)
            u = tl.load(up + r[None, :] * channels + n[:, None], (n < channels)[:, None] & (r < rank)[None, :], 0)
            d = tl.load(down + m[None, :] * rank + r[:, None], (m < tokens)[None, :] & (r < rank)[:, None], 0)
            y = tl.dot(u.to(tl.float32), d, y, input_precision="ieee")
    if BIAS:
        y = y + tl.load(bias + n, n < channels, 0).to(tl.float32)[:, None]
    at = out + (m * channels)[None, :] + n[:, None]
    tl.store(at, y.to(out.dtype.element_ty), (m < tokens)[None, :] & (n < channels)[:, None])


@triton.jit(do_not_specialize=PER_STEP)
def linear_kernel(
    codes, scales, zeros, words, sums, weight_scale, down, up, bias, out, tokens, columns, channels, padded, rank,
    part, BITS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, SYMMETRIC: tl.constexpr, RANK: tl.constexpr,
    BIAS: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, TN: tl.constexpr, TM: tl.constexpr,
    TK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One tile of TM tokens and TN channels; STEPS of TK columns make a group, where there are groups.

    down float32 [tokens, rank] is (x T) D; up float [rank, channels]. Where PARTS, programs (tile, p) take `part` steps
    of columns each, from p * part on, and leave acc in out, int32 [parts, tokens, padded].
    """
    tile_n, tile_m = place(channels, tokens, TN, TM)
    n = tile_n * TN + tl.arange(0, TN)
    m = tile_m.to(tl.int64) * TM + tl.arange(0, TM)
    line = padded.to(tl.int64) * 16
    if PARTS:
        acc = tl.zeros([TN, TM], tl.int32)
        begin = tl.program_id(1) * part
        for i in range(begin, tl.minimum(begin + part, tl.cdiv(columns, TK))):
            acc = step(acc, words, codes, i * TK, n, m, tokens, columns, line, BITS, TK, EVEN, ASM)
        at = out + ((tl.program_id(1).to(tl.int64) * tokens + m) * padded)[None, :] + n[:, None]
        tl.store(at, acc, (m < tokens)[None, :])
    else:
        if GROUPS == 1:
            acc = tl.zeros([TN, TM], tl.int32)
            for i in range(tl.cdiv(columns, TK)):
                acc = step(acc, words, codes, i * TK, n, m, tokens, columns, line, BITS, TK, EVEN, ASM)
            if TM == 128 and RANK == 0:  # half a tile after the other: one at once wants registers for two
                half = tile_m.to(tl.int64) * TM + tl.arange(0, TM // 2)
                first, last = tl.split(tl.permute(tl.reshape(acc, [TN, 2, TM // 2]), (0, 2, 1)))
                zero = tl.load(zeros + half, half < tokens, 0)
                y = scaled(first, sums, weight_scale + n, zero, n, channels, SYMMETRIC, BITS)
                finish(y, n, half, scales, down, up, bias, out, tokens, channels, rank, RANK, BIAS)
                half += TM // 2
                zero = tl.load(zeros + half, half < tokens, 0)
                y = scaled(last, sums, weight_scale + n, zero, n, channels, SYMMETRIC, BITS)
                finish(y, n, half, scales, down, up, bias, out, tokens, channels, rank, RANK, BIAS)
            else:
                zero = tl.load(zeros + m, m < tokens, 0)
                y = scaled(acc, sums, weight_scale + n, zero, n, channels, SYMMETRIC, BITS)
                finish(y, n, m, scales, down, up, bias, out, tokens, channels, rank, RANK, BIAS)
        else:
            zero = tl.load(zeros + m, m < tokens, 0)
            y = tl.zeros([TN, TM], tl.float32)
            for group in range(GROUPS):
                acc = tl.zeros([TN, TM], tl.int32)
                if STEPS * TK <= 128:  # one loop, so that loads of the next groups are on their way
                    for i in tl.static_range(STEPS):
                        first = (group * STEPS + i) * TK
                        acc = step(acc, words, codes, first, n, m, tokens, columns, line, BITS, TK, EVEN, ASM)
                else:  # the pipeline of whole groups would be too large for shared memory
                    for i in range(STEPS):
                        first = (group * STEPS + i) * TK
                        acc = step(acc, words, codes, first, n, m, tokens, columns, line, BITS, TK, EVEN, ASM)
                at = weight_scale + n * GROUPS + group
                y = y + scaled(acc, sums + group * padded, at, zero, n, channels, SYMMETRIC, BITS)
            finish(y, n, m, scales, down, up, bias, out, tokens, channels, rank, RANK, BIAS)


@triton.jit(do_not_specialize=PER_STEP)
def sum_kernel(
    parts, scales, zeros, sums, weight_scale, down, up, bias, out, tokens, channels, padded, rank, splits,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, RANK: tl.constexpr, BIAS: tl.constexpr, TN: tl.constexpr,
    TM: tl.constexpr,
):  # fmt: skip
    """What `linear_kernel` left in parts, int32 [splits, tokens, padded], as the layer's output: one tile of it."""
    n = tl.program_id(0) * TN + tl.arange(0, TN)
    m = tl.program_id(1).to(tl.int64) * TM + tl.arange(0, TM)
    at = parts + (m * padded)[None, :] + n[:, None]
    acc = tl.zeros([TN, TM], tl.int32)
    for split in range(splits):
        acc += tl.load(at + split * tokens.to(tl.int64) * padded, (m < tokens)[None, :], 0)
    zero = tl.load(zeros + m, m < tokens, 0)
    y = scaled(acc, sums, weight_scale + n, zero, n, channels, SYMMETRIC, BITS)
    finish(y, n, m, scales, down, up, bias, out, tokens, channels, rank, RANK, BIAS)


def product(
    quantized: tuple[Tensor, Tensor, Tensor], weight: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int,
    symmetric: bool, dtype: torch.dtype, down: Tensor | None = None, up: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The layer's output from quantized rows.

    Args:
        quantized: codes int8 [M, K], scale float32 [M, 1], zero int32 [M, 1].
        weight: int32, see `layout`; weight_scale: float32 [N, G].
        down: float32 [M, r], (x T) D; up: float [r, N].
    Returns:
        [M, N] in `dtype`.
    """
    codes, scale, zero = quantized
    (tokens, columns), (channels, groups) = codes.shape, weight_scale.shape
    words, sums, _ = layout.unpack(weight, bits, columns, channels, groups)
    if weight_scale.dtype != torch.float32:
        raise ValueError(f"weight_scale must be float32, not {weight_scale.dtype}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias {list(bias.shape)} is not one number for each of {channels} channels")
    if up is not None and (down is None or up.shape != (down.shape[1], channels)):
        raise ValueError(f"low_rank_up {list(up.shape)} does not follow low_rank_down and {channels} channels")
    if not tokens or not channels:
        return codes.new_empty((tokens, channels), dtype=dtype)
    rank = 0 if up is None else up.shape[0]
    # A branch in full precision has no registers for the largest tiles.
    cut = tiles(min(tokens, 1024) if rank else tokens, Shape(columns, channels, groups), device_of(codes.device))
    server = scaled_mm.provided() if cut.unpacked else None
    if server and not scaled_mm.misfit(columns, channels, groups, dtype, bool(rank) or bias is not None):
        whole = unpacked(words, bits, columns, channels).t()
        taken = (None, None) if symmetric else (sums[:, :channels], zero)
        return server.call(codes, whole, scale, weight_scale.contiguous(), dtype, *taken)
    out = torch.empty((tokens, channels), dtype=dtype, device=codes.device)
    branch = down, None if up is None else up.contiguous(), None if bias is None else bias.contiguous()
    run(
        (codes, scale, zero, words, sums, weight_scale.contiguous(), *branch, out), rank, cut,
        {"BITS": bits, "SYMMETRIC": symmetric, "BIAS": bias is not None},
    )  # fmt: skip
    return out


def run(given: tuple[Any, ...], rank: int, cut: Tiles, settings: dict[str, Any]) -> None:
    """Launches a product, in parts where its columns are split.

    Args:
        given: `linear_kernel`'s tensors; settings: compile-time arguments that both kernels have.
    """
    codes, scale, zero, words, sums, weight_scale, *branch, out = given
    (tokens, columns), (channels, groups), padded = codes.shape, weight_scale.shape, words.shape[1]
    settings |= {"RANK": max(layout.multiple(rank, 16), 32) if rank else 0, **rows.EXACT}
    parts = cut.splits > 1
    to = torch.empty((cut.splits, tokens, padded), dtype=torch.int32, device=out.device) if parts else out
    options = {"maxnreg": cut.registers} if cut.registers and branch[1] is None and groups == 1 else {}
    linear_kernel[triton.cdiv(channels, cut.n) * triton.cdiv(tokens, cut.m), cut.splits](
        codes, scale, zero, words, sums, weight_scale, *branch, to, tokens, columns, channels, padded, rank,
        triton.cdiv(triton.cdiv(columns, cut.k), cut.splits), **settings, GROUPS=groups,
        STEPS=columns // (groups * cut.k) if groups > 1 else 0, EVEN=columns % cut.k == 0, PARTS=parts, TN=cut.n,
        TM=cut.m, TK=cut.k, ASM=not triton.knobs.runtime.interpret, num_warps=cut.warps, num_stages=cut.stages,
        **options,
    )  # fmt: skip
    if parts:
        tn, tm = SUM_TILE
        sum_kernel[triton.cdiv(channels, tn), triton.cdiv(tokens, tm)](
            to, scale, zero, sums, weight_scale, *branch, out, tokens, channels, padded, rank, cut.splits, **settings,
            TN=tn, TM=tm, num_warps=4,
        )  # fmt: skip


def int_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, weight_bits: int, transform: str, block: int,
    matrix: Tensor | None, act_bits: int, act_symmetric: bool, act_clip: float,
    low_rank_down: Tensor | None = None, low_rank_up: Tensor | None = None, silu_mul: bool = False,
    low_rank_subtracts: bool = False,
) -> Tensor:  # fmt: skip
    """See `reference.int_linear`; one launch for the activations, one for the product."""
    flat, down = rows.rows_of(x), None
    if low_rank_down is not None or transform == "dense":  # the branch and the codes share the transformed rows
        flat, transform, silu_mul = rows.turned(flat, transform, block, matrix, silu_mul), "none", False
    if low_rank_down is not None:
        flat, factor = flat.float(), low_rank_down.float()
        down = flat @ factor
        flat = flat - down @ factor.T if low_rank_subtracts else flat
    quantized = rows.quantize_rows(flat, transform, block, matrix, act_bits, act_symmetric, act_clip, silu_mul)
    y = product(quantized, weight, weight_scale, bias, weight_bits, act_symmetric, x.dtype, down, low_rank_up)
    return y.view(*x.shape[:-1], y.shape[1])


def quantized_linear(
    codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    weight_bits: int, act_symmetric: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `reference.quantized_linear`."""
    return product((codes, scale, zero), weight, weight_scale, bias, weight_bits, act_symmetric, dtype)


IMPLEMENTATIONS: dict[str, Any] = {
    "pack_weight": layout.pack_weight,
    "quantized_linear": quantized_linear,
}
