"""Tensors of online transforms as a checkpoint stores them, `<module>.<name>_input.weight`: shape, content, shards.

    hadamard     none; a file may hold the matrix, so that engines which ignore transforms meet an unknown tensor
    dense        T float [block, block]
    kronecker    P then Q, float [(K / block)² + block²]
    permutation  p int32 [K], each index once and within its own block
    reflection   v float [block], of length 1, or 0 for none
    shift        b float [K]; and `<module>.<name>_output.weight`, W b of the weight before quantization, float [N]

Written by `stored_stage`; one reader, `check`, for `rotquant.load` and the vLLM plugin. K is the layer's whole input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant.checkpoint.format import Transform
from rotquant.errors import RotQuantError
from rotquant_kernels import Stage
from rotquant_kernels.reference import hadamard

UNIT = 0.01  # how far a reflection's v may be from length 1: bfloat16 rounds by less


def shape(transform: Transform, inputs: int) -> tuple[int, ...]:
    """Shape of the stored tensor (of the optional one for "hadamard") in a layer with K = inputs."""
    block = transform.block
    if transform.kind in ("hadamard", "dense"):
        return (block, block)
    if transform.kind == "kronecker":
        return ((inputs // block) ** 2 + block**2,)
    return (block,) if transform.kind == "reflection" else (inputs,)


def stored_stage(stage: Stage) -> Tensor:
    """A stage's tensor as the checkpoint stores it: indices int32, a transform in full float32 precision."""
    assert stage.tensor is not None
    return stage.tensor.to(torch.int32 if stage.kind == "permutation" else torch.float32).contiguous()


def check_block(layer: str, transform: Transform, inputs: int) -> None:
    """Refuses a block that does not divide the layer's inputs."""
    if transform.block and inputs % transform.block:
        raise RotQuantError(f"config.json: {layer}: {inputs} inputs in transform blocks of {transform.block}")


def check(where: str, transform: Transform, tensor: Tensor, inputs: int) -> Tensor:
    """The tensor as the ops want it: float32, or int32 for a permutation, contiguous.

    Args:
        where: the tensor's name, and its file where it is known.
    Raises:
        RotQuantError: another shape or dtype than config.json asks for, or a content that cannot be right.
    """
    expected = shape(transform, inputs)
    if tuple(tensor.shape) != expected:
        raise RotQuantError(f"{where} has shape {list(tensor.shape)}, config.json asks for {list(expected)}")
    if transform.kind == "permutation":
        if tensor.dtype != torch.int32:
            raise RotQuantError(f"{where} has dtype {tensor.dtype}, expected {torch.int32}")
        blocks = tensor.long().view(-1, transform.span(inputs))
        if not torch.equal(blocks.sort(dim=1).values, torch.arange(inputs, device=tensor.device).view(blocks.shape)):
            raise RotQuantError(f"{where} is not a permutation within blocks of {blocks.shape[1]}")
        return tensor.contiguous()
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise RotQuantError(f"{where} is not a tensor of finite real numbers")
    length = float(tensor.float().norm())
    if transform.kind == "reflection" and length and abs(length - 1) > UNIT:  # length 0 reflects nothing
        raise RotQuantError(f"{where} has length {length:.3f}, a reflection's must be 1")
    if transform.kind == "hadamard" and not _is_hadamard(tensor, transform.block):
        raise RotQuantError(f"{where} is not the Hadamard matrix that config.json declares")
    return tensor.float().contiguous()


def _is_hadamard(tensor: Tensor, block: int) -> bool:
    true = hadamard(torch.eye(block, dtype=torch.float32, device="cpu"), block)  # vLLM changes the default dtype
    return torch.allclose(tensor.float().cpu(), true, rtol=torch.finfo(tensor.dtype).eps, atol=0)


def shard(transform: Transform, tensor: Tensor, start: int, stop: int) -> Tensor:
    """What the rank with inputs start to stop runs; both are multiples of the transform's span.

    Args:
        tensor: as `check` returns it.
    """
    if transform.kind == "shift":
        return tensor[start:stop].contiguous()
    return tensor[start:stop] - start if transform.kind == "permutation" else tensor


def sample(transform: Transform, inputs: int) -> Tensor | None:
    """A random tensor that `check` accepts and that about keeps the size of rows; None for "hadamard"."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cpu", dtype=torch.float32)

    block = transform.block
    if transform.kind == "dense":
        return normal(block, block) * block**-0.5
    if transform.kind == "kronecker":
        outer = inputs // block
        return torch.cat((normal(outer * outer) * outer**-0.5, normal(block * block) * block**-0.5))
    if transform.kind == "permutation":
        span = transform.span(inputs)
        first = torch.arange(0, inputs, span, device="cpu")[:, None]
        return (normal(inputs // span, span).argsort(1) + first).flatten().int()
    if transform.kind == "reflection":
        return torch.nn.functional.normalize(normal(block), dim=0)
    return normal(inputs) if transform.kind == "shift" else None
