"""The stage `permutation`: x[..., p], p [K] with each index once. With a block it moves inputs only within blocks."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from rotquant_kernels.stages.kind import Kind, Stage, normal


class Permutation(Kind):
    name, dtype, learned = "permutation", torch.int32, False

    def rows(self, x: Tensor, stage: Stage) -> Tensor:
        return x[..., stage.held.long()]

    def block_fault(self, block: int) -> str:
        return ""  # 0: within all inputs

    def shape(self, block: int, inputs: int) -> tuple[int, ...]:
        return (inputs,)

    def fault(self, tensor: Tensor, block: int, inputs: int) -> str:
        if tensor.dtype != self.dtype:
            return f"has dtype {tensor.dtype}, expected {self.dtype}"
        blocks = tensor.long().view(-1, self.span(block, inputs))
        whole = torch.arange(inputs, device=tensor.device).view(blocks.shape)
        once = torch.equal(blocks.sort(dim=1).values, whole)
        return "" if once else f"is not a permutation within blocks of {blocks.shape[1]}"

    def sample(self, block: int, inputs: int, generator: Generator) -> Tensor:
        span = self.span(block, inputs)
        first = torch.arange(0, inputs, span, device="cpu")[:, None]
        return (normal(generator, inputs // span, span).argsort(1) + first).flatten().to(self.dtype)

    def shard(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        return tensor[start:stop] - start

    def cost(self, block: int, width: int) -> int:
        return 0  # moves only
