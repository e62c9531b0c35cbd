"""Kronecker products A = P ⊗ Q of two small invertible matrices (FlatQuant), for rows of n = a b numbers.

x A = vec(Pᵀ X Q),  X = x as a matrix [a, b]        a + b multiplications a channel in place of a b
A⁻ᵀ = P⁻ᵀ ⊗ Q⁻ᵀ,   y = x Wᵀ = (x A) (W A⁻ᵀ)ᵀ        for any invertible A; A⁻ᵀ = A where it is orthogonal

A runs online as the stage `kronecker` of `rotquant_kernels.stages`, block b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant_kernels import Stage


def factor_pair(n: int) -> tuple[int, int]:
    """(a, b) with a b = n, a <= b, and a as large as can be: both as near to sqrt(n) as n's divisors allow."""
    a = max(a for a in range(1, int(n**0.5) + 1) if n % a == 0)
    return a, n // a


def stage(left: Tensor, right: Tensor) -> Stage:
    """The stage of P ⊗ Q, float [a, a] and [b, b]."""
    return Stage("kronecker", len(right), torch.cat((left.flatten(), right.flatten())))
