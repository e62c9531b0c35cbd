"""The linear layer: our kernel and its peers in vLLM and torch. Those of other libraries are in kernels_optional.py.

A peer is one function that yields calls `x -> y`, each with its own copy of the weights, under a decorator that says
what it should compute. To compare with another kernel, write one more; `python benchmarks/kernels.py --list` shows it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels_lanes import Call, Peer, SkippedError, evenly, relative
from rotquant_kernels import convention, ops, reference

PEERS: dict[str, Peer] = {}
PLAIN = {16: ("bf16", torch.bfloat16), 32: ("float32", torch.float32)}  # bits of weights that are not quantized
ROWS, CHANNELS = 8, 1024  # how much of an output is compared, evenly spread


class Problem:
    """One matrix, and its quantized versions on demand: y [M, N] = x [M, K] Wᵀ."""

    def __init__(self, k: int, n: int) -> None:
        self.k, self.n = k, n
        self.weight = torch.randn(n, k, generator=torch.Generator().manual_seed(k * 31 + n))

    def input(self, rows: int) -> Tensor:
        return torch.randn(rows, self.k, generator=torch.Generator().manual_seed(rows)).bfloat16()

    def codes(self, bits: int, group: int, channels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """int8 [N, K] and float32 scales [N, G] that bfloat16 holds exactly; group 0 is one scale a channel."""
        weight = self.weight if channels is None else self.weight[channels]
        parts = weight.unflatten(1, (-1, group or self.k))
        scale = convention.qparams(parts, bits, symmetric=True)[0].bfloat16().float()
        return convention.quantize(parts, scale, torch.zeros(()), bits).flatten(1), scale.squeeze(-1)

    def values(self, bits: int, group: int, channels: Tensor) -> Tensor:
        """Some channels of the weight as a kernel sees them, float32."""
        if bits in PLAIN:
            return self.weight[channels].to(PLAIN[bits][1]).float()
        codes, scale = self.codes(bits, group, channels)
        return (codes.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)


@dataclass(frozen=True)
class Activations:
    """How a kernel sees its input.

    Attributes:
        basis: the input in the basis of the weights, in full precision.
        rounded: the same after the kernel's own quantization.
    """

    bits: int
    basis: Callable[[Tensor], Tensor] = Tensor.float
    rounded: Callable[[Tensor], Tensor] = Tensor.float


def token8(x: Tensor) -> Tensor:
    """One scale a token, absmax / 127: the rounding of most int8 kernels."""
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() / scale).round() * scale


def block_of(x: Tensor) -> int:
    """Size of our online Hadamard: the largest power of two that divides K."""
    return x.shape[-1] & -x.shape[-1]


def hadamard(x: Tensor) -> Tensor:
    return reference.online_stage(x, "hadamard", block_of(x), None)


def ours_rounded(bits: int, x: Tensor) -> Tensor:
    codes, scale, _ = reference.quantize_rows(x, "hadamard", block_of(x), None, bits, True, 1.0)
    return codes * scale


EXACT, TOKEN8 = Activations(16), Activations(8, rounded=token8)
OURS4, OURS8 = (Activations(bits, hadamard, partial(ours_rounded, bits)) for bits in (4, 8))


def check(bits: int, group: int, acts: Activations, problem: Problem, x: Tensor, y: Tensor) -> dict[str, float]:
    """error: against the format's weights and activations. activation_error: against exact activations."""
    rows, channels = evenly(len(x), ROWS), evenly(problem.n, CHANNELS)
    found, weight = y[rows][:, channels], problem.values(bits, group, channels).T
    return {
        "error": relative(found, acts.rounded(x[rows]) @ weight),
        "activation_error": relative(found, acts.basis(x[rows]) @ weight),
    }


