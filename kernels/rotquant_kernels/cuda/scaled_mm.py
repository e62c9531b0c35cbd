"""Products of many tokens by a GEMM of 8-bit integers that the server has, over weights that are unpacked for it.

Who serves says what it has (`provide`); `tiles.json` says from how many tokens on it is worth unpacking. The sums are
the same integers and the scales are multiplied in the same order, so nothing but the time changes. A layer that it does
not take runs in Triton as ever: `misfit`. Imports no Triton.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rotquant_kernels.cuda import humming

MOST_BYTES = 320 << 20  # of an unpacked weight, which lies there for as long as its product


class ScaledMM(Protocol):
    """bfloat16 or float16 [M, N]: ((codes weight - zero sums) s_w) s_x, rounded in float32 after each product.

    codes int8 [M, K], by rows; weight int8 [K, N], by columns; s_x float32 [M, 1]; s_w float32 [N, 1]; sums of the
    columns of weight int32 [1, N] and zero int32 [M, 1], or None for both; K and N are multiples of 16.
    """

    def __call__(
        self, codes: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor, dtype: torch.dtype,
        sums: Tensor | None, zero: Tensor | None,
    ) -> Tensor: ...  # fmt: skip


class Provided(NamedTuple):
    """Args: name: in reports."""

    name: str
    call: ScaledMM


_provided: Provided | None = None


def provide(found: Provided | None) -> None:
    """What this process has; None for nothing. To be called before layers are prepared, whose reports name it."""
    global _provided
    _provided = found


def provided() -> Provided | None:
    """What there is, unless the user asked for one GEMM by name."""
    return _provided if _provided is not None and humming.wanted() == "auto" else None


def misfit(columns: int, channels: int, groups: int, dtype: torch.dtype, added: bool) -> str:
    """Why a layer's product cannot run there, or nothing; added: whether a bias or a branch comes on top."""
    for what, wrong in (
        ("weight scales are by group", groups != 1),
        ("a bias or a branch would be added with another rounding", added),
        (f"its rows are {str(dtype).removeprefix('torch.')}", dtype not in (torch.bfloat16, torch.float16)),
        (f"{channels} channels are no multiple of 16", channels % 16),
        (f"{columns} columns are no multiple of 16", columns % 16),
        (f"{channels * columns >> 20} MiB of weights are too many to unpack", channels * columns > MOST_BYTES),
    ):
        if wrong:
            return what
    return ""
