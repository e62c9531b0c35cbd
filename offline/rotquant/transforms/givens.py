"""Disjoint 2 x 2 rotations: every pair of coordinates of one vector is turned into the direction of a target.

For a pair v = (v0, v1) and its target u = (u0, u1), with

    c = <v, u> / (|v| |u|),   s = (v0 u1 - v1 u0) / (|v| |u|)

the rotation [[c, -s], [s, c]] takes the column v to u |v| / |u|: pair norms stay, directions are the target's.
For row vectors, y = x G, its transpose [[c, s], [-s, c]] stands in G. (RUQuant's released code applies the
transpose of what it states, so that it sends u to v, and v to a third vector.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotquant.errors import RotQuantError


@dataclass(frozen=True)
class PairRotations:
    """G [B, B], one rotation for each pair: columns `first` and `second`, int64 [B/2], cos and sin float [B/2]."""

    first: Tensor
    second: Tensor
    cos: Tensor
    sin: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """x G for x [..., B], in x's dtype."""
        y = torch.empty_like(x)
        a, b, cos, sin = x[..., self.first], x[..., self.second], self.cos.to(x), self.sin.to(x)
        y[..., self.first] = a * cos - b * sin
        y[..., self.second] = a * sin + b * cos
        return y


def givens(x: Tensor, target: Tensor, pairing: Tensor | None = None) -> PairRotations:
    """The rotations that turn x's pairs towards the target's; a pair without direction, in x or target, is left alone.

    Args:
        x, target: float [B], B even.
        pairing: a permutation int64 [B]; pairs are its entries 0 and 1, 2 and 3, ...; None for neighbours.
    Returns:
        G float64; x G has in each pair the norm of x and the direction of target.
    Raises:
        RotQuantError: B is odd.
    """
    if len(x) % 2:
        raise RotQuantError(f"pairs of coordinates need an even number of channels, not {len(x)}")
    pairs = (torch.arange(len(x), device=x.device) if pairing is None else pairing).view(-1, 2)
    v, u = x.double()[pairs], target.double()[pairs]
    length = v.norm(dim=1) * u.norm(dim=1)
    usable = length > 0
    safe = torch.where(usable, length, 1.0)
    cos = torch.where(usable, (v * u).sum(1) / safe, 1.0)
    sin = torch.where(usable, (v[:, 0] * u[:, 1] - v[:, 1] * u[:, 0]) / safe, 0.0)
    return PairRotations(pairs[:, 0], pairs[:, 1], cos, sin)
