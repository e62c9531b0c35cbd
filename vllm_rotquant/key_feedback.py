"""F of keys with error feedback (`rotquant_kernels.formats.feedback`), as vLLM's layers hold it.

The checkpoint keeps it beside the linear that makes keys, [KV heads * d, d], which is how vLLM shards that linear: a
rank has the rows of its KV heads, and neighbours share a head where there are more ranks than heads. Attention reads it
there, so that new weights for the linear (`reload`) are new feedback for its keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from rotquant.errors import RotQuantError
from vllm_rotquant.low_rank import QKV, expect_shape, output_shard

NAME = "key_feedback"


class Keys(NamedTuple):
    """What a linear makes: heads of the whole model, and channels of each."""

    heads: int
    size: int


def expect(layer: torch.nn.Module, prefix: str, keys: Keys | None, parts: list[int]) -> None:
    """Makes `layer` accept F from the checkpoint, if it makes keys.

    Args:
        keys: None where it makes none; parts: outputs on this rank of the linears that this one holds, q, k and v or k
            alone.
    """
    if keys is None:
        return
    rows = parts[QKV["k"] % len(parts)]
    data = torch.full((rows, keys.size), torch.nan, dtype=torch.float32)  # NaN shows what the checkpoint did not fill
    layer.register_parameter(NAME, Parameter(data, requires_grad=False))
    loader = partial(_load, f"{prefix}.{NAME}", keys)
    layer.get_parameter(NAME).weight_loader = loader  # type: ignore[attr-defined]


def _load(where: str, keys: Keys, parameter: Tensor, loaded: Tensor, shard: Any = None) -> None:
    """vLLM's weight loader; `shard` is "k", or None of a linear that the checkpoint holds in one piece."""
    expect_shape(where, loaded, [keys.heads * keys.size, keys.size])
    own, _ = output_shard(len(loaded), len(parameter))
    parameter.data.copy_(loaded[own])


def check_loaded(layer: Any, prefix: str) -> None:
    """Refuses F that the checkpoint left out, in part or as a whole."""
    found = getattr(layer, NAME, None)
    if found is not None and not found.isfinite().all():
        raise RotQuantError(f"{prefix}.{NAME} is missing from the checkpoint, or holds NaN or infinite values")


def of(layer: Any) -> Tensor:
    """F float32 [KV heads of this rank, d, d] of a linear that makes keys."""
    found: Tensor = getattr(layer, NAME).data
    return found.unflatten(0, (-1, found.shape[1]))
