"""The stage `hadamard`: x (I ⊗ H / sqrt(block)), Sylvester's H; it is its own inverse."""

from __future__ import annotations

import functools

import torch
from torch import Generator, Tensor

from rotquant_kernels.stages.kind import Kind, Stage

CACHED = 1 << 19  # numbers turned at a time: a vocabulary in float64 is far larger than the processor's cache


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


def products(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (I ⊗ H_a ⊗ H_b) by two dense products: several times as fast as butterflies, which read and write all of x
    log2(block) times, and not the same to the last bit.

    With x cut into a x b matrices X, x (H_a ⊗ H_b) is H_aᵀ X H_b.
    """
    rows = x.reshape(-1, x.shape[-1])
    some = max(1, CACHED // x.shape[-1])
    return torch.cat([_product(part, left, right) for part in rows.split(some)]).view(x.shape)


def _product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    blocks = (x.reshape(-1, len(right)) @ right).view(-1, len(left), len(right))
    return (blocks.mT @ left).mT.reshape(x.shape)


def sylvester(n: int) -> Tensor:
    """H / sqrt(n), float64 [n, n], n a power of two."""
    return hadamard(torch.eye(n, dtype=torch.float64, device="cpu"), n)


def inner(order: int, power: int) -> int:
    """The power of two b <= power for which order / b and b are nearest to each other."""
    return min((1 << k for k in range(power.bit_length())), key=lambda b: order // b + b)


@functools.cache
def factors(block: int) -> tuple[Tensor, Tensor]:
    """Rotations H_a / sqrt(a) and H_b / sqrt(b), float64, with H_a ⊗ H_b of this block."""
    b = inner(block, block)
    return sylvester(block // b), sylvester(b)


class Hadamard(Kind):
    """Needs no tensor. A file may hold the matrix all the same: an engine that ignores transforms then meets a tensor
    that it does not know."""

    name, dtype = "hadamard", None
    inside, learned = True, False

    def rows(self, x: Tensor, stage: Stage) -> Tensor:
        return hadamard(x, stage.block)

    def weights(self, w: Tensor, stage: Stage) -> Tensor:
        return products(w, *(matrix.to(w) for matrix in factors(stage.block)))

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
