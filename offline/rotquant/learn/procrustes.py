"""Rotations by alternation: a target for every row, then the rotation that fits all targets best.

    T_t = target(x_t R)                       where row t should be: `targets`
    R   = U Vᵀ,  U S Vᵀ = Σ_t w_t x_tᵀ T_t    the orthogonal R that minimises Σ w_t |x_t R - T_t|² (Schönemann 1966)

A pass over the rows accumulates one d x d matrix: no activations are kept, whatever the number of tokens.
DFRot is this with quantized targets; FRTQ rows of equal weight and clipped targets with a falling κ; ConQuR corners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from rotquant.learn.steps import ALONE, Loop
from rotquant.learn.targets import clipped_target

Batches = Callable[[], Iterable[Tensor]]
Target = Callable[[Tensor], Tensor]
Weights = Callable[[Tensor], Tensor]
PATIENCE = 5


def alternate(
    batches: Batches,
    rotation: Tensor,
    targets: Sequence[Target],
    weights: Weights | None = None,
    tolerance: float = 1e-5,
    loop: Loop = ALONE,
) -> tuple[Tensor, list[float]]:
    """Learns a rotation.

    Args:
        batches: gives, each time it is called, the same rows x as float tensors [n, d], on any device.
        rotation: the first R, [d, d]; orthogonal.
        targets: one for each iteration, so `[corner_target] * 25`, or `annealed_clip(25) + [quantized_target] * 5`.
        weights: row weights [n] of x [n, d], as `token_weights` gives; None for 1.
        tolerance: a target whose loss did not fall below its lowest by this share within the last PATIENCE iterations
            is done: its other iterations are skipped. (Quantized targets' losses go up and down.)
        loop: for snapshots and reports; a resumed run gives the same rotation and losses.
    Returns:
        R float64 [d, d] on rotation's device, and of each iteration run Σ w_t |x_t R - T_t|² / Σ w_t |x_t|² before
        its update. Losses of different targets do not compare.
    """
    rotation = rotation.double()
    known: list[float] = []
    if loop.slot and loop.slot.found:
        rotation, known = loop.slot.found["rotation"].to(rotation), loop.slot.found["losses"].tolist()
    losses: list[float] = []
    previous: Target | None = None
    lowest, stale = float("inf"), 0
    for target in targets:
        if target is not previous:
            previous, lowest, stale = target, float("inf"), 0
        if stale >= PATIENCE:
            continue
        if len(losses) < len(known):
            loss = known[len(losses)]
        else:
            moment, loss = _moment(batches, rotation, target, weights)
            rotation = nearest_rotation(moment)
            if loop.slot:
                loop.slot.save(len(losses) + 1, partial(_snapshot, rotation, [*losses, loss]))
            loop.report(f"loss {loss:.4f}")
        losses.append(loss)
        stale = 0 if loss < lowest * (1 - tolerance) else stale + 1
        lowest = min(lowest, loss)
    return rotation, losses


def _snapshot(rotation: Tensor, losses: Sequence[float]) -> dict[str, Tensor]:
    return {"rotation": rotation.cpu(), "losses": torch.tensor(losses, dtype=torch.float64)}


def _moment(batches: Batches, rotation: Tensor, target: Target, weights: Weights | None) -> tuple[Tensor, float]:
    """Σ w_t x_tᵀ T_t, float64 [d, d], and the loss."""
    moment = torch.zeros_like(rotation)
    error = energy = torch.zeros((), dtype=torch.float64)
    for x in batches():
        x = x if x.dtype == torch.float64 else x.float()
        y = x @ rotation.to(x)
        goal = target(y)
        w = weights(x).unsqueeze(-1) if weights is not None else torch.ones((), dtype=x.dtype, device=x.device)
        error = error + ((y - goal).square() * w).sum(dtype=torch.float64).cpu()
        energy = energy + (x.square() * w).sum(dtype=torch.float64).cpu()
        moment += (x.mT @ (goal * w)).to(moment)
    return moment, (error / energy).item()


def nearest_rotation(matrix: Tensor) -> Tensor:
    """U Vᵀ of matrix = U S Vᵀ, float64 [d, d]: the orthogonal matrix nearest to it."""
    u, _, vt = torch.linalg.svd(matrix.double())
    return u @ vt


def annealed_clip(iterations: int, start: float = 3.2, end: float = 1.9, symmetric: bool = True) -> list[Target]:
    """`clipped_target` with κ from start to end in equal steps."""
    kappas = torch.linspace(start, end, iterations).tolist()
    return [partial(clipped_target, kappa=kappa, symmetric=symmetric) for kappa in kappas]


def massive_tokens(x: Tensor, share: float = 0.9, channels: int = 4) -> Tensor:
    """Tokens whose `channels` largest entries hold more than `share` of the energy: bool [n] of x [n, d], unrotated.

    DFRot marks rows with |x - Q4(x)| < 8.5 before rotation, at d = 4096 behind RMSNorm, where |x| = 64. The scale of
    such a row is so large that all but its few massive entries become 0: the error is what these do not hold,
    1 - share < 8.5² / 64², a share of 0.98. Said of the share, the rule fits rows of any size and width; 0.9 also
    takes tokens that are less extreme. Massive activations live in one to four channels, where Gaussian rows of 32,
    64 and 4096 hold 0.5, 0.3 and 0.01 of their energy.
    """
    square = x.square()
    top = square.topk(min(channels, x.shape[-1]), dim=-1).values.sum(-1)
    return top > share * square.sum(-1)


def token_weights(x: Tensor, gamma: float) -> Tensor:
    """Row weights [n] for x [n, d]: gamma² for massive tokens (DFRot takes gamma = 100), 1 for the others."""
    weights = torch.ones(x.shape[0], dtype=x.dtype, device=x.device)
    weights[massive_tokens(x)] = gamma**2
    return weights
