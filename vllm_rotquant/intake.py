"""Whether a model took what the checkpoint holds: every tensor, and for each of its own parameters one.

vLLM's models skip a tensor that they have no place for (a bias of a layer that is built without one), and a parameter
that no tensor came for keeps whatever memory held; neither is said. So the model's `load_weights` is watched, whatever
loader calls it: a tensor that no operation read was dropped, and a parameter that is still NaN was not filled. In a
reload (`reload`) the latter is seen at its end, which several calls may lead to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rotquant.checkpoint.content import check_content
from rotquant.errors import RotQuantError
from vllm_rotquant import compat

# Tables that old checkpoints carry and every reader computes itself.
COMPUTED = ("rotary_emb.inv_freq",)

Weights = Iterable[tuple[str, Tensor]]


class Intake:
    """Watches the `load_weights` of the modules that it is told of, which are around the layers of one model."""

    def __init__(self) -> None:
        self.seen = False  # whether a model has been loaded
        self.elsewhere: set[str] = set()  # how the names of tensors begin that other ranks take, each up to a dot
        self._active = False

    def watch(self, holder: torch.nn.Module) -> None:
        """`holder` is part of the model that is being built."""
        if callable(getattr(type(holder), "load_weights", None)):
            watched: Any = holder
            watched.load_weights = self._watching(weakref.ref(holder))

    def _watching(self, holder: weakref.ref[Any]) -> Any:
        def load_weights(*args: Any, **more: Any) -> Any:
            return self._watched(holder(), *args, **more)

        return load_weights

    def _watched(self, model: Any, weights: Weights, *args: Any, **more: Any) -> Any:
        """The model's `load_weights`; only the outermost one is watched, which gets the checkpoint's own names."""
        load = type(model).load_weights
        if self._active:
            return load(model, weights, *args, **more)
        watch, self._active = Watch(model, self.elsewhere), True
        try:
            unfilled = {} if self.seen else mark_unfilled(model)
            loaded = watch.run(lambda passed: load(model, passed, *args, **more), weights)
        finally:
            self._active = False
        self.seen = True
        watch.finish()
        check_filled(unfilled)
        return loaded


class Watch(TorchDispatchMode):
    """One pass over a checkpoint: hands its tensors on and notes which of them some operation reads."""

    def __init__(self, model: torch.nn.Module, elsewhere: Collection[str] = ()) -> None:
        super().__init__()
        self.model, self.elsewhere = model, elsewhere
        self.names: set[str] = set()
        self.current = ""
        # Kept until they are read, so that their memory is not used for another tensor.
        self.untouched: dict[str, Tensor] = {}
        self.shapes: dict[str, list[int]] = {}
        self.declared: dict[str, list[int]] = {}  # content of each weight_shape, by the layer's name

    def run(self, load: Callable[[Weights], Any], weights: Weights) -> Any:
        try:
            with self:
                return load(self._handed_on(weights))
        except (RotQuantError, torch.OutOfMemoryError):
            raise
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if not self.current:  # it failed before, or between two tensors
                raise
            reason = " ".join(str(error).split()) or "its shape is not the one that config.json asks for"
            what = f"tensor {self.current} {self.shapes[self.current]}"
            raise RotQuantError(f"{what} does not fit the model that config.json describes: {reason}") from error

    def _handed_on(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in readable(weights):
            if name in self.names:
                raise RotQuantError(f"tensor {name} comes twice from the checkpoint's files; one of them is wrong")
            self.names.add(name)
            if not name.endswith(COMPUTED) and not self._on_another_rank(name):
                check_content(f"tensor {name}", name, tensor)
                if tensor.numel():
                    self.untouched[name] = tensor
                if name.endswith(".weight_shape"):
                    self.declared[name.removesuffix(".weight_shape")] = tensor.tolist()
            self.current, self.shapes[name] = name, list(tensor.shape)
            yield name, tensor
            self.current = ""

    def _on_another_rank(self, name: str) -> bool:
        dots = [i for i, letter in enumerate(name) if letter == "."] if self.elsewhere else []
        return in_another_stage(self.model, name) or any(name[: dot + 1] in self.elsewhere for dot in dots)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.untouched:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and not value.is_meta:
                    self._touch(value)
        return op(*args, **(kwargs or {}))

    def _touch(self, value: Tensor) -> None:
        for name, tensor in list(self.untouched.items()):
            start = tensor.data_ptr()
            if tensor.device == value.device and start <= value.data_ptr() < start + tensor.nbytes:
                del self.untouched[name]

    def finish(self) -> None:
        """Refuses what was handed on and never read, and packed weights whose `weight_shape` is another."""
        for layer, shape in self.declared.items():
            if f"{layer}.weight_packed" not in self.shapes:
                continue  # its layer says so
            rows, words = self.shapes[f"{layer}.weight_packed"]
            if len(shape) != 2 or shape[0] != rows or words not in (-(-shape[1] * bits // 32) for bits in (4, 8)):
                packed = f"{rows} rows of {words} words"
                raise RotQuantError(f"tensor {layer}.weight_shape is {shape}, but weight_packed has {packed}")
        dropped = sorted(self.untouched)
        self.untouched = {}
        if dropped:
            more = f" and {len(dropped) - 1} more" if len(dropped) > 1 else ""
            raise RotQuantError(
                f"tensor {dropped[0]}{more} of the checkpoint was not taken: vLLM's {type(self.model).__name__} has no "
                "place for it, so what it serves would not be what was quantized and measured"
            )


def readable(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """`weights`; a file that cannot be read ends it in one line."""
    try:
        yield from weights
    except SafetensorError as error:
        raise RotQuantError(f"a safetensors file of the checkpoint is truncated or not one ({error})") from error


def in_another_stage(model: torch.nn.Module, name: str) -> bool:
    """Whether a tensor belongs to a module that another pipeline stage holds."""
    module: Any = model
    for part in name.split("."):
        module = getattr(module, "_modules", {}).get(part)
        if module is None:
            return False
        if isinstance(module, compat.MISSING_LAYERS):
            return True
    return False


def mark_unfilled(model: torch.nn.Module) -> dict[str, Tensor]:
    """Fills what a checkpoint holds for the model itself with NaN and returns it by name, in the order of its layers.

    These are its parameters and the buffers that it would save. Not those that the method of their layer declared,
    which checks them itself, nor those of attention layers: scales of another KV cache, which checkpoints may leave
    out.
    """
    found: dict[str, Tensor] = {}
    checked: set[str] = set()
    with torch.no_grad():
        for name, module in model.named_modules():
            method = getattr(module, "quant_method", None)
            checked.update(f"{name}.{leaf}" for leaf in getattr(method, "declared", ()))
            if isinstance(module, compat.Attention):
                continue
            buffers = {leaf: t for leaf, t in module._buffers.items() if leaf not in module._non_persistent_buffers_set}
            for leaf, tensor in (module._parameters | buffers).items():
                whole = f"{name}.{leaf}" if name else leaf
                if tensor is not None and tensor.is_floating_point() and tensor.numel() and whole not in checked:
                    tensor.fill_(torch.nan)
                    found[whole] = tensor
    return found


def check_filled(unfilled: dict[str, Tensor]) -> None:
    """Refuses what still holds NaN of `mark_unfilled`."""
    for name, tensor in unfilled.items():
        if tensor.isnan().any():
            raise RotQuantError(f"{name} is missing from the checkpoint; vLLM's model has this tensor")
