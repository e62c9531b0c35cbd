"""vLLM's reload of the weights of a model that is being served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo


class _StaysOut(LayerReloadingInfo):
    """What vLLM knows about a module in a reload: taken apart already, nothing to process."""

    def can_load(self) -> bool:
        return True

    def reset(self) -> None:
        pass


def stays_out_of_reloads(module: torch.nn.Module) -> None:
    """Has vLLM's reload of weights pass over the module: its tensors stay and are loaded by their own loaders."""
    LAYERWISE_INFO[module] = _StaysOut(({}, {}), torch.device("cpu"), load_numel=1, load_numel_total=1)


def can_be_reloaded(model: torch.nn.Module) -> bool:
    """Whether vLLM knows how to load a model anew."""
    return model in LAYERWISE_INFO


def outermost(module: torch.nn.Module) -> torch.nn.Module | None:
    """The model that a module is part of: vLLM notes all modules of one, it first, before it loads them."""
    return next((model for model in LAYERWISE_INFO if any(part is module for part in model.modules())), None)


class _NanDevice(TorchFunctionMode):
    """Stands for the device on which vLLM makes the tensors of a module anew: what nobody fills holds NaN."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.empty_strided:
            return function(*args, **(kwargs or {}))
        made = function(*args, **{"device": self.device} | (kwargs or {}))
        return made.fill_(torch.nan) if made.is_floating_point() else made


def watch_reloads(model: torch.nn.Module, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Has vLLM call `begin` before it takes a model apart to reload its weights, and `end` when it is done.

    Tensors that vLLM makes anew in between hold NaN where nothing is loaded into them. It goes through all modules
    twice, the model itself first: to ask whether they are taken apart already, and to put them together, attention
    last.
    """

    class First(LayerReloadingInfo):
        def can_load(self) -> bool:
            if not super().can_load():
                begin()
            return super().can_load()

    class Last(LayerReloadingInfo):
        def reset(self) -> None:
            super().reset()
            end()

    for known in [LAYERWISE_INFO[module] for module in model.modules() if module in LAYERWISE_INFO]:
        known.restore_device = _NanDevice(known.restore_device)  # type: ignore[assignment]
    attention = [module for module in model.modules() if isinstance(module, AttentionLayerBase)]
    for module, kind in ((model, First), (attention[-1], Last)) if attention else ():
        known = LAYERWISE_INFO[module]
        LAYERWISE_INFO[module] = kind(known.restore_metadata, known.restore_device)
