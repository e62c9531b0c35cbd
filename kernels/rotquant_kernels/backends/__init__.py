"""Who runs the ops: the backends of each type of device, the one that is preferred first. `backend` is the contract.

A backend is a file here and a place in one of these lists. The last of a list is the specification: it runs where
nothing else does, never in the place of a backend that is there and refuses.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from rotquant_kernels.backends.backend import Backend, Layer
from rotquant_kernels.backends.humming import Humming
from rotquant_kernels.backends.native import Native
from rotquant_kernels.backends.reference import Reference
from rotquant_kernels.backends.triton import Triton
from rotquant_kernels.stages import KINDS

__all__ = ["BACKENDS", "REFERENCE", "Backend", "Layer", "backend_of", "backends_of", "choose", "kernel_of", "stages_of"]

REFERENCE = Reference()
# By type of device; the same as in `backend.KEYS`.
BACKENDS: dict[str, tuple[Backend, ...]] = {
    "cpu": (Native(), REFERENCE),
    "cuda": (Humming(), Triton(), REFERENCE),
}


def backends_of(device: str | torch.device) -> tuple[Backend, ...]:
    """Those of a device, whatever they run.

    Raises:
        ValueError: a type of device that rotquant has no kernels for.
    """
    kind = torch.device(device).type
    if kind not in BACKENDS:
        raise ValueError(f"rotquant has no kernels for the device {kind!r}: it runs on {' and '.join(BACKENDS)}")
    return BACKENDS[kind]


def backend_of(op: str, device: str | torch.device = "cpu") -> Backend:
    """The backend that runs an op on anything that the op takes."""
    return next(backend for backend in backends_of(device) if backend.takes_any and backend.has(op))


def choose(layer: Layer, device: torch.device) -> tuple[Backend, str]:
    """The backend that runs a linear layer, and what is to be reported of it: its kernel, and who else was asked.

    Raises:
        ValueError: the device has backends, and none of them runs the layer.
    """
    refused: list[tuple[str, str]] = []
    for backend in backends_of(device):
        if not backend.has("int_linear"):
            continue
        if refused and backend is REFERENCE:
            raise ValueError(refused[-1][1])
        if why := backend.misfit(layer, device):
            refused.append((backend.name, why))
            continue
        return backend, ", ".join([backend.kernel("int_linear"), *(f"not {name}: {why}" for name, why in refused)])
    raise AssertionError("the specification runs every layer")


def kernel_of(op: str, device: str | torch.device = "cpu") -> str:
    """What runs an op on a device, for reports: a backend's kernel, or that of one that is asked first and the name of
    the one that runs the rest. Of `online_stage`, whose kinds need not have one kernel, each kernel and its kinds."""
    if op == "online_stage":
        found = stages_of(KINDS, device)
        return "; ".join(name if len(found) == 1 else f"{name} for {', '.join(kinds)}" for name, kinds in found.items())
    last = backend_of(op, device)
    first = [b.kernel(op) for b in backends_of(device) if b is not last and not b.takes_any and b.has(op)]
    return f"{first[0]}, {last.name} where it does not fit" if first else last.kernel(op)


def stages_of(kinds: Iterable[str], device: str | torch.device = "cpu") -> dict[str, list[str]]:
    """What `online_stage` runs for kinds of online transforms: the kinds by the name of their kernel."""
    backend = backend_of("online_stage", device)
    found: dict[str, list[str]] = {}
    for kind in dict.fromkeys(kinds):
        runs = backend if kind in backend.stages() else REFERENCE
        found.setdefault(runs.kernel("online_stage"), []).append(kind)
    return found
