"""New weights for a model that is being served: vLLM's `reload_weights`, its weight transfers, waking up from sleep.

vLLM takes every layer apart, loads it in the form of the checkpoint, processes it and copies the result into the old
tensors, which CUDA graphs go on reading. That expects one tensor of the layer for each of the checkpoint. Layers of
rotquant have other tensors, so they stay out of it and serve as they are until all is loaded:

    begin   each layer declares its tensors once more, on a bare module in main memory; the names of the checkpoint,
            which a layer keeps as `Entry`s, lead there
    end     is everything there? Then layer by layer through `prepare` into the old tensors; the proof runs again

In between, and after a reload that failed, the model refuses to run: its parts are of two checkpoints.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from rotquant.errors import RotQuantError
from vllm_rotquant import compat
from vllm_rotquant.collector import Collector
from vllm_rotquant.intake import check_filled, mark_unfilled
from vllm_rotquant.origin import Origin

# What differs from one quantization run to the next, or is no setting.
UNREAD = ("_name_or_path", "transformers_version", "rotquant.provenance")


class Reload:
    """Loads one model's quantized layers anew, any number of times."""

    def __init__(self, collector: Collector, check: Callable[[], None]) -> None:
        """`check` runs the proof on what was collected."""
        self.collector, self.check = collector, check
        self.staged: dict[Module, Module] = {}  # for each layer what it is loaded into
        self.unfilled: dict[str, Tensor] = {}  # what other modules of the model have yet to get
        self.model: Callable[[], Module | None] = lambda: None
        self.served = compat.origin()
        self.settings = settings_of(self.served())

    def install(self, model: Any) -> None:
        """Makes a loaded model, whose layers are collected, ready for a reload."""
        if not compat.can_be_reloaded(model):
            return
        self.model = weakref.ref(model)
        for layer in self.collector.linears:
            method = layer.quant_method
            for name in method.declared:
                give_entry(layer, name, self.entry(layer, name, f"{method.prefix}.{name}"))
            modules = [*layer.modules(), *([method.norm] if method.norm is not None else [])]
            for module in modules:
                compat.stays_out_of_reloads(module)
        compat.watch_reloads(model, self.begin, self.end)
        load_weights = model.load_weights

        def load(*arguments: Any, **more: Any) -> Any:
            return load_weights(*arguments, **more) if self.staged else refuse_outside("load_weights")

        model.load_weights = load

    def entry(self, layer: Module, name: str, where: str) -> Callable[..., None]:
        """vLLM's weight loader of a tensor of the checkpoint."""
        known = weakref.ref(layer)

        def load(parameter: Tensor, loaded: Tensor, *shard: Any, **more: Any) -> None:
            staged = self.staged.get(known())  # type: ignore[arg-type]
            if staged is None:
                refuse_outside(where)
            target = staged.get_parameter(name)
            target.weight_loader(target, loaded, *shard, **more)  # type: ignore[attr-defined]

        return load

    def begin(self) -> None:
        """Refuses another model than the one served, while that is still whole; then gets ready to load."""
        if self.collector.mixtures:
            raise RotQuantError(
                "reload_weights: this build of rotquant does not reload mixtures of experts; the old weights are still "
                "served. Start a server for the new checkpoint"
            )
        origin = self.served()
        differs = difference(self.settings, settings_of(origin))
        if differs:
            raise RotQuantError(
                f"reload_weights: {origin.model}: {differs} of config.json is not that of the model being served, "
                "and a reload changes weights only. The old weights are still served; start a server for the new "
                "checkpoint"
            )
        with torch.device("cpu"):
            for layer in self._layers(compat.LinearBase | compat.ParallelLMHead):
                self.staged[layer] = stage = Module()
                layer.quant_method.dummy = False
                layer.quant_method.declare(stage)
        self.block()
        model: Any = self.model()
        self.unfilled = mark_unfilled(model)

    def end(self) -> None:
        """Brings the new weights into service.

        Raises:
            RotQuantError: naming a tensor that was not loaded; or because the proof failed.
        """
        if not self.staged:
            return
        staged, self.staged = self.staged, {}
        unfilled, self.unfilled = self.unfilled, {}
        check_filled(unfilled)
        for layer, stage in staged.items():
            layer.quant_method.check_loaded(stage)  # type: ignore[operator,union-attr]
        with self.collector.again([*staged, *self._layers(compat.Attention)]):
            for layer in list(staged):
                self.collector.keep(layer, commit(layer, staged.pop(layer)))
            self.check()
        self.unblock()

    def _layers(self, kind: Any) -> list[Any]:
        model = self.model()
        modules = model.modules() if model is not None else ()
        return [m for m in modules if isinstance(m, kind) and _collector(m) is self.collector]

    def block(self) -> None:
        model: Any = self.model()
        model.forward = model.compute_logits = unfinished

    def unblock(self) -> None:
        model: Any = self.model()
        del model.forward, model.compute_logits


def refuse_outside(where: str) -> NoReturn:
    raise RotQuantError(
        f"{where}: rotquant's layers take new weights only in a reload, which ends with a check of them; the old "
        'weights are still served. Use `collective_rpc("reload_weights", ...)` or a weight transfer of vLLM\'s'
    )


def unfinished(*arguments: Any, **more: Any) -> NoReturn:
    raise RotQuantError(
        "a reload of this model's weights has not finished, so it is a mixture of two checkpoints: reload a whole "
        "checkpoint, or restart the server"
    )


def give_entry(layer: Module, name: str, loader: Callable[..., None]) -> None:
    """Lets vLLM find a tensor of the checkpoint by its name: at the tensor that serves, else at an empty one."""
    module, _, leaf = name.rpartition(".")
    if module:
        layer.add_module(module, Module())
    owner = layer.get_submodule(module)
    if getattr(owner, leaf, None) is None:
        owner.register_parameter(leaf, Parameter(torch.empty(0), requires_grad=False))
    owner.get_parameter(leaf).weight_loader = loader  # type: ignore[attr-defined]


def commit(layer: Any, stage: Any) -> Tensor:
    """Brings a layer's new weights into the form that serves and into the old tensors.

    Returns:
        The checkpoint's packed weights, int32 [N, words].
    """
    device = layer.weight_packed.device
    for parameter in stage.parameters():
        parameter.data = parameter.data.to(device)
    packed: Tensor = stage.weight_packed.data
    layer.quant_method.prepare(stage)
    for name, new in (*stage.named_parameters(), *stage.named_buffers()):
        getattr(layer, name).data.copy_(new.data)
    return packed


def _collector(layer: Any) -> Collector | None:
    return getattr(layer.quant_method, "collector", None)


def settings_of(origin: Origin) -> dict[str, Any]:
    """config.json of a model, whose files are here once it has been served."""
    folder = origin.folder()
    path = folder and folder / "config.json"
    return json.loads(path.read_text()) if path and path.is_file() else {}


def difference(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> str:
    """The first field in which two configurations differ, "" where none does."""
    for key in sorted({*ours, *theirs}):
        name, here, there = f"{prefix}{key}", ours.get(key), theirs.get(key)
        if name in UNREAD or here == there:
            continue
        both = isinstance(here, dict) and isinstance(there, dict)
        deeper = difference(here, there, f"{name}.") if both else name  # type: ignore[arg-type]
        if deeper:
            return deeper
    return ""
