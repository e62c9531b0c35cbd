"""The ops as torch sees them: schemas, fakes, dispatch. `torch.ops.rotquant.*` and thin Python names.

The reference is registered for every device (CompositeExplicitAutograd). A kernel of a backend registers the same
schema for its own dispatch key and so wins; `backends` tells which one runs.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from rotquant_kernels import cuda, native, reference
from rotquant_kernels.backends import Backend, Layer, choose
from rotquant_kernels.backends import kernel_of as kernel_of

OPS = {
    "online_stage": "(Tensor x, str kind, int block, Tensor? tensor) -> Tensor",
    "quantize_rows": "(Tensor x, str transform, int block, Tensor? matrix, int bits, bool symmetric, float clip,"
    " bool silu_mul=False) -> (Tensor, Tensor, Tensor)",
    "pack_weight": "(Tensor packed, int bits, int columns, int groups) -> Tensor",
    "int_linear": "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, int weight_bits, str transform,"
    " int block, Tensor? matrix, int act_bits, bool act_symmetric, float act_clip,"
    " Tensor? low_rank_down=None, Tensor? low_rank_up=None, bool silu_mul=False,"
    " bool low_rank_subtracts=False) -> Tensor",
    "rms_norm_quantize": "(Tensor x, Tensor? residual, Tensor weight, float eps, int bits, bool symmetric,"
    " float clip, Tensor? shift=None) -> (Tensor, Tensor, Tensor, Tensor)",
    "quantized_linear": "(Tensor codes, Tensor scale, Tensor zero, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " int weight_bits, bool act_symmetric, ScalarType dtype) -> Tensor",
    "moe_experts": "(Tensor x, Tensor chosen, Tensor weights, Tensor? expert_map, Tensor up, Tensor up_scale,"
    " Tensor down, Tensor down_scale, int weight_bits, int block, int act_bits, bool act_symmetric, float up_clip,"
    " float down_clip) -> Tensor",
    "kv4_write": "(Tensor key, Tensor value, Tensor(a!) cache, Tensor slots, int rotate, bool symmetric,"
    " float k_clip, float v_clip, Tensor? key_feedback=None) -> ()",
    "kv4_attention": "(Tensor query, Tensor cache, Tensor query_start, Tensor seq_lens, Tensor block_table,"
    " Tensor(a!) out, float scale, int rotate, bool symmetric, int window=0, float cap=0.0) -> ()",
}

_library = torch.library.Library("rotquant", "DEF")
SPECIFICATION = {name: getattr(reference, name) for name in OPS}
for _name, _schema in OPS.items():
    _library.define(_name + _schema)
    _library.impl(_name, SPECIFICATION[_name], "CompositeExplicitAutograd")
# What a native `online_stage` calls for kinds that it has no kernel of.
_library.define("reference_stage" + OPS["online_stage"])
_library.impl("reference_stage", reference.online_stage, "CompositeExplicitAutograd")
native.choose(os.environ.get(native.TIER) or "auto", SPECIFICATION)  # a wrong one is an error now, not when it is used
cuda.load(_library)


@torch.library.register_fake("rotquant::online_stage", lib=_library)
def _(x: Tensor, kind: str, block: int, tensor: Tensor | None) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


def _quantized(x: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty codes, scales and zero points of the rows of x."""
    rows = x.shape[:-1]
    return (
        x.new_empty((*rows, columns), dtype=torch.int8),
        x.new_empty((*rows, 1), dtype=torch.float32),
        x.new_empty((*rows, 1), dtype=torch.int32),
    )


@torch.library.register_fake("rotquant::quantize_rows", lib=_library)
def _(
    x: Tensor,
    transform: str,
    block: int,
    matrix: Tensor | None,
    bits: int,
    symmetric: bool,
    clip: float,
    silu_mul: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return _quantized(x, x.shape[-1] // 2 if silu_mul else x.shape[-1])


@torch.library.register_fake("rotquant::rms_norm_quantize", lib=_library)
def _(x: Tensor, *settings: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_quantized(x, x.shape[-1]), x.new_empty(x.shape)


@torch.library.register_fake("rotquant::quantized_linear", lib=_library)
def _(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    act_symmetric: bool,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((codes.shape[0], weight_scale.shape[0]), dtype=dtype)


@torch.library.register_fake("rotquant::int_linear", lib=_library)
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, *settings: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


@torch.library.register_fake("rotquant::moe_experts", lib=_library)
def _(x: Tensor, *settings: object) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("rotquant::kv4_write", lib=_library)
def _(*arguments: object) -> None:
    return None


@torch.library.register_fake("rotquant::kv4_attention", lib=_library)
def _(*arguments: object) -> None:
    return None


online_stage = torch.ops.rotquant.online_stage
quantize_rows = torch.ops.rotquant.quantize_rows
pack_weight = torch.ops.rotquant.pack_weight
int_linear = torch.ops.rotquant.int_linear
rms_norm_quantize = torch.ops.rotquant.rms_norm_quantize
quantized_linear = torch.ops.rotquant.quantized_linear
moe_experts = torch.ops.rotquant.moe_experts
kv4_write = torch.ops.rotquant.kv4_write
kv4_attention = torch.ops.rotquant.kv4_attention


def prepare_weight(packed: Tensor, bits: int, columns: int, groups: int = 1) -> Tensor:
    """The layout that `int_linear` of this device reads, from the checkpoint's `weight_packed`.

    Args:
        packed: int32 [N, ceil(columns * bits / 32)], see `convention.pack_int32`.
        groups: scales of a row, 1 for one scale per channel.
    Returns:
        On the CPU's native kernels uint8 [bytes], in panels of 64 channels; on CUDA int32 [words], in chunks of 16
        bytes (`cuda.layout`); else a copy of `packed`.
    """
    return pack_weight(packed.contiguous(), bits, columns, groups)


def prepare_experts(packed: Tensor, bits: int, columns: int, groups: int = 1) -> Tensor:
    """The layout that `moe_experts` of this device reads: each expert's as `prepare_weight` makes it.

    Args:
        packed: int32 [E, N, ceil(columns * bits / 32)]; groups: scales of a row.
    Returns:
        [E, ...].
    """
    return pack_weight(packed.contiguous(), bits, columns, groups)


class Prepared(NamedTuple):
    """A linear layer's weight as its kernel reads it, who runs it, and how reports name that."""

    weight: Tensor
    backend: Backend
    kernel: str


def prepare_linear(packed: Tensor, weight_scale: Tensor, layer: Layer) -> Prepared:
    """`prepare_weight` of a layer of which everything is known, so that the fastest kernel that fits can be chosen.

    Args:
        packed: int32 [N, words], see `prepare_weight`; weight_scale: float32 [N, G].
    Raises:
        ValueError: a device without backends, or none of its backends runs the layer.
    """
    backend, kernel = choose(layer, packed.device)
    return Prepared(backend.prepare(packed, weight_scale, layer), backend, kernel)


def choose_cpu_tier(tier: str) -> None:
    """`native.choose`, to be called before weights are prepared."""
    native.choose(tier, SPECIFICATION)
