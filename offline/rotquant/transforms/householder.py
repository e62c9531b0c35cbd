"""Householder reflections S = I - 2 vᵀ v, v a unit row: S Sᵀ = I and S = Sᵀ, so S undoes itself.

    v = (a/|a| - b/|b|) / |a/|a| - b/|b||     then (a/|a|) S = b/|b|

for |a/|a| - b/|b||² = 2 (a/|a|) (a/|a| - b/|b|)ᵀ. Where a and b have one direction, any v at right angles to it
leaves both as they are. A reflection costs two multiplications a channel online, and nothing when folded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant.errors import RotQuantError

SAME_DIRECTION = 1e-12


def reflection(source: Tensor, target: Tensor) -> Tensor:
    """The unit vector v, float64 [d], whose reflection turns source's direction into target's.

    Args:
        source, target: float [d], d >= 2, of any length but 0.
    Raises:
        RotQuantError: a vector without direction.
    """
    a, b = (_direction(vector, name) for vector, name in ((source, "source"), (target, "target")))
    difference, middle = a - b, a + b
    if (
        middle.norm() > 1
    ):  # in exact arithmetic they are at right angles; nearly equal directions need it to the last bit
        difference = difference - (difference @ middle) / (middle @ middle) * middle
    if difference.norm() > SAME_DIRECTION:
        return difference / difference.norm()
    across = torch.zeros_like(a)
    across[a.abs().argmin()] = 1
    across -= (across @ a) * a
    return across / across.norm()


def reflect_rows(x: Tensor, v: Tensor) -> Tensor:
    """x (I - 2 vᵀ v) for x [..., d] in its dtype; for weights W [N, d] the same, since S is its own inverse."""
    v = v.to(x)
    return x - (2 * (x @ v)).unsqueeze(-1) * v


def _direction(vector: Tensor, name: str) -> Tensor:
    vector = vector.double()
    norm = vector.norm()
    if vector.ndim != 1 or len(vector) < 2 or not norm > 0 or not norm.isfinite():
        raise RotQuantError(f"reflection: {name} must be a finite vector of at least 2 numbers that is not zero")
    return vector / norm
