"""A linear layer of a transformers model on packed integer weights, with its online transforms and low-rank branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rotquant.checkpoint import stored
from rotquant.checkpoint.format import LinearFormat, Transform
from rotquant.errors import RotQuantError
from rotquant_kernels import KINDS, Stage, linear, online, ops
from rotquant_kernels.backends import Layer


class StoredInput(nn.Module):
    """The tensor of an online transform, in a module of its own because its name is `<transform>_input.weight`.

    `weight` is on the meta device until it is loaded, None for a kind without one.
    """

    weight: Tensor | None

    def __init__(self, transform: Transform, inputs: int) -> None:
        super().__init__()
        self.transform, self.inputs = transform, inputs
        dtype, shape = KINDS[transform.kind].dtype, stored.shape(transform, inputs)
        self.register_buffer("weight", None if dtype is None else torch.empty(shape, dtype=dtype, device="meta"))

    def load(self, where: str, tensor: Tensor, device: torch.device) -> None:
        """Takes the tensor of the checkpoint; one that no kind needs is only checked."""
        checked = stored.check(where, self.transform, tensor, self.inputs)
        self.weight = None if self.weight is None else checked.to(device)


class QuantLinear(nn.Module):
    """A linear layer on packed integer weights; the forward is the op that is served.

    Buffers: weight_packed int32 [N, ceil(K * bits / 32)] until `prepare`, then the layout of the device's
    kernel; weight_scale float32 [N, G], bias [N] or None (with affine stages' corrections after `prepare`),
    low_rank_down [K, r] and low_rank_up [r, N] in the model's dtype or None. Modules: `<transform>_input`, and
    `<transform>_output` of an affine stage.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    low_rank_down: Tensor | None
    low_rank_up: Tensor | None

    def __init__(self, name: str, layer: nn.Linear, layer_format: LinearFormat) -> None:
        super().__init__()
        self.name, self.format = name, layer_format
        self.in_features, self.out_features = inputs, outputs = layer.in_features, layer.out_features
        weights = layer_format.weights
        size = weights.group_size or inputs
        if inputs % size:
            raise RotQuantError(f"config.json: {name}: {inputs} inputs in quantization groups of {size}")

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        rank, dtype = layer_format.rank, layer.weight.dtype
        self.dtype = dtype  # of the rows that it is given
        self.register_buffer("weight_packed", empty(torch.int32, outputs, weights.words(inputs)))
        self.register_buffer("weight_scale", empty(torch.float32, outputs, inputs // size))
        self.register_buffer("bias", None if layer.bias is None else empty(layer.bias.dtype, outputs))
        self.register_buffer("low_rank_down", empty(dtype, inputs, rank) if rank else None)
        self.register_buffer("low_rank_up", empty(dtype, rank, outputs) if rank else None)
        for transform in layer_format.transforms:
            stored.check_block(name, transform, inputs)
            self.add_module(f"{transform.name}_input", StoredInput(transform, inputs))
            if KINDS[transform.kind].affine:
                correction = nn.Module()
                correction.register_buffer("weight", empty(torch.float32, outputs))
                self.add_module(f"{transform.name}_output", correction)

    def prepare(self) -> None:
        """Brings the loaded weights into the kernel's layout and adds what affine stages took away to the bias.

        Raises:
            RotQuantError: a weight that the kernels of its device do not read.
        """
        f, bias = self.format, self.bias is not None or any(KINDS[t.kind].affine for t in self.format.transforms)
        dtype = torch.float32 if online.split(self.stages)[0] else self.dtype
        layer = Layer(self.out_features, self.in_features, f.weights, f.rows, bias, bool(f.rank), dtype)
        try:
            self.weight_packed = ops.prepare_linear(self.weight_packed, self.weight_scale, layer).weight
        except ValueError as error:  # what the kernels of this device do not read
            raise RotQuantError(f"{self.name}: {error}") from None
        for transform in self.format.transforms:
            if KINDS[transform.kind].affine:
                correction = self.get_buffer(f"{transform.name}_output.weight")
                self.bias = correction if self.bias is None else self.bias + correction

    @property
    def stages(self) -> list[Stage]:
        """The online transforms in front of it."""
        return [Stage(t.kind, t.block, getattr(self, f"{t.name}_input").weight) for t in self.format.transforms]

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., K] to [..., N] of the same dtype."""
        f = self.format
        return linear(
            x, self.weight_packed, self.weight_scale, self.bias, f.weights, self.stages, f.rows,
            self.low_rank_down, self.low_rank_up, low_rank_subtracts=f.subtracts,
        )  # fmt: skip
