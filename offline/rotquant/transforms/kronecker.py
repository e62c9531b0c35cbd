"""Kronecker products A = P ⊗ Q of two small invertible matrices (FlatQuant), for rows of n = a b numbers.

x A = vec(Pᵀ X Q),  X = x as a matrix [a, b]        a + b multiplications a channel in place of a b
(P ⊗ Q)⁻¹ = P⁻¹ ⊗ Q⁻¹,  (P ⊗ Q)ᵀ = Pᵀ ⊗ Qᵀ
y = x Wᵀ = (x A) (W A⁻ᵀ)ᵀ                            for any invertible A; A⁻ᵀ = A where it is orthogonal
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def factor_pair(n: int) -> tuple[int, int]:
    """(a, b) with a b = n, a <= b, and a as large as can be: both as near to sqrt(n) as n's divisors allow."""
    a = max(a for a in range(1, int(n**0.5) + 1) if n % a == 0)
    return a, n // a


@dataclass(frozen=True)
class Kronecker:
    """A = left ⊗ right, float [a, a] and [b, b]."""

    left: Tensor
    right: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """x A for x [..., a b], in x's dtype."""
        matrices = x.unflatten(-1, (self.left.shape[0], self.right.shape[0]))
        return (self.left.to(x).mT @ (matrices @ self.right.to(x))).flatten(-2)

    def weight(self, w: Tensor) -> Tensor:
        """W A⁻ᵀ for W [N, a b], in its dtype: what the linear layer behind x A needs."""
        return Kronecker(*(torch.linalg.inv(m.double()).mT for m in (self.left, self.right))).rows(w)

    def tensor(self) -> Tensor:
        """Both factors, P then Q, in one row [a² + b²]: the tensor of the online stage `kronecker`, block b."""
        return torch.cat((self.left.flatten(), self.right.flatten()))
