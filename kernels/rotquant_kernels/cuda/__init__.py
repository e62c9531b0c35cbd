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

from rotquant_kernels.backends import kernel_of
from rotquant_kernels.backends.backend import KEYS


def load(library: torch.library.Library) -> None:
    """Registers the kernels; warns where Triton is missing, since the plain-torch reference is far slower."""
    if torch.version.cuda is None:
        return
    if find_spec("triton") is not None:
        register(library)
        kernel_of("int_linear", "cuda")  # a wrong ROTQUANT_CUDA_LINEAR is an error now, not in the first request
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
            library.impl(op, function, KEYS["cuda"])
