"""A rotation given by its matrix: what learning makes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """R itself, orthogonal [n, n]: x R (w R)ᵀ = x R Rᵀ wᵀ = x wᵀ."""

    matrix: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """x R for x [..., n], in x's dtype."""
        return x @ self.matrix.to(x)

    def columns(self, w: Tensor) -> Tensor:
        """Rᵀ w for w [n, ...]."""
        return (w.movedim(0, -1) @ self.matrix.to(w)).movedim(-1, 0)
