"""What the words of a recipe's `online` stand for: the stages that a site starts with, behind R4 where there is one.

    kronecker  two random Hadamard rotations, as near to each other in size as the width's divisors allow
    heads      the same for the heads of o's input alone: channels within a head stay as they are
    greedy     RUQuant's or DuQuant's chain (`greedy`)
    shift      the mean of the tokens that are not massive

Learning may move their tensors. The same kinds and blocks come out for every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rotquant.learn.greedy import greedy_stages
from rotquant.learn.procrustes import massive_tokens
from rotquant.recipe import OnlineStages
from rotquant.transforms import kronecker
from rotquant.transforms.hadamard import RandomHadamard, power_of_two_factor
from rotquant_kernels import Stage
from rotquant_kernels.formats import RowFormat


@dataclass(frozen=True)
class Seen:
    """What a start may look at.

    x: a sample of what the stages will see, float [n, K]; rows: what activations are rounded to.
    """

    x: Tensor
    random: torch.Generator
    options: OnlineStages
    head_dim: int
    tp_max: int
    rows: RowFormat

    @property
    def width(self) -> int:
        return self.x.shape[1]

    @property
    def block(self) -> int:
        """Of a transform in blocks: a power of two that no rank cuts."""
        return min(power_of_two_factor(self.width // self.tp_max), self.options.block)

    def rotation(self, size: int) -> Tensor:
        """A random Hadamard rotation as a matrix, float32 [size, size]."""
        return RandomHadamard(size, self.random).rows(torch.eye(size, dtype=torch.float64)).float()


def kronecker_start(seen: Seen) -> list[Stage]:
    outer, inner = kronecker.factor_pair(seen.width)
    return [kronecker.stage(seen.rotation(outer), seen.rotation(inner))]


def heads_start(seen: Seen) -> list[Stage]:
    return [kronecker.stage(seen.rotation(seen.width // seen.head_dim), torch.eye(seen.head_dim))]


def greedy_start(seen: Seen) -> list[Stage]:
    method, width = seen.options.greedy, seen.width
    made = greedy_stages(seen.x, seen.block, seen.random, method, seen.rows, seen.tp_max)
    if method == "ruquant" and seen.tp_max == 1 and made[-1].kind != "reflection":
        made.append(Stage("reflection", width, torch.zeros(width)))  # none helps: the identity
    return made


def shift_start(seen: Seen) -> list[Stage]:
    return [Stage("shift", seen.width, usual_mean(seen.x))]


def usual_mean(x: Tensor) -> Tensor:
    """Mean [d] of the tokens [n, d] that are not massive; 0 where all are."""
    usual = x[~massive_tokens(x)]
    return usual.mean(0) if len(usual) else x.new_zeros(x.shape[1])


STARTS: dict[str, Callable[[Seen], list[Stage]]] = {
    "kronecker": kronecker_start,
    "heads": heads_start,
    "greedy": greedy_start,
    "shift": shift_start,
}
