"""The quantized layers of one model, from the first that is built to the last that is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from rotquant.checkpoint.format import LinearFormat
from vllm_rotquant import compat
from vllm_rotquant.holders import Holders
from vllm_rotquant.intake import Intake

Experts = tuple[Tensor, ...]  # packed and scales of gate and up, packed and scales of down


class KeptExperts(NamedTuple):
    """Weights of the checkpoint of some experts of a layer, by their numbers."""

    layer: Any
    weights: dict[int, Experts]


class Collector:
    """Layers say here that they are being built, and when they are ready to run."""

    def __init__(self, finish: Callable[[Any], None] = lambda _: None) -> None:
        """`finish` is called once, when all layers are ready, with the one that was so last."""
        self.finish = finish
        self.layers: list[Any] = []
        self.packed: dict[tuple[str, LinearFormat], tuple[Any, Tensor]] = {}
        self.mixtures: list[Any] = []  # the experts of a layer each; not among `layers`
        self.experts: KeptExperts | None = None  # of the first of them
        self.unquantized: set[str] = set()
        self.recurrent = 0  # layers of linear attention on this rank
        self.kv4 = False  # whether the checkpoint has a 4-bit KV cache
        self.intake = Intake()
        self.holders: Holders | None = None  # not before a layer: a worker gets this object as a pickle
        self.settings: Any = None  # vLLM's, of this model
        self.lora = False
        self.done = False
        self._pending: set[int] = set()

    @property
    def linears(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, compat.Attention)]

    @property
    def attention(self) -> list[Any]:
        return [layer for layer in self.layers if isinstance(layer, compat.Attention)]

    @property
    def dummy(self) -> bool:
        """Whether the layers hold random weights."""
        return any(layer.quant_method.dummy for layer in self.linears)

    def expect(self, layer: Any) -> None:
        """`layer` is being built and will be loaded."""
        if self.holders is None:
            self.holders, self.lora = Holders(self.intake.watch), compat.lora_is_on()
            self.settings = compat.model_settings()
        self.holders.expect(layer)
        self.layers.append(layer)
        self._pending.add(id(layer))

    def expect_experts(self, layer: Any, elsewhere: set[str]) -> None:
        """The experts of a layer are being built and will be loaded; attention is always there before them.

        elsewhere: how the names of tensors begin that other ranks take, each up to a dot.
        """
        assert self.holders is not None
        self.holders.expect(layer)
        self.mixtures.append(layer)
        self.intake.elsewhere |= elsewhere
        self._pending.add(id(layer))

    def keep_experts(self, layer: Any, weights: dict[int, Experts]) -> None:
        """Remembers weights of the checkpoint of some experts of the first mixture."""
        if self.experts is None and not self.done:
            self.experts = KeptExperts(
                layer, {expert: tuple(t.clone() for t in own) for expert, own in weights.items()}
            )

    def keep(self, layer: Any, packed: Tensor) -> None:
        """Remembers the checkpoint's packed weights, int32 [N, words], of the first layer of each sort."""
        key = sort_of(layer)
        if key not in self.packed and not self.done:
            self.packed[key] = (layer, packed.clone())

    def loaded(self, layer: Any) -> None:
        """`layer` is ready to run."""
        self._pending.discard(id(layer))
        if not self._pending and not self.done:
            self.done = True
            try:
                self.finish(layer)
            finally:
                self.layers, self.packed, self.holders, self.experts = [], {}, None, None

    @contextmanager
    def again(self, layers: list[Any]) -> Iterator[None]:
        """In this block the weights of `layers` are loaded anew, and kept by `keep`."""
        self.layers, self.done = layers, False
        try:
            yield
        finally:
            self.layers, self.packed, self.done = [], {}, True


def sort_of(layer: Any) -> tuple[str, LinearFormat]:
    """What linear layers of one line of the report have in common: all but the clip ratio."""
    return kind_of(layer), replace(layer.quant_method.format, rows=layer.quant_method.format.rows.clipped(1.0))


def kind_of(layer: Any) -> str:
    """Last part of the layer's name, such as qkv_proj; "attention" for the KV cache."""
    return "attention" if isinstance(layer, compat.Attention) else str(layer.quant_method.prefix).rpartition(".")[2]
