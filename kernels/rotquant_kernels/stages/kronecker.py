"""The stage `kronecker`: x (P ⊗ Q), P [K / block, K / block] and Q [block, block] invertible (FlatQuant).

    x (P ⊗ Q) = vec(Pᵀ X Q),  X = x as a matrix [K / block, block]      (P ⊗ Q)⁻ᵀ = P⁻ᵀ ⊗ Q⁻ᵀ

The tensor is P then Q, flat.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from rotquant_kernels.stages.kind import Kind, Stage, normal


def factors(stage: Stage) -> tuple[Tensor, Tensor]:
    """P and Q."""
    left, right = stage.held[: -(stage.block**2)], stage.held[-(stage.block**2) :]
    outer = round(len(left) ** 0.5)
    return left.view(outer, outer), right.view(stage.block, stage.block)


class Kronecker(Kind):
    name = "kronecker"

    def rows(self, x: Tensor, stage: Stage) -> Tensor:
        left, right = factors(stage._replace(tensor=stage.held.to(x)))
        return (left.T @ (x.unflatten(-1, (len(left), stage.block)) @ right)).flatten(-2)

    def weights(self, w: Tensor, stage: Stage) -> Tensor:
        inverse = [torch.linalg.inv(m).mT.flatten() for m in factors(stage._replace(tensor=stage.held.to(w)))]
        return self.rows(w, stage._replace(tensor=torch.cat(inverse)))

    def shape(self, block: int, inputs: int) -> tuple[int, ...]:
        return ((inputs // block) ** 2 + block**2,)

    def sample(self, block: int, inputs: int, generator: Generator) -> Tensor:
        outer = inputs // block
        sizes = (outer, block)
        return torch.cat([normal(generator, size * size) * size**-0.5 for size in sizes])

    def span(self, block: int, inputs: int) -> int:
        return inputs

    def cost(self, block: int, width: int) -> int:
        return width * (width // block + block)
