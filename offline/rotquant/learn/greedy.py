"""Greedy rotations of blocks (RUQuant, DuQuant): a chain of online stages found in seconds, without gradients.

    x  →  x (I ⊗ Ra)  →  zigzag permutation  →  (I ⊗ Rb)  →  reflection over the full width (RUQuant)

Ra and Rb [B, B] are shared by all blocks; each is a product of steps, and every step looks at the block vector that
holds the largest |entry| of all:

    RUQuant   a reflection that sends this vector to u, evenly distributed entries of its length; then a few times
              Givens rotations of random pairs of coordinates towards such a u (`transforms.givens`, where the
              transposition in the released code is mended), each for the vector that is then the worst
    DuQuant   a reflection that spreads the largest coordinate alone over the block, with random signs

The product is cut where the rounding error that the tokens' ranges predict (`gsr_loss`) was least. RUQuant's u lies in
[0, 1): it moves tokens to a mean above 0, which only an asymmetric quantizer forgives; for a symmetric one u has signs.
All stages are orthogonal, so W' is W with the same stages applied to its rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rotquant.errors import RotQuantError
from rotquant.learn.objectives import gsr_loss
from rotquant.transforms.givens import givens
from rotquant.transforms.householder import reflect_rows, reflection
from rotquant.transforms.permutation import zigzag
from rotquant_kernels.formats import RowFormat
from rotquant_kernels.online import Stage, transform

Step = Callable[[Tensor], Tensor]
METHODS = ("ruquant", "duquant")
ASYMMETRIC = RowFormat(symmetric=False)


def greedy_stages(
    x: Tensor,
    block: int,
    generator: torch.Generator,
    method: str = "ruquant",
    form: RowFormat = ASYMMETRIC,
    shards: int = 1,
    rounds: int | None = None,
) -> list[Stage]:
    """The whole chain for one input of linear layers.

    Args:
        x: sample of inputs, float [n, K]; smoothed first (`transforms.scaling`) as both papers do.
        block: B, even; divides K / shards.
        generator: a CPU generator; the only source of chance.
        form: of the activations.
        shards: tensor-parallel ranks that the permutation must not cross.
        rounds: None for the papers' 16 (RUQuant) and 256 (DuQuant).
    Returns:
        stages dense, permutation, dense and, for RUQuant, reflection where one helps and shards is 1 (across ranks it
        would need an all-reduce); tensors are float32, those of permutations int32.
    Raises:
        RotQuantError: unknown method, or blocks that do not divide.
    """
    if method not in METHODS:
        raise RotQuantError(f"unknown greedy method {method!r}: take one of {', '.join(METHODS)}")
    if x.shape[1] % block:
        raise RotQuantError(f"blocks of {block} do not divide {x.shape[1]} channels")
    stages: list[Stage] = []
    for last in (False, True):
        step = ruquant_step(generator, form.symmetric) if method == "ruquant" else duquant_step(generator)
        y = transform(x, stages)
        product = greedy_rotation(y, block, step, rounds or (16 if method == "ruquant" else 256), form)
        stages.append(Stage("dense", block, product.float()))
        if not last:
            magnitude = transform(x, stages).abs().amax(0)
            stages.append(Stage("permutation", x.shape[1] // shards, zigzag(magnitude, block, shards).int()))
    if method == "ruquant" and shards == 1:
        v = greedy_reflection(transform(x, stages), generator, form)
        stages += [] if v is None else [Stage("reflection", x.shape[1], v.float())]
    return stages


def greedy_rotation(x: Tensor, block: int, step: Step, rounds: int, form: RowFormat) -> Tensor:
    """The product R float64 [B, B] of the first steps, as many of `rounds` as make x (I ⊗ R) easiest to round.

    The tokens turned so far are float32: they only choose the next step, which is orthogonal in float64 whatever it is.

    Args:
        x: float [n, K]; step: block vectors [m, B] to an orthogonal matrix float64 [B, B].
    """
    rows = x.reshape(-1, block).float()
    product = best = torch.eye(block, dtype=torch.float64, device=x.device)
    least = gsr_loss(x, form)
    for _ in range(rounds):
        matrix = step(rows)
        rows, product = rows @ matrix.to(rows.dtype), product @ matrix
        loss = gsr_loss(rows.view(x.shape), form)
        if loss < least:
            least, best = loss, product
    return best


def ruquant_step(generator: torch.Generator, symmetric: bool, inner: int = 3) -> Step:
    """A reflection, then `inner` (the paper's lambda) rotations of random pairs."""

    def step(rows: Tensor) -> Tensor:
        size = rows.shape[1]
        eye = torch.eye(size, dtype=torch.float64, device=rows.device)
        product = reflect_rows(eye, reflection(_worst(rows), _uniform(rows, generator, symmetric)))
        for _ in range(inner):
            pairing = torch.randperm(size, generator=generator).to(rows.device)
            turn = givens(_worst(rows @ product.to(rows.dtype)), _uniform(rows, generator, symmetric), pairing)
            product = turn.rows(product)
        return product

    return step


def duquant_step(generator: torch.Generator) -> Step:
    """The reflection that sends the largest coordinate's axis to (±1 .. ±1) / sqrt(B)."""

    def step(rows: Tensor) -> Tensor:
        eye = torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device)
        signs = torch.randint(0, 2, (rows.shape[1],), generator=generator).to(eye) * 2 - 1
        return reflect_rows(eye, reflection(eye[_worst(rows).abs().argmax()], signs))

    return step


def greedy_reflection(x: Tensor, generator: torch.Generator, form: RowFormat, tries: int = 16) -> Tensor | None:
    """v float64 [K] of the best of `tries` reflections, each from the worst row to a random u; None if none helps.

    Args:
        x: float [n, K].
    """
    rows = x.double()
    best, least = None, gsr_loss(rows, form)
    for _ in range(tries):
        v = reflection(_worst(rows), _uniform(rows, generator, form.symmetric))
        loss = gsr_loss(reflect_rows(rows, v), form)
        if loss < least:
            best, least = v, loss
    return best


def _worst(rows: Tensor) -> Tensor:
    """The row that holds the largest |entry|, float64."""
    least, most = rows.aminmax(dim=1)
    return rows[torch.maximum(most, -least).argmax()].double()


def _uniform(rows: Tensor, generator: torch.Generator, symmetric: bool) -> Tensor:
    u = torch.rand(rows.shape[1], generator=generator, dtype=torch.float64).to(rows.device)
    return 2 * u - 1 if symmetric else u
