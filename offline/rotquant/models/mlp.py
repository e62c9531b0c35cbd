"""Gated MLPs, alone and as experts that a router chooses from: what a layer of them is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class GatedMLP:
    """down(act(gate x) up x)."""

    norm: str
    gate: str
    up: str
    down: str
    width: int  # of what is between
    activation: str  # as transformers names it

    @property
    def gated(self) -> tuple[GatedMLP, ...]:
        """The gated MLPs that a block is made of."""
        return (self,)

    @property
    def full_precision(self) -> tuple[str, ...]:
        """Linears of a block that read its norm and are not quantized."""
        return ()


@dataclass(frozen=True)
class Experts:
    """Of the gated MLPs ("experts") the `top_k` that a router chooses for a token, each times its weight, added up.

    p = softmax(router x); the weights are the chosen p, divided by their sum where `normed`. Where there is a `shared`
    expert every token passes through it too, times sigmoid(shared_gate x) where that is there.

    Files hold experts one by one, `<files>.experts.<j>.<gate>.weight`, or all of them in two tensors, as transformers'
    model does: `experts.gate_up_proj` [count, 2 width, hidden] and `experts.down_proj` [count, hidden, width].
    """

    norm: str
    module: str  # of transformers' model
    files: str  # what files call that module
    gate: str  # of an expert, less what stands before it
    up: str
    down: str
    count: int
    top_k: int
    width: int
    activation: str
    normed: bool
    shared: GatedMLP | None = None
    shared_gate: str | None = None

    @property
    def router(self) -> str:
        return f"{self.files}.gate"

    @cached_property
    def routed(self) -> tuple[GatedMLP, ...]:
        """The experts in their order."""
        first = f"{self.files}.experts"
        return tuple(
            GatedMLP(
                self.norm, f"{first}.{j}.{self.gate}", f"{first}.{j}.{self.up}", f"{first}.{j}.{self.down}",
                self.width, self.activation,
            )
            for j in range(self.count)
        )  # fmt: skip

    @property
    def gated(self) -> tuple[GatedMLP, ...]:
        return (*((self.shared,) if self.shared else ()), *self.routed)

    @property
    def full_precision(self) -> tuple[str, ...]:
        return (self.router, *((self.shared_gate,) if self.shared_gate else ()))
