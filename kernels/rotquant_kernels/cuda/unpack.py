"""Triton: a packed weight (`layout`) as int8 [N, K], row by row, for GEMMs that know no chunks."""

# ruff: noqa: N803, N806 (Triton's compile-time constants are upper case)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = (64, 256)  # channels, columns of a program


@triton.jit
def unpack_kernel(
    words, out, columns, channels, line, BITS: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr
):  # fmt: skip
    """TK columns of TN channels; `line` bytes hold a chunk of every channel."""
    BYTES: tl.constexpr = TK * BITS // 8
    n, byte = tl.program_id(0) * TN + tl.arange(0, TN), tl.arange(0, BYTES)
    first = tl.program_id(1) * TK
    chunk = first * BITS // 128 + byte // 16
    at = words + chunk.to(tl.int64)[None, :] * line + (n * 16)[:, None] + (byte % 16)[None, :]
    inside = (n < channels)[:, None] & (chunk * 128 // BITS < columns)[None, :]
    w = tl.load(at, inside, 0)
    to = out + n.to(tl.int64)[:, None] * columns
    if BITS == 4:
        k = first + byte // 16 * 32 + byte % 16
        tl.store(to + k[None, :], (w << 4) >> 4, inside & (k < columns)[None, :])
        tl.store(to + k[None, :] + 16, w >> 4, inside & (k + 16 < columns)[None, :])
    else:
        k = first + byte
        tl.store(to + k[None, :], w, inside & (k < columns)[None, :])


def unpacked(words: Tensor, bits: int, columns: int, channels: int) -> Tensor:
    """int8 [channels, columns] of `layout.Weight.words`."""
    out = torch.empty((channels, columns), dtype=torch.int8, device=words.device)
    tn, tk = TILE
    unpack_kernel[triton.cdiv(channels, tn), triton.cdiv(columns, tk)](
        words, out, columns, channels, words.shape[1] * 16, BITS=bits, TN=tn, TK=tk, num_warps=4,
    )  # fmt: skip
    return out
