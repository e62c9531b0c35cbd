"""Which module holds which while a model is built.

vLLM gives a quantization method its layer and nothing of the model around it. torch reports every module that becomes
part of another, and so the way from a layer up to its model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules.module import register_module_module_registration_hook


class Holders:
    """Notes from now on what holds what, until it is stopped or nobody needs the answer any more."""

    def __init__(self, found: Callable[[Module], None] = lambda _: None) -> None:
        """`found` is called with each module that turns out to be around an expected layer."""
        holders: weakref.WeakKeyDictionary[Module, weakref.ref[Module]] = weakref.WeakKeyDictionary()
        around: weakref.WeakSet[Module] = weakref.WeakSet()
        self._holders, self._around = holders, around

        def note(holder: Module, name: str, held: Module | None) -> None:
            if held is None:
                return
            holders[held] = weakref.ref(holder)
            if held in around and holder not in around:
                around.add(holder)
                found(holder)

        # Also when nobody stops it: a model that was refused while it was built.
        self.stop = weakref.finalize(self, register_module_module_registration_hook(note).remove)

    def expect(self, layer: Module) -> None:
        """`layer` is being built; what will hold it belongs to `around`."""
        self._around.add(layer)

    def around(self) -> list[Any]:
        """The expected layers and all modules that hold them."""
        return list(self._around)

    def of(self, module: Module | None) -> Any:
        """The module that holds `module`, or None."""
        holder = None if module is None else self._holders.get(module)
        return holder and holder()

    def outermost(self, module: torch.nn.Module) -> Any:
        """The whole model that `module` is in."""
        while (holder := self.of(module)) is not None:
            module = holder
        return module
