"""Targets of the Procrustes alternation: for rows y = x R, where each row should be.

A target T is near y and easy to quantize. All here are homogeneous, T(a y) = a T(y) for a > 0, so weighting rows
by w is the same as scaling them by sqrt(w).

    quantized    Q(y): DFRot
    clipped      clip(y, m ± κ s): FRTQ's grid-to-sigma ratio, the row's range made smaller
    corner       sign(y) |y| / sqrt(d): the nearest corner of the cube that holds all rows of this norm

For the last two with symmetric=True the nearest point is taken in a set that no rotation moves, so each step of
the alternation can only lower its loss.
"""

from __future__ import annotations

from torch import Tensor, finfo, where

from rotquant.learn.quantizers import fake_quantize
from rotquant_kernels.formats import RowFormat


def quantized_target(y: Tensor, rows: RowFormat) -> Tensor:
    """Q(y) per token, in y's dtype."""
    return fake_quantize(y.detach(), rows).to(y.dtype)


def clipped_target(y: Tensor, kappa: float, symmetric: bool = True) -> Tensor:
    """clip(y, m ± κ s): m = 0 and s the row's rms if symmetric, else m the row's mean and s its standard deviation.

    An asymmetric quantizer's range moves with the row's mean, at no cost: there the mean has to be kept in the
    target, or the alternation would work against it. A symmetric one pays for the mean as for any deviation.
    """
    mean, deviation = _centre(y, symmetric)
    return y.clamp(mean - kappa * deviation, mean + kappa * deviation)


def corner_target(y: Tensor) -> Tensor:
    """sign(y) |y| / sqrt(d), with sign(0) = 1."""
    size = y.square().mean(-1, keepdim=True).sqrt()
    return where(y < 0, -size, size)


def _centre(y: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    mean = y.new_zeros(1) if symmetric else y.mean(-1, keepdim=True)
    return mean, (y - mean).square().mean(-1, keepdim=True).clamp(min=finfo(y.dtype).tiny).sqrt()
