"""The stage `shift`: x - b, b [K].

(x - b) Wᵀ + b Wᵀ = x Wᵀ        W stays, and b Wᵀ is stored beside it and added like a bias
"""

from __future__ import annotations

from torch import Generator, Tensor

from rotquant_kernels.stages.kind import Kind, Stage, normal


class Shift(Kind):
    name, affine, has_block = "shift", True, False
    inside = True

    def rows(self, x: Tensor, stage: Stage) -> Tensor:
        return x - stage.held.to(x)

    def weights(self, w: Tensor, stage: Stage) -> Tensor:
        return w

    def moved(self, w: Tensor, stage: Stage) -> Tensor:
        return w @ stage.held.to(w)

    def block_fault(self, block: int) -> str:
        return ""

    def shape(self, block: int, inputs: int) -> tuple[int, ...]:
        return (inputs,)

    def sample(self, block: int, inputs: int, generator: Generator) -> Tensor:
        return normal(generator, inputs)

    def span(self, block: int, inputs: int) -> int:
        return 1

    def shard(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        return tensor[start:stop].contiguous()

    def cost(self, block: int, width: int) -> int:
        return width
