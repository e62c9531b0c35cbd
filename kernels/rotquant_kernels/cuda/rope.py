"""Rotary positions of queries and keys, for kernels of the 4-bit KV cache that turn what they load. Imports no Triton.

A launch that writes K, or attends, knows at which position each row stands: so the model need not turn q and k first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rope(NamedTuple):
    """table: [positions, dims] in the dtype of q and k, cosines and then sines, of the first `dims` of a head; pairs:
    whether the partner of an even number is its neighbour, else the number half the dims away."""

    table: Tensor
    pairs: bool


def turned(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """The specification: x [T, heads, d] at int [T]; products and sums are rounded to x's dtype, as models do."""
    dims = rope.table.shape[1]
    cos, sin = (half[:, None].to(x.dtype) for half in rope.table[positions.long()].chunk(2, -1))
    part, rest = x[..., :dims], x[..., dims:]
    one, other = (part[..., ::2], part[..., 1::2]) if rope.pairs else part.chunk(2, -1)
    both = one * cos - other * sin, other * cos + one * sin
    part = torch.stack(both, -1).flatten(-2) if rope.pairs else torch.cat(both, -1)
    return torch.cat((part, rest), -1)


def constants(rope: Rope | None) -> dict[str, object]:
    """Compile-time arguments of the kernels; ROPE is 0 where nothing is turned."""
    return {"ROPE": 0 if rope is None else rope.table.shape[1], "PAIRS": rope is not None and rope.pairs}
