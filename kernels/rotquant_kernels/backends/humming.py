"""Humming's GEMM in front of Triton's, for the layers that it runs, where it is installed and ROTQUANT_CUDA_LINEAR
does not forbid it."""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant_kernels.backends.backend import Layer
from rotquant_kernels.backends.triton import Triton


class Humming(Triton):
    name = "humming"
    reads_quantized = False  # it wants the codes in an order of its own
    takes_any = False

    def has(self, op: str) -> bool:
        """Raises ValueError where the choice is unknown or Humming is not there."""
        if op != "int_linear" or not super().has(op):
            return False
        from rotquant_kernels.cuda import humming

        return humming.chosen()

    def kernel(self, op: str) -> str:
        return self.name

    def misfit(self, layer: Layer, device: torch.device) -> str:
        from rotquant_kernels.cuda import humming

        shape = humming.Layer(
            layer.channels, layer.columns, layer.weights.bits, layer.rows.bits, layer.rows.symmetric, layer.bias
        )
        groups = layer.weights.groups(layer.columns)
        return humming.misfit(shape, groups, layer.low_rank, layer.dtype, humming.sm_of(device))

    def prepare(self, packed: Tensor, weight_scale: Tensor, layer: Layer) -> Tensor:
        """Triton's layout, and behind it the scales in Humming's order."""
        from rotquant_kernels.cuda import humming

        return humming.with_scales(super().prepare(packed, weight_scale, layer), weight_scale)
