"""Kernels for CUDA devices, in Triton. A module maps the ops that it implements to functions in `IMPLEMENTATIONS`.

They take the place of the reference under torch's CUDA key, where torch can see such a device; elsewhere Triton is not
even imported.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from importlib.util import find_spec

import torch


def load(library: torch.library.Library) -> None:
    """Registers the kernels; warns where Triton is missing, since the plain-torch reference is far slower."""
    if not torch.cuda.is_available():
        return
    if find_spec("triton") is None:
        warnings.warn(
            "rotquant's CUDA kernels need Triton, which is not installed: the plain-torch reference runs instead (the "
            "same numbers, many times slower). Install triton",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    register(library)
    kernel_of("int_linear")  # a wrong ROTQUANT_CUDA_LINEAR is an error now, not in the first request


def register(library: torch.library.Library) -> None:
    """Registers every implementation for the CUDA key; imports Triton."""
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for op, function in getattr(module, "IMPLEMENTATIONS", {}).items():
            library.impl(op, function, "CUDA")


def kernel_of(op: str) -> str:
    """Name of the kernel of `op`, for reports."""
    if op == "int_linear":
        from rotquant_kernels.cuda import humming

        return "humming, triton where it does not fit" if humming.chosen() else "triton (int8 tensor cores)"
    return "triton (int8 tensor cores)" if op == "quantized_linear" else "triton"
