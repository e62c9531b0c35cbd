"""Tensors of online transforms as a checkpoint stores them: shape, content, shards.

`<module>.<name>_input.weight` is the tensor of a stage; `rotquant_kernels.stages` says what it holds. Of a kind without
one a file may have a marker there, which is only checked. `<module>.<name>_output.weight`, float [N], is what an affine
stage takes from the outputs, W b of the weight before quantization. K is the layer's whole input.

Written by `stored_stage`; one reader, `check`, for `rotquant.load` and the vLLM plugin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant.checkpoint.format import Transform
from rotquant.errors import RotQuantError
from rotquant_kernels.stages import KINDS, Stage


def shape(transform: Transform, inputs: int) -> tuple[int, ...]:
    """Shape of the stored tensor (of the marker, for a kind without one) in a layer with K = inputs."""
    return KINDS[transform.kind].shape(transform.block, inputs)


def stored_stage(stage: Stage) -> Tensor:
    """A stage's tensor as the checkpoint stores it, in its kind's dtype."""
    return stage.held.to(KINDS[stage.kind].dtype).contiguous()


def check_block(layer: str, transform: Transform, inputs: int) -> None:
    """Refuses a block that does not divide the layer's inputs."""
    if transform.block and inputs % transform.block:
        raise RotQuantError(f"config.json: {layer}: {inputs} inputs in transform blocks of {transform.block}")


def check(where: str, transform: Transform, tensor: Tensor, inputs: int) -> Tensor:
    """The tensor as the ops want it: in its kind's dtype, contiguous.

    Args:
        where: the tensor's name, and its file where it is known.
    Raises:
        RotQuantError: another shape or dtype than config.json asks for, or a content that cannot be right.
    """
    expected, kind = shape(transform, inputs), KINDS[transform.kind]
    if tuple(tensor.shape) != expected:
        raise RotQuantError(f"{where} has shape {list(tensor.shape)}, config.json asks for {list(expected)}")
    if fault := kind.fault(tensor, transform.block, inputs):
        raise RotQuantError(f"{where} {fault}")
    return tensor.to(kind.dtype or tensor.dtype).contiguous()


def shard(transform: Transform, tensor: Tensor, start: int, stop: int) -> Tensor:
    """What the rank with inputs start to stop runs; both are multiples of the transform's span.

    Args:
        tensor: as `check` returns it.
    """
    return KINDS[transform.kind].shard(tensor, start, stop)


def sample(transform: Transform, inputs: int) -> Tensor | None:
    """A random tensor that `check` accepts and that about keeps the size of rows; None for a kind without one."""
    return KINDS[transform.kind].sample(transform.block, inputs, torch.Generator("cpu").manual_seed(0))
