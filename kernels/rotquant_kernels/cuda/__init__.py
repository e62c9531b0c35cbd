"""Kernels for CUDA devices, in Triton. A module maps the ops that it implements to functions in `IMPLEMENTATIONS`.

They take the place of the reference under torch's CUDA key, where torch is built for CUDA; elsewhere Triton is not
even imported. Whether there is a GPU is not asked: the answer would start CUDA in this process, and no process forked
from it could use a GPU any more.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import warnings
from importlib.util import find_spec
from unittest import mock

import torch

HUMMING = "humming"


def load(library: torch.library.Library) -> None:
    """Registers the kernels; warns where Triton is missing, since the plain-torch reference is far slower."""
    if torch.version.cuda is None:
        return
    if find_spec("triton") is not None:
        register(library)
        kernel_of("int_linear")  # a wrong ROTQUANT_CUDA_LINEAR is an error now, not in the first request
    elif gpu_is_there():
        warnings.warn(
            "rotquant's CUDA kernels need Triton, which is not installed: the plain-torch reference runs instead (the "
            "same numbers, many times slower). Install triton",
            RuntimeWarning,
            stacklevel=2,
        )


def gpu_is_there() -> bool:
    """`torch.cuda.is_available` by the driver's management library, which starts nothing in this process."""
    with mock.patch.dict(os.environ, PYTORCH_NVML_BASED_CUDA_CHECK="1"):
        return torch.cuda.is_available()


def register(library: torch.library.Library) -> None:
    """Registers every implementation for the CUDA key; imports Triton."""
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for op, function in getattr(module, "IMPLEMENTATIONS", {}).items():
            library.impl(op, function, "CUDA")


def offer_to_humming(
    weight: torch.Tensor, weight_scale: torch.Tensor, layer: tuple[int, int, int, int, bool, bool], low_rank: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, str]:  # fmt: skip
    """The prepared weight, with what Humming wants besides where it was asked for and runs the layer.

    Args:
        layer: the fields of `humming.Layer`.
    Returns:
        the weight; name of the kernel.
    """
    from rotquant_kernels.cuda import humming

    if not humming.chosen():
        return weight, kernel_of("quantized_linear")
    shape = humming.Layer(*layer)
    reason = humming.misfit(shape, weight_scale.shape[1], low_rank, dtype, humming.sm_of(weight.device))
    if reason:
        return weight, f"{kernel_of('quantized_linear')}, not humming: {reason}"
    return humming.with_scales(weight, weight_scale), HUMMING


def kernel_of(op: str) -> str:
    """Name of the kernel of `op`, for reports."""
    if op == "int_linear":
        from rotquant_kernels.cuda import humming

        return "humming, triton where it does not fit" if humming.chosen() else "triton (int8 tensor cores)"
    return "triton (int8 tensor cores)" if op == "quantized_linear" else "triton"


def stages() -> tuple[str, ...]:
    """Kinds of online transforms that have a kernel; they are registered."""
    from rotquant_kernels.cuda import rows

    return rows.STAGES
