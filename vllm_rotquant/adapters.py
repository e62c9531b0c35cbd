"""LoRA adapters: one of the original model is turned into the checkpoint's basis while vLLM loads it.

The arithmetic is `rotquant.basis.turn_adapter`'s. An adapter that was turned for this checkpoint is taken as it is, one
that was turned for another is refused, as is every adapter of a checkpoint that keeps no basis. vLLM slices and stacks
factors for its ranks and fused layers after that, as it does with any adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from rotquant.basis.peft_adapter import LoRAAdapter
from rotquant.basis.sidecar import Basis
from rotquant.basis.turn_adapter import turn
from rotquant.checkpoint.extension import read_extension
from rotquant.errors import RotQuantError
from vllm_rotquant import compat


def basis_of(vllm_config: Any) -> Basis:
    """The basis of the checkpoint that vLLM serves.

    Raises:
        RotQuantError: it has none, or not the one that config.json names.
    """
    config = vllm_config.model_config.hf_config
    stated = read_extension(getattr(config, "rotquant", None) or {}).basis
    return Basis.read(compat.origin_of(vllm_config).file(stated.file if stated else "config.json").parent, config)


def reader(vllm_config: Any) -> Callable[[Path, int], dict[str, Tensor]] | None:
    """How adapters of a model are read (see `compat.load_adapters_with`); None where it is not a rotquant model."""
    method = vllm_config.quant_config
    if method is None or method.get_name() != "rotquant":
        return None
    basis = cache(lambda: basis_of(vllm_config))

    def read(folder: Path, max_rank: int) -> dict[str, Tensor]:
        adapter = LoRAAdapter.read(folder, basis().arch)
        if adapter.rank > max_rank:
            raise RotQuantError(
                f"{folder}: this adapter has rank {adapter.rank}, and the server takes up to {max_rank}: serve with"
                f" --max-lora-rank {adapter.rank} or the next size that it offers"
            )
        how = "turned before" if adapter.basis else "an adapter of the original model, turned now"
        turned = turn(adapter, basis())
        compat.logger.info("LoRA adapter %s: %s", folder, how)
        return turned.scaled().tensors()

    return read
