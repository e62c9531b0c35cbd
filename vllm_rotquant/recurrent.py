"""Linear attention, which is vLLM's own: what its kernels do not run, before a first request ends the server."""

from __future__ import annotations

from typing import Any

import torch

from rotquant.errors import RotQuantError
from vllm_rotquant import compat


def check_recurrent(layers: int, dtype: torch.dtype) -> None:
    """Refuses what vLLM's linear attention does not run on CPUs.

    Args:
        layers: of linear attention on this rank; dtype: of the model.
    Raises:
        RotQuantError: naming the flag.
    """
    if not layers or not compat.on_cpu():
        return
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise RotQuantError(f"--dtype {name}: vLLM's linear attention runs in bfloat16 only on CPUs: --dtype bfloat16")


def count_recurrent(modules: list[Any]) -> int:
    """Layers of linear attention among the modules around quantized layers."""
    return sum(map(compat.is_recurrent, modules))
