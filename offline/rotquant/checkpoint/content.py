"""What a tensor of a checkpoint may hold, whoever reads it: its dtype by its name, finite numbers, positive scales."""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant.errors import RotQuantError
from rotquant_kernels.stages import KINDS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BY_LEAF = {"weight_packed": (torch.int32,), "weight_shape": (torch.int64, torch.int32)}
TRANSFORM_SUFFIX = "_input.weight"  # see `stored`
OF_TRANSFORMS = FLOATS + tuple({kind.dtype for kind in KINDS.values() if kind.dtype} - set(FLOATS))


def check_content(where: str, name: str, tensor: Tensor) -> None:
    """Refuses a tensor that cannot be what its name says.

    Args:
        where: file and name, for the message; name: in the checkpoint.
    Raises:
        RotQuantError: another dtype, a NaN or infinite value, a scale that is not positive.
    """
    leaf = name.rpartition(".")[2]
    allowed = BY_LEAF.get(leaf, OF_TRANSFORMS if name.endswith(TRANSFORM_SUFFIX) else FLOATS)
    if tensor.dtype not in allowed:
        raise RotQuantError(f"{where} has dtype {tensor.dtype}, expected {' or '.join(map(str, allowed))}")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise RotQuantError(f"{where} holds NaN or infinite values")
    if leaf == "weight_scale" and not (tensor > 0).all():
        raise RotQuantError(f"{where} holds a scale that is not positive")
