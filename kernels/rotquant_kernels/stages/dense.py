"""The stage `dense`: x (I ⊗ T), T any invertible matrix [block, block]."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from rotquant_kernels.stages.kind import Kind, Stage, normal


class Dense(Kind):
    name, inside = "dense", True

    def rows(self, x: Tensor, stage: Stage) -> Tensor:
        return (x.unflatten(-1, (-1, stage.block)) @ stage.held.to(x)).flatten(-2)

    def weights(self, w: Tensor, stage: Stage) -> Tensor:
        return self.rows(w, stage._replace(tensor=torch.linalg.inv(stage.held.to(w)).mT))

    def shape(self, block: int, inputs: int) -> tuple[int, ...]:
        return (block, block)

    def sample(self, block: int, inputs: int, generator: Generator) -> Tensor:
        return normal(generator, block, block) * block**-0.5

    def cost(self, block: int, width: int) -> int:
        return width * block
