"""Online transforms of linear inputs: where they are legal, and the tensors that the checkpoint stores for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rotquant.checkpoint import stored
from rotquant.checkpoint.format import Transform
from rotquant.errors import RotQuantError
from rotquant_kernels import KINDS, Stage


def check_shard(prefix: str, transform: Transform, inputs: int, all_inputs: int) -> None:
    """Refuses a transform that mixes inputs of different ranks, or whose block does not divide the inputs.

    Args:
        inputs: width of the layer's input on this rank; all_inputs: on all ranks together.
    """
    stored.check_block(prefix, transform, all_inputs)
    span = transform.span(all_inputs)
    if inputs % span:
        raise RotQuantError(
            f"{prefix}: the online transform {transform} works on blocks of {span} inputs, which do not divide the "
            f"{inputs} inputs of a rank at --tensor-parallel-size {all_inputs // inputs}: use a smaller one, or "
            "quantize again with --tp-max"
        )


class StoredInput(torch.nn.Module):
    """Receives the tensor `<module>.<transform>_input.weight` while a checkpoint loads, and keeps this rank's part.

    The tensor of a kind without one is only a marker, there to make engines fail that do not know the transform: it is
    checked and not kept.
    """

    def __init__(self, where: str, transform: Transform, all_inputs: int, span: slice, parts: int) -> None:
        """`span`: inputs of this rank; `parts`: layers of the checkpoint that vLLM runs as this one."""
        super().__init__()
        self.where, self.transform, self.all_inputs, self.span, self.parts = where, transform, all_inputs, span, parts
        self.is_marker = KINDS[transform.kind].dtype is None
        self.tensor: Tensor | None = None
        self.loaded = 0
        # Empty until loaded: a large model has a marker in one layer and should not pay for all of them.
        self.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, parameter: Tensor, loaded: Tensor, shard: Any = None) -> None:
        """vLLM's weight loader; called once for each part of a fused layer."""
        tensor = stored.check(self.where, self.transform, loaded.detach().cpu(), self.all_inputs)
        tensor = stored.shard(self.transform, tensor, self.span.start, self.span.stop)
        if self.is_marker:
            return
        if self.tensor is not None and not torch.equal(self.tensor, tensor):
            raise RotQuantError(f"{self.where}: the parts of this fused layer store different tensors")
        self.tensor = tensor.clone()  # `loaded` may be a view into a file that vLLM closes
        self.loaded += 1

    def take(self, dummy: bool) -> Tensor | None:
        """The tensor on the CPU, None for a kind without one; a random one under --load-format dummy."""
        if dummy:
            return stored.sample(self.transform, self.span.stop - self.span.start)
        if not self.is_marker and self.loaded != self.parts:
            raise RotQuantError(
                f"{self.where} is missing from the checkpoint ({self.parts - self.loaded} of {self.parts} parts)"
            )
        return self.tensor


def expect_tensors(
    layer: torch.nn.Module, prefix: str, transforms: tuple[Transform, ...], all_inputs: int, span: slice,
    outputs: int, pieces: int, loader: Any,
) -> None:  # fmt: skip
    """Makes `layer` accept the tensors of its transforms from the checkpoint.

    Args:
        span: inputs of this rank; outputs: on this rank.
        pieces: layers of the checkpoint that vLLM runs as this one.
        loader: vLLM's own weight loader of the layer.
    """
    from vllm_rotquant import compat  # imports vLLM, which the rest of this module does not need

    for transform in transforms:
        name = f"{transform.name}_input"
        receiver = StoredInput(f"{prefix}.{name}.weight", transform, all_inputs, span, pieces)
        layer.add_module(name, receiver)
        if KINDS[transform.kind].affine:
            # NaN shows after loading which outputs the checkpoint did not fill.
            data = torch.full((outputs,), torch.nan, dtype=torch.float32)
            output = torch.nn.Module()
            output.weight = compat.ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
            layer.add_module(f"{transform.name}_output", output)


def check_loaded(layer: Any, prefix: str, transforms: tuple[Transform, ...], dummy: bool) -> None:
    """Refuses tensors of transforms that the checkpoint left out."""
    for transform in transforms:
        receiver_of(layer, transform).take(dummy)
        if KINDS[transform.kind].affine:
            name = f"{transform.name}_output.weight"
            if layer.get_parameter(name).isnan().any():
                raise RotQuantError(f"{prefix}.{name} is missing from the checkpoint, or has NaN in it")


def take_tensors(
    layer: torch.nn.Module, transforms: tuple[Transform, ...], device: torch.device, dummy: bool
) -> Tensor | None:
    """Turns the loaded tensors into the buffers that `stages` reads and removes the receivers.

    Returns:
        What affine stages took away, to be added to the layer's output: float32 [N], None without one.
    """
    correction: Tensor | None = None
    for transform in transforms:
        tensor = receiver_of(layer, transform).take(dummy)
        delattr(layer, f"{transform.name}_input")
        layer.register_buffer(buffer_name(transform), None if tensor is None else tensor.to(device), persistent=False)
        if KINDS[transform.kind].affine:
            output = layer.get_parameter(f"{transform.name}_output.weight").data.to(device)
            correction = output if correction is None else correction + output
            delattr(layer, f"{transform.name}_output")
    return correction


def receiver_of(layer: torch.nn.Module, transform: Transform) -> StoredInput:
    receiver = layer.get_submodule(f"{transform.name}_input")
    assert isinstance(receiver, StoredInput)
    return receiver


def buffer_name(transform: Transform) -> str:
    return f"online_{transform.name}"


def stages(layer: torch.nn.Module, transforms: tuple[Transform, ...]) -> list[Stage]:
    """The loaded chain as `rotquant_kernels.linear` wants it."""
    return [Stage(t.kind, t.block, getattr(layer, buffer_name(t))) for t in transforms]
