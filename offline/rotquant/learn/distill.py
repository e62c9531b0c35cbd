"""KL of the original's next-token distribution to a student's, from hidden states, a few rows of logits at a time.

    loss = mean over tokens of Σ_i p_i (log p_i - log q_i),   p = softmax(t Wᵀ),  q = softmax(x Wᵀ)
    d loss / dx = mean of (q - p) W

Logits of a large vocabulary are the largest arrays of a small model. They live for ROWS tokens, in the dtype of
products: each product lays the head out anew. In float32 they live for as many tokens as the processor's cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rotquant.models.decoder import capped

ROWS = 512
CACHED = 1 << 18  # logits of these tokens


def divergence(student: Tensor, teacher: Tensor, head: Tensor, cap: float | None = None) -> Tensor:
    """The loss above, a float32 scalar.

    Args:
        student: x, float32 [n, hidden], with gradients; teacher: t [n, hidden] and head: W [vocab, hidden], in the
            dtype of products; cap: of the logits (`decoder.capped`).
    """
    loss: Tensor = _Divergence.apply(student, teacher, head, cap)
    return loss


def routing_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of the KL of two routers' probabilities, a float32 scalar.

    Args:
        student: logits [n, experts], with gradients; teacher: logarithms of probabilities [n, experts].
    """
    wanted = teacher.to(student)
    return (wanted.exp() * (wanted - student.log_softmax(-1))).sum(-1).mean()


@torch.no_grad()
def token_kl(student: Tensor, teacher: Tensor, head: Tensor, cap: float | None = None) -> Tensor:
    """The loss of each token, float32 [n]."""
    found = []
    for x, t in zip(student.split(ROWS), teacher.split(ROWS), strict=True):
        both = x.to(head.dtype) @ head.mT, t @ head.mT
        found += [(log_p.exp() * (log_p - log_q)).sum(-1) for _, log_q, log_p in _cached(*both, cap)]
    return torch.cat(found)


def _cached(student: Tensor, teacher: Tensor, cap: float | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of some tokens at a time: student's logits before the cap, and log q and log p, float32, of logits [n, vocab]."""
    rows = max(1, CACHED // student.shape[1])
    for z, y in zip(student.split(rows), teacher.split(rows), strict=True):
        yield z, *(capped(logits.float(), cap).log_softmax(-1) for logits in (z, y))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Tensor, cap: float | None) -> Tensor:
        total, grads = student.new_zeros(()), []
        for x, t in zip(student.split(ROWS), teacher.split(ROWS), strict=True):
            logits = x.to(head.dtype) @ head.mT
            for z, log_q, log_p in _cached(logits, t @ head.mT, cap):
                p = log_p.exp()
                total += (p * log_p.sub_(log_q)).sum()
                slope = log_q.exp_().sub_(p)
                z.copy_(slope if cap is None else slope * (1 - (z.float() / cap).tanh().square()))  # tanh' = 1 - tanh²
            grads.append((logits @ head).float())
        ctx.save_for_backward(torch.cat(grads).div_(len(student)))
        return total / len(student)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0], None, None, None
