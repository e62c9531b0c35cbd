"""A layer's tensors with those of its experts left where they are until they are asked for: one expert in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from rotquant.models.layer import Layer, Tensors
from rotquant.models.mlp import Experts

Change = Callable[[Tensors], Tensors]


class ExpertTensors(dict[str, Tensor]):
    """The tensors of a layer by name. As a dict it holds those outside its routed experts; those of an expert are made
    when one is asked for, and kept until another expert's is.

    Args:
        others: all other tensors; kind: the layer; make: an expert's tensors by its number, under their full names.
    """

    def __init__(self, others: Tensors, kind: Layer, make: Callable[[int], Tensors]) -> None:
        super().__init__(others)
        assert isinstance(kind.mlp, Experts)
        self.kind, self.make = kind, make
        names = ((j, name) for j, m in enumerate(kind.mlp.routed) for name in (m.gate, m.up, m.down))
        self.owner = {f"{name}.weight": j for j, name in names}
        self.held: tuple[int, Tensors] = (-1, {})

    def __missing__(self, name: str) -> Tensor:
        if name not in self.owner:
            raise KeyError(name)
        return self.expert(self.owner[name])[name]

    def expert(self, index: int) -> Tensors:
        """The tensors of one expert."""
        if self.held[0] != index:
            self.held = -1, {}  # before the next are made
            self.held = index, self.make(index)
        return self.held[1]

    def changed(self, change: Change) -> ExpertTensors:
        """The tensors after a change that works on any part of a layer's tensors, its norms among them."""
        known = {name: self[name] for name in self.kind.gains if name in self}
        before = self.make  # and nothing else of self, whose tensors shall not stay

        def make(index: int) -> Tensors:
            own = before(index)
            made = change(known | own)
            return {name: made[name] for name in own}

        return ExpertTensors(change(dict(self)), self.kind, make)


def whole(tensors: Tensors) -> Tensors:
    """All tensors of a layer in memory."""
    if not isinstance(tensors, ExpertTensors):
        return tensors
    return {**tensors, **{name: tensors[name] for name in tensors.owner}}


def by_expert(function: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """A function of a layer's tensors, and more; of `ExpertTensors` it changes an expert's when they are asked for."""

    @functools.wraps(function)
    def by_parts(tensors: Tensors, *args: Any) -> Tensors:
        if isinstance(tensors, ExpertTensors):
            return tensors.changed(lambda part: function(part, *args))
        return function(tensors, *args)

    return by_parts


@by_expert
def each(tensors: Tensors, change: Callable[[Tensor], Tensor]) -> Tensors:
    """The tensors of a layer, each after a change of its own, such as `Tensor.float`."""
    return {name: change(tensor) for name, tensor in tensors.items()}
