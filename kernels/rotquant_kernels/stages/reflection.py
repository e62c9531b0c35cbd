"""The stage `reflection`: x (I ⊗ (I - 2 vᵀv)), v [block] of length 1, or 0 for none; it is its own inverse."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from rotquant_kernels.stages.kind import Kind, Stage, normal

UNIT = 0.01  # how far v may be from length 1: bfloat16 rounds by less


class Reflection(Kind):
    name = "reflection"

    def rows(self, x: Tensor, stage: Stage) -> Tensor:
        v, rows = stage.held.to(x), x.unflatten(-1, (-1, stage.block))
        return (rows - 2 * (rows @ v).unsqueeze(-1) * v).flatten(-2)

    def shape(self, block: int, inputs: int) -> tuple[int, ...]:
        return (block,)

    def fault(self, tensor: Tensor, block: int, inputs: int) -> str:
        if found := super().fault(tensor, block, inputs):
            return found
        length = float(tensor.float().norm())  # 0 reflects nothing
        wrong = length and abs(length - 1) > UNIT
        return f"has length {length:.3f}, a reflection's must be 1" if wrong else ""

    def sample(self, block: int, inputs: int, generator: Generator) -> Tensor:
        return torch.nn.functional.normalize(normal(generator, block), dim=0)

    def cost(self, block: int, width: int) -> int:
        return 2 * width  # a dot product and an update

    def start(self, tensor: Tensor) -> Tensor:
        """Where it does nothing (v = 0) there is no direction to learn from."""
        return tensor if tensor.any() else 1 - 2 * (torch.arange(len(tensor)) % 2).float()

    def value(self, parameter: Tensor) -> Tensor:
        return parameter / parameter.norm()
