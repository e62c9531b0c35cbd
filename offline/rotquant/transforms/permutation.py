"""Zigzag permutation of channels (DuQuant): every block gets its fair share of the large ones.

Channels are sorted by magnitude, largest first, and dealt to the n blocks to and fro: 0 .. n-1, n-1 .. 0, 0 .. n-1:
so each block's magnitudes have nearly one mean, and no block holds more than its share of the outliers, which a
rotation within the block then spreads.

    y = x[..., p],  W' = W[:, p]:  y W'ᵀ = x Wᵀ
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant.errors import RotQuantError


def zigzag(magnitude: Tensor, block: int, shards: int = 1) -> Tensor:
    """The permutation p, int64 [K].

    Args:
        magnitude: float [K], e.g. the largest |x| of each channel.
        block: channels in a block of the rotation that follows; divides K / shards.
        shards: tensor-parallel ranks; channels stay in their contiguous K / shards. A permutation within shards
            folds into the rows of gate and up and the columns of down.
    Raises:
        RotQuantError: blocks do not divide the shards.
    """
    size, rest = divmod(len(magnitude), shards)
    if rest or size % block:
        raise RotQuantError(f"{len(magnitude)} channels do not divide into {shards} shards of blocks of {block}")
    order = magnitude.view(shards, size).argsort(dim=1, descending=True, stable=True)
    dealt = order.view(shards, block, size // block).clone()  # row r: the channels that blocks get in round r
    dealt[:, 1::2] = dealt[:, 1::2].flip(-1)
    offset = torch.arange(shards, device=magnitude.device).view(-1, 1, 1) * size
    return (dealt.mT + offset).flatten()
