"""The stage `hadamard`: x (I ⊗ H / sqrt(block)), Sylvester's H; it is its own inverse."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from rotquant_kernels.stages.kind import Kind, Stage


def hadamard(x: Tensor, block: int) -> Tensor:
    """x (I ⊗ H / sqrt(block)) by the fast Walsh-Hadamard transform, float32 or float64 as x is.

    The order of additions is part of the specification (it decides the last bit): butterflies of
    stride 1, 2, 4, ..., each (a + b, a - b), then one product with block^-0.5.
    """
    y = x.reshape(-1, block)
    stride = 1
    while stride < block:
        pair = y.reshape(-1, 2, stride)
        y = torch.stack((pair[:, 0] + pair[:, 1], pair[:, 0] - pair[:, 1]), dim=1)
        stride *= 2
    return (y.reshape(-1, block) * block**-0.5).reshape(x.shape)


class Hadamard(Kind):
    """Needs no tensor. A file may hold the matrix all the same: an engine that ignores transforms then meets a tensor
    that it does not know."""

    name, dtype = "hadamard", None
    inside, learned = True, False

    def rows(self, x: Tensor, stage: Stage) -> Tensor:
        return hadamard(x, stage.block)

    def block_fault(self, block: int) -> str:
        odd = block & (block - 1)
        return super().block_fault(block) or (f"a Hadamard block of {block} is not a power of two" if odd else "")

    def shape(self, block: int, inputs: int) -> tuple[int, ...]:
        return (block, block)

    def fault(self, tensor: Tensor, block: int, inputs: int) -> str:
        if found := super().fault(tensor, block, inputs):
            return found
        true = hadamard(torch.eye(block, dtype=torch.float32, device="cpu"), block)
        same = torch.allclose(tensor.float().cpu(), true, rtol=torch.finfo(tensor.dtype).eps, atol=0)
        return "" if same else "is not the Hadamard matrix that config.json declares"

    def sample(self, block: int, inputs: int, generator: Generator) -> None:
        return None

    def cost(self, block: int, width: int) -> int:
        return width * (block.bit_length() - 1)  # fast Walsh-Hadamard