def weight_bytes(bits: int, group: int, scale_bytes: int, problem: Problem) -> float:
    scales = 0 if bits in PLAIN else problem.n * (problem.k // group if group else 1)
    return problem.n * problem.k * bits / 8 + scales * scale_bytes


def peer(
    name: str, lane: str, bits: int, group: int = 0, acts: Activations = EXACT, scale_bytes: int = 2
) -> Callable[[Callable[[Problem], Iterator[Call]]], Peer]:
    """Registers a peer with weights of `bits` bits and a scale (of so many bytes) a group; group 0 is a channel."""

    def register(build: Callable[[Problem], Iterator[Call]]) -> Peer:
        label = PLAIN[bits][0] if bits in PLAIN else f"W{bits}A{acts.bits}" + (f" g{group}" if group else "")
        size = partial(weight_bytes, bits, group, scale_bytes)
        PEERS[name] = Peer(name, label, lane, build, size, partial(check, bits, group, acts))
        return PEERS[name]

    return register


# ---- ours ---------------------------------------------------------------------------------------------


def prepared(problem: Problem, group: int) -> tuple[Tensor, Tensor]:
    """Weight and scales as `int_linear` reads them."""
    codes, scale = problem.codes(4, group)
    return ops.prepare_weight(convention.pack_int32(codes, 4), 4, problem.k, scale.shape[1]), scale


def int_linear(weight: Tensor, scale: Tensor, act_bits: int, x: Tensor) -> Tensor:
    return ops.int_linear(x, weight, scale, None, 4, "hadamard", block_of(x), None, act_bits, True, 1.0)


def ours(problem: Problem, group: int, act_bits: int) -> Iterator[Call]:
    while True:
        yield partial(int_linear, *prepared(problem, group), act_bits)


@peer("rotquant-w4a4", "rotquant", 4, acts=OURS4, scale_bytes=4)
def _(problem: Problem) -> Iterator[Call]:
    return ours(problem, 0, 4)


@peer("rotquant-w4a8", "rotquant", 4, acts=OURS8, scale_bytes=4)
def _(problem: Problem) -> Iterator[Call]:
    return ours(problem, 0, 8)


@peer("rotquant-w4a4-g128", "rotquant", 4, 128, acts=OURS4, scale_bytes=4)
def _(problem: Problem) -> Iterator[Call]:
    return ours(problem, 128, 4)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ops.quantize_rows(x, "hadamard", block_of(x), None, 4, True, 1.0)


def check_codes(problem: Problem, x: Tensor, y: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    return {"error": relative(y[0] * y[1], ours_rounded(4, x))}


# Rotation and quantization alone, which rotquant-w4a4 does too: its share of the whole.
PEERS["rotquant-quantize"] = Peer(
    "rotquant-quantize", "A4 alone", "rotquant", lambda problem: iter([quantize_rows]), lambda problem: 0, check_codes
)


# ---- torch --------------------------------------------------------------------------------------------


@peer("torch-bf16", "torch", 16)
def _(problem: Problem) -> Iterator[Call]:
    while True:
        yield partial(torch.nn.functional.linear, weight=problem.weight.bfloat16())


@peer("torch-float32", "torch", 32)
def _(problem: Problem) -> Iterator[Call]:
    """What a processor without bf16 instructions does faster than bf16."""
    if torch.cpu._is_avx512_bf16_supported():
        raise SkippedError("there are bf16 instructions")

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.float(), weight).bfloat16()

    while True:
        yield partial(linear, weight=problem.weight.clone())


@peer("torch-w4a16", "torch", 4, 128)
def _(problem: Problem) -> Iterator[Call]:
    """torch's own int4 kernel, which torchao calls on CPUs."""
    codes, scale = problem.codes(4, 128)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
    scales = torch.stack((scale.T, torch.zeros_like(scale.T)), -1).bfloat16().contiguous()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    while True:
        yield partial(product, mat2=packed.clone(), qGroupSize=128, qScaleAndZeros=scales)


# ---- vLLM: its own classes prepare and run the layer, so that the kernel is the one it would choose here --


def layer_of(**parameters: Tensor) -> Any:
    layer: Any = torch.nn.Module()
    layer.bias = None
    for name, value in parameters.items():
        setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))
    return layer


@peer("vllm-bf16", "vllm", 16)
def _(problem: Problem) -> Iterator[Call]:
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    while True:
        layer = layer_of(weight=problem.weight.bfloat16())
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        yield partial(layer.cpu_linear, weight=layer.weight, bias=None)


@peer("vllm-w8a8", "vllm", 8, acts=TOKEN8, scale_bytes=4)
def _(problem: Problem) -> Iterator[Call]:
    from vllm.model_executor.kernels.linear.scaled_mm import cpu
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = Int8ScaledMMLinearLayerConfig(is_static_input_scheme=False, is_channelwise=True, input_symmetric=True)
    codes, scale = problem.codes(8, 0)
    while True:
        layer = layer_of(w=codes.clone(), w_s=scale.clone())
        layer.x_s = layer.x_zp = layer.adj = None
        layer.logical_widths = [problem.n]
        kernel = cpu.CPUInt8ScaledMMLinearKernel(config, ("w", "w_s", "x_s", "x_zp", "adj"))
        with set_default_torch_dtype(torch.bfloat16):  # as while vLLM loads a model: it is the kernel's output dtype
            kernel.process_weights_after_loading(layer)
        yield partial(kernel.apply_weights, layer)


def cpu_wna16(problem: Problem, w4a8: bool) -> Iterator[Call]:
    """vLLM's 4-bit kernel. It would take its W4A8 path on machines with AMX alone; here the caller chooses."""
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    shape = (problem.k, problem.n)
    config = MPLinearLayerConfig(shape, shape, scalar_types.uint4b8, torch.bfloat16, 128, zero_points=False)
    kernel: Any = CPUWNA16LinearKernel(config, "w", "w_s", "w_zp")
    codes, scale = problem.codes(4, 128)
    layer = layer_of(w=convention.pack_int32(codes, 4).t(), w_s=scale.t().bfloat16().contiguous())
    layer.use_w4a8, layer.w_zp = w4a8, None
    if w4a8:
        kernel._process_gptq_weights_w4a8(layer)
    else:
        kernel._process_gptq_weights_w4a16(layer)
    while True:
        yield partial(kernel.apply_weights, copy.deepcopy(layer))


@peer("vllm-w4a16", "vllm", 4, 128)
def _(problem: Problem) -> Iterator[Call]:
    return cpu_wna16(problem, w4a8=False)


@peer("vllm-w4a8-sgl", "vllm-bf16-build", 4, 128, acts=TOKEN8)
def _(problem: Problem) -> Iterator[Call]:
    """sgl-kernel's int4 kernel, gated behind AMX by vLLM. Only the build for AVX512_BF16 has it; it needs VNNI alone.

    So its lane loads that build even where the processor lacks AVX512_BF16. Other ops would crash there.
    """
    if not torch.cpu._is_vnni_supported():
        raise SkippedError("needs AVX512_VNNI")
    torch.cpu._is_avx512_bf16_supported = lambda: True
    return cpu_wna16(problem, w4a8=True)
