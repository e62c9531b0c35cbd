"""How a mixture of experts computes: which experts a token goes to, and what they add up to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from rotquant.models.mlp import Experts, GatedMLP

Linear = Callable[[str, Tensor], Tensor]


class Routing(NamedTuple):
    """For each of N tokens the experts that it goes to, int64 [N, top_k], and their weights, float32 [N, top_k]."""

    chosen: Tensor
    weights: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens that go to an expert, and its weight for each of them."""
        tokens, place = (self.chosen == expert).nonzero(as_tuple=True)
        return tokens, self.weights[tokens, place]


def route(block: Experts, logits: Tensor, chosen: Tensor | None = None) -> Routing:
    """The experts of each token.

    Args:
        logits: of the router, [N, count]; chosen: int64 [N, top_k] where the choice is given.
    """
    p = logits.float().softmax(-1)
    chosen = p.topk(block.top_k, dim=-1).indices if chosen is None else chosen
    weights = p.gather(-1, chosen)
    return Routing(chosen, weights / weights.sum(-1, keepdim=True) if block.normed else weights)


def agreement(one: Tensor, other: Tensor) -> float:
    """The share of the experts [T, top_k] that one router chooses which are among those of another."""
    return (one[:, :, None] == other[:, None, :]).any(-1).double().mean().item()


def inner(mlp: GatedMLP, x: Tensor, linear: Linear) -> Tensor:
    """act(gate x) up x, the input of a gated MLP's last linear."""
    gated: Tensor = ACT2FN[mlp.activation](linear(mlp.gate, x))
    return gated * linear(mlp.up, x)


def shared_output(block: Experts, x: Tensor, linear: Linear) -> Tensor | None:
    """What the shared expert adds for rows [N, hidden]; None where there is none."""
    if block.shared is None:
        return None
    out = linear(block.shared.down, inner(block.shared, x, linear))
    if block.shared_gate is None:
        return out
    return out * linear(block.shared_gate, x).sigmoid()


def mixture(block: Experts, x: Tensor, linear: Linear, chosen: Tensor | None = None) -> Tensor:
    """What the block adds to the residual stream, one expert after the other.

    Args:
        x: [..., hidden]; chosen: see `route`, its N the product of x's other dimensions.
    """
    rows = x.flatten(0, -2)
    routing = route(block, linear(block.router, rows), chosen)
    out = torch.zeros_like(rows, dtype=torch.float32)
    for index, expert in enumerate(block.routed):
        tokens, weights = routing.of(index)
        if len(tokens):
            y = linear(expert.down, inner(expert, rows[tokens], linear))
            out = out.index_add(0, tokens, y.float() * weights[:, None])
    shared = shared_output(block, rows, linear)
    out = out if shared is None else out + shared.float()
    return out.to(x.dtype).view(x.shape)
