"""Optimisers over rotations: parameters are orthogonal matrices [..., d, d] and stay so.

With G the gradient at X, the tangent part of a matrix M is P(M) = (M - X Mᵀ X) / 2, which is X times a skew matrix.

    CayleySGD      M ← β M - G;  A = (M Xᵀ - X Mᵀ) / 2;  X ← (I - t/2 A)⁻¹ (I + t/2 A) X;  M ← A X
                   (Li et al., arXiv 2002.01113; SpinQuant's optimiser)
    StiefelAdam    Adam on tangent vectors, moments carried along by projection, X ← qr(X - step)
                   (RiemannianAdam, Bécigneul and Ganea, arXiv 1810.00760; OSTQuant's optimiser)
    QROrth         R = Q of Z = Q U, diag(U) > 0: any optimiser on Z (DartQuant)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rotquant.errors import RotQuantError
from rotquant.learn.procrustes import Batches, Weights
from rotquant.learn.steps import ALONE, Loop, Steps

Objective = Callable[..., Tensor]
OPTIMISERS = ("adam", "qr")


class CayleySGD(torch.optim.Optimizer):
    """SGD with momentum along Cayley's curve.

    For square X SpinQuant's Ŵ = M Xᵀ - X (Xᵀ M Xᵀ) / 2 is M Xᵀ / 2. Its code approaches the curve's point by five
    fixed-point steps; here the linear system is solved, so a step of any length is a rotation.

    Args:
        lr: largest step t; t = min(lr, 1 / |A|₁) as in SpinQuant, |A|₁ the largest column sum.
    """

    def __init__(self, params: Any, lr: float = 1.5, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = _evaluate(closure)
        for group, x, gradient in _parameters(self):
            state = self.state[x]
            momentum = state.get("momentum", torch.zeros_like(x)) * group["momentum"] - gradient
            a = momentum @ x.mT
            a = (a - a.mT) / 2
            limit = 1 / a.abs().sum(-2).amax(-1).clamp(min=torch.finfo(x.dtype).tiny)
            half = 0.5 * limit.clamp(max=group["lr"])[..., None, None] * a
            eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
            state["momentum"] = a @ x
            x.copy_(polish(torch.linalg.solve(eye - half, (eye + half) @ x)))
        return loss


class StiefelAdam(torch.optim.Optimizer):
    """Adam on the orthogonal group.

    The second moment is one number a matrix, |P(G)|²_F / d, because entries of a tangent matrix are not coordinates
    of their own: so lr is the angle, in radians, by which columns turn in a step, whatever the width. (geoopt takes
    |P(G)|²_F: its lr is sqrt(d) times ours.)
    """

    def __init__(
        self, params: Any, lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-12
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = _evaluate(closure)
        for group, x, gradient in _parameters(self):
            state, (beta1, beta2) = self.state[x], group["betas"]
            if not state:
                state.update(step=0, first=torch.zeros_like(x), second=torch.zeros_like(x[..., :1, :1]))
            state["step"] += 1
            gradient = tangent(x, gradient)
            state["first"].lerp_(gradient, 1 - beta1)
            state["second"].lerp_(gradient.square().sum((-2, -1), keepdim=True) / x.shape[-1], 1 - beta2)
            size = (state["second"] / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
            moved = x - group["lr"] / (1 - beta1 ** state["step"]) * state["first"] / size
            x.copy_(qr_rotation(moved))
            state["first"] = tangent(x, state["first"])
        return loss


class QROrth(torch.nn.Module):
    """The rotation R = Q(Z), Z free; gradients go through the QR decomposition.

    Args:
        rotation: first R [d, d]; Z starts there, as qr(R) = R I.
    """

    def __init__(self, rotation: Tensor) -> None:
        super().__init__()
        self.z = torch.nn.Parameter(rotation.clone())

    def forward(self) -> Tensor:
        return qr_rotation(self.z)


def qr_rotation(matrix: Tensor) -> Tensor:
    """Q [..., d, d] of matrix = Q U with diag(U) > 0, which makes it unique and continuous."""
    q, u = torch.linalg.qr(matrix)
    signs = torch.where(u.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q)
    return q * signs.unsqueeze(-2)


def tangent(x: Tensor, matrix: Tensor) -> Tensor:
    """(M - X Mᵀ X) / 2: the part of M along which X stays orthogonal."""
    return (matrix - x @ matrix.mT @ x) / 2


def polish(x: Tensor) -> Tensor:
    """One Newton step (3 X - X Xᵀ X) / 2 to the nearest rotation: rounding does not add up over many steps."""
    return 1.5 * x - 0.5 * x @ (x.mT @ x)


def learn_rotation(
    batches: Batches,
    objective: Objective,
    rotation: Tensor,
    optimiser: str = "qr",
    steps: int = 200,
    lr: float = 0.01,
    weights: Weights | None = None,
    loop: Loop = ALONE,
) -> tuple[Tensor, list[float]]:
    """Learns R by gradients of an objective of the rows x R: no backpropagation through the model.

    Args:
        batches: gives the rows as float tensors [n, d] each time it is called; one step a batch, over and over.
        objective: of rows [n, d] and `weights=` [n] or None, to a scalar: `whip`, `kurtosis`,
            `partial(quantization_error, bits=4, symmetric=True)`.
        rotation: first R [d, d], orthogonal; its dtype is that of the computation.
        optimiser: "adam" (`StiefelAdam`; lr: radians a step, near 0.05) or "qr" (Adam on Z of `QROrth`; lr: change of
            an entry a step, near 0.2 / sqrt(d)).
        lr: at the first step; falls to 0 as half a cosine.
        weights, loop: as in `procrustes.alternate`.
    Returns:
        R float64 [d, d], and the loss of each step that was run.
    Raises:
        RotQuantError: an unknown optimiser, or batches without any rows.
    """
    if optimiser not in OPTIMISERS:
        raise RotQuantError(f"unknown optimiser {optimiser!r}: take one of {', '.join(OPTIMISERS)}")
    model = QROrth(rotation)
    engine: torch.optim.Optimizer
    if optimiser == "adam":
        engine = StiefelAdam(model.parameters(), lr=lr)
    else:
        engine = torch.optim.Adam(model.parameters(), lr=lr)
    run, losses = Steps(steps, [engine], loop.slot), []
    for x, _ in zip(islice(_forever(batches), run.done, None), run, strict=False):
        x = x.to(rotation)
        r = model() if optimiser == "qr" else model.z
        loss = objective(x @ r, weights=weights(x) if weights is not None else None)
        loss.backward()
        run.advance()
        losses.append(loss.item())
        loop.report(f"loss {losses[-1]:.4f}")
    with torch.no_grad():
        return qr_rotation(model.z.double()), losses


def _forever(batches: Batches) -> Iterator[Tensor]:
    while True:
        empty = True
        for x in batches():
            empty = False
            yield x
        if empty:
            raise RotQuantError("no calibration rows to learn a rotation from")


def _evaluate(closure: Any) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _parameters(optimiser: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
    for group in optimiser.param_groups:
        for x in group["params"]:
            if x.grad is not None:
                yield group, x, x.grad
