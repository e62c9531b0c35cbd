"""What there is to know of a kind of online transform, and one step of a chain of them."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor


class Stage(NamedTuple):
    """One step of a chain: the kind's name, its block, and its tensor where the kind has one."""

    kind: str
    block: int
    tensor: Tensor | None = None

    @property
    def held(self) -> Tensor:
        """The tensor of a kind that has one.

        Raises:
            ValueError: it is not there.
        """
        if self.tensor is None:
            raise ValueError(f"a {self.kind} stage needs its tensor")
        return self.tensor


class Kind:
    """A transform T of rows x of K numbers: x to x T, or to x T + a constant. What a kind does not say holds of most.

    As it is here a kind is orthogonal, so that weights get T too, and has a tensor of real numbers.
    """

    name: ClassVar[str]  # in config.json
    dtype: ClassVar[torch.dtype | None] = torch.float32  # of the tensor, stored and run; None for a kind without one
    inside: ClassVar[bool] = False  # where it comes last, `int_linear` and `quantize_rows` run it themselves
    affine: ClassVar[bool] = False  # it moves rows by a constant: `moved`
    learned: ClassVar[bool] = True  # gradients may move its tensor
    has_block: ClassVar[bool] = True  # False: a block in config.json says nothing and is read as 0

    # ---- the algebra: in x's dtype, float32 or float64, and differentiable ----

    def rows(self, x: Tensor, stage: Stage) -> Tensor:
        """The specification: x [..., K] after the stage."""
        raise NotImplementedError

    def weights(self, w: Tensor, stage: Stage) -> Tensor:
        """W T⁻ᵀ for W [N, K], which undoes it: x T (W T⁻ᵀ)ᵀ = x Wᵀ. T⁻ᵀ = T where T is orthogonal."""
        return self.rows(w, stage)

    def moved(self, w: Tensor, stage: Stage) -> Tensor | None:
        """[N], what an affine stage takes from the outputs x Wᵀ and they must be given back; else None."""
        return None

    # ---- what a checkpoint holds ----

    def block_fault(self, block: int) -> str:
        """What is wrong with a block; nothing where a layer may have it."""
        return "" if block else f"kind {self.name!r} needs a block"

    def shape(self, block: int, inputs: int) -> tuple[int, ...]:
        """Shape of the tensor in a layer of K = `inputs`."""
        raise NotImplementedError

    def fault(self, tensor: Tensor, block: int, inputs: int) -> str:
        """What is wrong with a tensor of the right shape; nothing where it can be right."""
        real = tensor.is_floating_point() and bool(tensor.isfinite().all())
        return "" if real else "is not a tensor of finite real numbers"

    def sample(self, block: int, inputs: int, generator: Generator) -> Tensor | None:
        """A random tensor without `fault` that about keeps the size of rows; None for a kind without one."""
        raise NotImplementedError

    # ---- tensor parallelism ----

    def span(self, block: int, inputs: int) -> int:
        """How many neighbouring inputs it mixes with each other: one rank must hold all of them."""
        return block or inputs

    def shard(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """The tensor of the rank that holds the inputs start to stop, multiples of `span`."""
        return tensor

    # ---- cost and learning ----

    def cost(self, block: int, width: int) -> int:
        """Multiply-adds of a row of K = `width`; an addition counts as one."""
        raise NotImplementedError

    def start(self, tensor: Tensor) -> Tensor:
        """Where the parameter starts that learning moves, from the tensor as it is."""
        return tensor

    def value(self, parameter: Tensor) -> Tensor:
        """The tensor that a parameter stands for."""
        return parameter


def normal(generator: Generator, *size: int) -> Tensor:
    """Standard normal float32 on the CPU, whatever torch's defaults are (a server changes them)."""
    return torch.randn(*size, generator=generator, device="cpu", dtype=torch.float32)
