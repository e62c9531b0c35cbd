"""Joins what vLLM's models run in front of a linear layer with the op of that layer, once a model is loaded.

    SiLU and product in front of down_proj      act_fn hands [gate, up] on; the layer's op begins with silu(gate) * up
    RMSNorm in front of qkv_proj, gate_up_proj  the norm adds the residual and quantizes, in one launch, and hands on
                                                (codes, scale, zero); the layer multiplies

The integers of a norm travel as a tuple in the place of the hidden states. The models only pass those on, so a tuple
reaches the layer whether they run eagerly or are traced by torch.compile (vLLM's own QuantizedActivation goes the same
way); its tensors keep their dtypes, their alignment and their rows. That needs modules whose forward is known, which
`compat` lists; any other model, LoRA (which reads the layer's floating-point input), a low-rank branch behind a norm
and transforms other than one shift keep the separate ops: the same numbers, more launches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rotquant.checkpoint.format import LinearFormat
from rotquant_kernels import calls, online
from vllm_rotquant import compat, rotation
from vllm_rotquant.holders import Holders


class QuantizingNorm(torch.nn.Module):
    """An RMSNorm that quantizes for the linear layer behind it; keeps the name of the norm's weight."""

    def __init__(self, norm: Any, linear: LinearFormat, shift: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon
        self.rows, self.shift = linear.rows, shift

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """(codes, scale, zero) of norm(x + residual) - shift, see `ops.rms_norm_quantize`; x + residual, if given."""
        quantized, stream = calls.norm_quantize(x, residual, self.weight, self.eps, self.rows, self.shift)
        return quantized if residual is None else (quantized, stream)


def fuse(layers: Iterable[Any], holders: Holders) -> None:
    """Joins where it can; sets `silu_mul` or `norm` of a layer's method.

    Args:
        layers: loaded linear layers of rotquant.
    """
    norms = 0
    for layer in layers:
        method, holder = layer.quant_method, holders.of(layer)
        decoder = holders.of(holder)
        stages = rotation.stages(layer, method.format.transforms)
        if compat.silu_mul_before(layer, holder) and not online.split(stages)[0]:
            holder.act_fn, method.silu_mul = torch.nn.Identity(), True
        name = compat.norm_before(layer, decoder)
        shifts = [stage.tensor for stage in stages if stage.kind == "shift"]
        alone = len(stages) == len(shifts) <= 1
        if name and alone and not method.format.rank and method.backend.reads_quantized:
            method.norm = QuantizingNorm(getattr(decoder, name), method.format, *shifts)
            setattr(decoder, name, method.norm)
            norms += 1
    if norms:  # it depends on the kernels in use, which vLLM does not know
        compat.tell_compiled_graphs_apart("rotquant_norms", norms)
