"""Triton: all experts of a layer, one product over the rows of each expert, one after the other.

    pairs of a token and one of its experts, sorted by expert; a tile has rows of one expert alone
    codes of x [T, hidden]  ──▶ gate, up of each pair ──▶ SiLU·mul, Hadamard, codes ──▶ down of each pair ──▶ Σ by token

Every size that the host needs follows from shapes, so that a CUDA graph holds the op: which expert a tile has is found
on the device, and tiles that there might have been end at once. A row's numbers are those of `gemm`, whatever its tile.
"""

# ruff: noqa: N803 (Triton's compile-time constants are upper case)
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotquant_kernels.cuda import gemm, layout, rows
from rotquant_kernels.cuda.gemm import scaled, step
from rotquant_kernels.cuda.tiles import Shape, Tiles, tiles

MOST_ROWS = 64  # of a tile: registers of a larger one hold nothing but sums
SUM_COLUMNS = 1024  # of a program that adds up a token's experts


@triton.jit(do_not_specialize=["tokens"])
def experts_kernel(
    codes, scales, zeros, rows_of, words, sums, weight_scale, expert_of, first_of, count_of, out, tokens, columns,
    channels, padded, stride, BITS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, SYMMETRIC: tl.constexpr,
    EVEN: tl.constexpr, TN: tl.constexpr, TM: tl.constexpr, TK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One tile of TN channels and at most TM pairs of one expert; STEPS of TK columns make a group, where there are
    groups.

    rows_of int32 [pairs]: the row of codes of a sorted pair; expert_of, first_of, count_of int32 [tiles]: the tile's
    expert, its first pair, how many it has. stride: int32 words of an expert, its sums behind the codes at `sums`.
    """
    tile = tl.program_id(1)
    count = tl.load(count_of + tile)
    if count > 0:
        expert = tl.load(expert_of + tile).to(tl.int64)
        n = tl.program_id(0) * TN + tl.arange(0, TN)
        pair = tl.load(first_of + tile).to(tl.int64) + tl.arange(0, TM)
        inside = tl.arange(0, TM) < count
        m = tl.load(rows_of + pair, inside, tokens).to(tl.int64)
        words += expert * stride * 4
        sums += expert * stride
        weight_scale += expert * channels * GROUPS
        line = padded.to(tl.int64) * 16
        zero = tl.load(zeros + m, inside, 0)
        if GROUPS == 1:
            acc = tl.zeros([TN, TM], tl.int32)
            for i in range(tl.cdiv(columns, TK)):
                acc = step(acc, words, codes, i * TK, n, m, tokens, columns, line, BITS, TK, EVEN, ASM)
            y = scaled(acc, sums, weight_scale + n, zero, n, channels, SYMMETRIC, BITS)
        else:
            y = tl.zeros([TN, TM], tl.float32)
            for group in range(GROUPS):
                acc = tl.zeros([TN, TM], tl.int32)
                for i in range(STEPS):
                    first = (group * STEPS + i) * TK
                    acc = step(acc, words, codes, first, n, m, tokens, columns, line, BITS, TK, EVEN, ASM)
                at = weight_scale + n * GROUPS + group
                y = y + scaled(acc, sums + group * padded, at, zero, n, channels, SYMMETRIC, BITS)
        y = y * tl.load(scales + m, inside, 0)[None, :]
        to = out + (pair * channels)[None, :] + n[:, None]
        tl.store(to, y.to(out.dtype.element_ty), inside[None, :] & (n < channels)[:, None])


@triton.jit
def add_kernel(y, pair_of, weights, out, columns, TOP: tl.constexpr, WIDTH: tl.constexpr):
    """Some columns of one token: Σ_i weights[i] y[pair_i], in float32 in their order; a negative pair adds nothing."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for i in range(TOP):
        pair = tl.load(pair_of + token * TOP + i).to(tl.int64)
        part = tl.load(y + pair * columns + k, k < tl.where(pair >= 0, columns, 0), 0).to(tl.float32)
        total = tl.where(pair >= 0, total + part * tl.load(weights + token * TOP + i), total)
    tl.store(out + token * columns + k, total.to(out.dtype.element_ty), k < columns)


class Pairs(NamedTuple):
    """Tokens and their experts, sorted by expert; those of other processes come last. All int32.

    token: [pairs] of each; place: [pairs], the pair of a token's i-th expert, or -1; ends: [experts], behind the last
    pair of each.
    """

    token: Tensor
    place: Tensor
    ends: Tensor


def sorted_pairs(chosen: Tensor, expert_map: Tensor | None, experts: int) -> Pairs:
    local = chosen.reshape(-1).long()
    if expert_map is not None:
        local = torch.where(local < 0, -1, expert_map.long()[local.clamp(min=0)])
    keys = torch.where(local < 0, experts, local)
    keys, order = keys.sort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(keys, torch.arange(experts, device=keys.device), right=True)
    return Pairs((order // chosen.shape[1]).int(), torch.where(local < 0, -1, place).int(), ends.int())


def tiles_of(pairs: Pairs, height: int) -> tuple[Tensor, Tensor, Tensor]:
    """expert_of, first_of, count_of of `experts_kernel`, for as many tiles as there might be."""
    begins = torch.nn.functional.pad(pairs.ends[:-1], (1, 0))
    last = ((pairs.ends - begins + height - 1) // height).cumsum(0)
    most = len(pairs.token) // height + min(len(pairs.ends), len(pairs.token))
    tile = torch.arange(most, device=last.device)
    expert = torch.searchsorted(last, tile, right=True).clamp(max=len(last) - 1)
    first = begins[expert] + (tile - torch.nn.functional.pad(last[:-1], (1, 0))[expert]) * height
    return expert.int(), first.int(), (pairs.ends[expert] - first).clamp(max=height).int()


def cut_of(pairs: int, experts: int, shape: Shape, device: torch.device) -> Tiles:
    """Tiles for so many pairs, evenly spread over the experts."""
    return tiles(min(max(pairs // experts, 1), MOST_ROWS), shape, gemm.device_of(device))


def distinct_tokens(hidden: int, width: int, groups: int, experts: int, top: int, device: torch.device) -> list[int]:
    """Numbers of tokens that between them compile every kernel of a mixture."""
    found: dict[Any, int] = {}
    for rows_each in (1, 17, 33, MOST_ROWS):
        tokens = -(-rows_each * experts // top)
        shapes = Shape(hidden, 2 * width, groups), Shape(width, hidden, groups)
        cuts = [cut_of(tokens * top, experts, shape, device) for shape in shapes]
        found.setdefault(tuple(cut._replace(splits=1) for cut in cuts), tokens)
    return list(found.values())


def product(
    quantized: tuple[Tensor, Tensor, Tensor], of: Tensor, pairs: Pairs, weight: Tensor, weight_scale: Tensor, bits: int,
    symmetric: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Each pair's expert times its row.

    Args:
        quantized: codes int8 [M, K], scale float32 [M, 1], zero int32 [M, 1].
        of: int32 [pairs], the row of each sorted pair.
        weight: int32 [E, words], see `layout`; weight_scale: float32 [E, N, G].
    Returns:
        [pairs, N] in `dtype`, sorted; undefined for pairs of other processes.
    """
    codes, scale, zero = quantized
    (tokens, columns), (experts, channels, groups) = codes.shape, weight_scale.shape
    words, _, _ = layout.unpack(weight[0], bits, columns, channels, groups)
    cut = cut_of(len(of), experts, Shape(columns, channels, groups), codes.device)
    table, sums = tiles_of(pairs, cut.m), weight.view(-1)[words.numel() // 4 :]
    out = torch.empty((len(of), channels), dtype=dtype, device=codes.device)
    experts_kernel[triton.cdiv(channels, cut.n), len(table[0])](
        codes, scale, zero, of, weight.view(torch.int8), sums, weight_scale.contiguous(), *table, out, tokens, columns,
        channels, words.shape[1], weight.shape[1], BITS=bits, GROUPS=groups,
        STEPS=columns // (groups * cut.k) if groups > 1 else 0, SYMMETRIC=symmetric, EVEN=columns % cut.k == 0,
        TN=cut.n, TM=cut.m, TK=cut.k, ASM=not triton.knobs.runtime.interpret, num_warps=cut.warps,
        num_stages=cut.stages, **rows.EXACT,
    )  # fmt: skip
    return out


def added(y: Tensor, place: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """out [T, N], filled: what each token's experts, y [pairs, N], add up to; place int32 [T k], weights [T, k]."""
    columns = out.shape[1]
    add_kernel[len(out), triton.cdiv(columns, SUM_COLUMNS)](
        y, place, weights, out, columns, TOP=weights.shape[1], WIDTH=SUM_COLUMNS, num_warps=4, **rows.EXACT
    )
    return out


def moe_experts(
    x: Tensor, chosen: Tensor, weights: Tensor, expert_map: Tensor | None, up: Tensor, up_scale: Tensor, down: Tensor,
    down_scale: Tensor, weight_bits: int, block: int, act_bits: int, act_symmetric: bool, up_clip: float,
    down_clip: float,
) -> Tensor:  # fmt: skip
    """See `reference.moe_experts`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not len(x):
        return out
    pairs, settings = sorted_pairs(chosen, expert_map, len(up_scale)), (weight_bits, act_symmetric, x.dtype)
    once = rows.quantize_rows(x, "none", 0, None, act_bits, act_symmetric, up_clip)
    gate_up = product(once, pairs.token, pairs, up, up_scale, *settings)
    turn = ("hadamard" if block else "none", block, None)
    between = rows.quantize_rows(gate_up, *turn, act_bits, act_symmetric, down_clip, True)
    own = torch.arange(len(pairs.token), dtype=torch.int32, device=x.device)
    y = product(between, own, pairs, down, down_scale, *settings)
    return added(y, pairs.place, weights.float().contiguous(), out)


IMPLEMENTATIONS: dict[str, Any] = {"moe_experts": moe_experts}
