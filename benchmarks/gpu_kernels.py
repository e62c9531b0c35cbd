"""Times kernels on a CUDA device: linear layers, rotation with quantization, attention over the KV cache.

A peer is made ready by a function that gives back a call without arguments; one that cannot run here (a package or an
op is missing, a shape does not fit) is recorded with its reason. bf16 in and out, per-channel weights.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
from torch import Tensor

import gpu_attention
import gpu_fused
from gpu_attention import DEVICE, Attention, Call
from gpu_fused import Norm, Silu
from kernels_report import table
from rotquant_kernels import convention, ops

ROUNDS, FLUSH_BYTES = 40, 256 << 20


@dataclass(frozen=True)
class Linear:
    """M tokens through a layer of K inputs and N outputs."""

    k: int
    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.k}x{self.n} M {self.m}"


@dataclass(frozen=True)
class Rows:
    """M tokens of K numbers, a Hadamard of `block` and quantization to 4 bits."""

    k: int
    block: int
    m: int

    def __str__(self) -> str:
        return f"{self.k} block {self.block} M {self.m}"


Problem = Linear | Rows | Silu | Norm | Attention
SHAPES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
PROBLEMS: dict[str, list[Any]] = {
    "linear": [Linear(k, n, m) for k, n in SHAPES for m in (1, 16, 64, 256, 2048, 8192)],
    "rows": [Rows(k, block, m) for k, block in ((4096, 4096), (14336, 2048)) for m in (1, 16, 2048)],
    "silu_mul": [Silu(14336, 2048, m) for m in (1, 16, 2048)],
    "rms_norm": [Norm(4096, m) for m in (1, 16, 2048)],
    "attention": [
        *(Attention(batch, 4096, 1) for batch in (1, 16, 64)), Attention(16, 16384, 1), Attention(1, 65536, 1),
        Attention(1, 4096, 4096), Attention(1, 16384, 512),
    ],
}  # fmt: skip
PEERS: dict[type, dict[str, Callable[[Any], Call]]] = {Linear: {}, Rows: {}, Attention: gpu_attention.PEERS}
PEERS |= gpu_fused.PEERS


def peer(kind: type, name: str) -> Callable[[Callable[[Any], Call]], Callable[[Any], Call]]:
    def register(build: Callable[[Any], Call]) -> Callable[[Any], Call]:
        PEERS[kind][name] = build
        return build

    return register


# ---- linear layers ------------------------------------------------------------------------------------


def given(p: Linear | Rows) -> Tensor:
    return torch.randn(p.m, p.k, device=DEVICE, dtype=torch.bfloat16)


def packed(p: Linear) -> tuple[Tensor, Tensor]:
    """Random int4 weights in the checkpoint's layout, and their scales float32 [N, 1]."""
    words = torch.randint(-(2**31), 2**31, (p.n, p.k // 8), device=DEVICE, dtype=torch.int64).to(torch.int32)
    return words, torch.rand(p.n, 1, device=DEVICE) / 100


def ours(act_bits: int, p: Linear) -> Call:
    words, scale = packed(p)
    x, weight = given(p), ops.prepare_weight(words, 4, p.k)
    block = p.k & -p.k
    return partial(ops.int_linear, x, weight, scale, None, 4, "hadamard", block, None, act_bits, False, 0.9)


PEERS[Linear] |= {"rotquant W4A4": partial(ours, 4), "rotquant W4A8": partial(ours, 8)}


@peer(Linear, "cuBLAS bf16")
def _(p: Linear) -> Call:
    return partial(torch.nn.functional.linear, given(p), given(Linear(p.k, p.n, p.n)))


@peer(Linear, "CUTLASS W8A8 int8")
def _(p: Linear) -> Call:
    from vllm import _custom_ops as vllm

    weight = torch.randint(-127, 128, (p.n, p.k), device=DEVICE, dtype=torch.int8).t()
    x, scale = given(p), torch.rand(p.n, 1, device=DEVICE)

    def run() -> Tensor:
        codes, x_scale, _ = vllm.scaled_int8_quant(x)
        return vllm.cutlass_scaled_mm(codes, weight, x_scale, scale, torch.bfloat16)

    return run


@peer(Linear, "CUTLASS W8A8 fp8")
def _(p: Linear) -> Call:
    from vllm import _custom_ops as vllm

    weight = torch.randn(p.n, p.k, device=DEVICE).to(torch.float8_e4m3fn).t()
    x, scale = given(p), torch.rand(p.n, 1, device=DEVICE)

    def run() -> Tensor:
        codes, x_scale = vllm.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
        return vllm.cutlass_scaled_mm(codes, weight, x_scale, scale, torch.bfloat16)

    return run


def mixed(kernel: str, p: Linear) -> Call:
    """One of vLLM's W4A16 kernels, made ready as vLLM does for a compressed-tensors checkpoint."""
    from vllm.model_executor.kernels.linear import mixed_precision
    from vllm.model_executor.parameter import ChannelQuantScaleParameter, PackedvLLMParameter
    from vllm.scalar_type import scalar_types

    config = mixed_precision.MPLinearLayerConfig(
        full_weight_shape=(p.k, p.n), partition_weight_shape=(p.k, p.n), weight_type=scalar_types.uint4b8,
        act_type=torch.bfloat16, group_size=-1, zero_points=False,
    )  # fmt: skip
    chosen = getattr(mixed_precision, kernel)
    able, reason = chosen.can_implement(config)
    if not able:
        raise RuntimeError(reason)
    layer, (words, scale) = torch.nn.Module(), packed(p)
    keep = {"weight_loader": lambda *_: None}
    layer.weight_packed = PackedvLLMParameter(
        data=words, input_dim=1, output_dim=0, packed_dim=1, packed_factor=8, **keep
    )
    layer.weight_scale = ChannelQuantScaleParameter(data=scale.bfloat16(), output_dim=0, **keep)
    layer.input_size_per_partition, layer.output_size_per_partition = p.k, p.n
    made = chosen(config, "weight_packed", "weight_scale", "weight_zero_point")
    made.process_weights_after_loading(layer)
    return partial(made.apply_weights, layer, given(p))


PEERS[Linear] |= {
    "Machete W4A16": partial(mixed, "MacheteLinearKernel"),
    "Marlin W4A16": partial(mixed, "MarlinLinearKernel"),
    "Humming W4A16": partial(mixed, "HummingLinearKernel"),
}


# ---- rotation and quantization ------------------------------------------------------------------------


@peer(Rows, "rotquant")
def _(p: Rows) -> Call:
    return partial(ops.quantize_rows, given(p), "hadamard", p.block, None, 4, False, 0.9)


@peer(Rows, "byte floor: a copy to int8")
def _(p: Rows) -> Call:
    x = given(p)
    return partial(torch.empty_like(x, dtype=torch.int8).copy_, x)


@peer(Rows, "vLLM hadacore, then int8")
def _(p: Rows) -> Call:
    from vllm import _custom_ops as vllm

    x = given(p)
    return lambda: vllm.scaled_int8_quant(vllm.hadacore_transform(x.view(-1, p.block), False).view_as(x))


# ---- measuring ----------------------------------------------------------------------------------------


def time_us(call: Call) -> dict[str, Any]:
    """Median microseconds of a call with a cold L2. Replayed as a CUDA graph, so that Python's time does not count.

    The cache is filled by reading: what is written would be written back in the timed call's time.
    """
    if DEVICE != "cuda":
        started = time.perf_counter()
        call()
        return {"us": 1e6 * (time.perf_counter() - started)}
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    flush, most = torch.zeros(FLUSH_BYTES // 4, device=DEVICE), torch.empty((), device=DEVICE)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    for begin, end in events:
        torch.amax(flush, 0, out=most)
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = [1000 * begin.elapsed_time(end) for begin, end in events]
    return {"us": median(times), "least_us": min(times)}


def measure(p: Problem, left_out: Collection[str] = ()) -> dict[str, Any]:
    """Every peer's time, or why there is none."""
    found: dict[str, Any] = {}
    for name, build in PEERS[type(p)].items():
        if name in left_out:
            continue
        try:
            found[name] = time_us(build(p))
        except Exception as error:  # of a peer, of any kind: the others can still be timed
            found[name] = {"skipped": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return {"kernels": found}


def validate(p: Problem) -> str:
    """The problem's own calls with tensors that have shapes only; raises where they do not fit."""
    meta = partial(torch.empty, device="meta")
    if isinstance(p, Attention):
        return gpu_attention.validate(p)
    if isinstance(p, Silu | Norm):
        return gpu_fused.validate(p)
    x = meta(p.m, p.k, dtype=torch.bfloat16)
    if isinstance(p, Rows):
        assert p.k % p.block == 0
        return f"codes {list(ops.quantize_rows(x, 'hadamard', p.block, None, 4, False, 0.9)[0].shape)}"
    words = convention.pack_int32(torch.zeros(1, p.k, dtype=torch.int8), 4)
    assert words.shape[1] == p.k // 8
    weight, scale = meta(p.n, p.k // 8, dtype=torch.int32), meta(p.n, 1)
    y = ops.int_linear(x, weight, scale, None, 4, "hadamard", p.k & -p.k, None, 4, False, 0.9)
    return f"output {list(y.shape)}"


def environment() -> dict[str, Any]:
    """Versions, the device, and which peers' packages are there."""
    found: dict[str, Any] = {"versions": {}, "peers": {}}
    for name in ("torch", "triton", "vllm", "transformers", "humming-kernels"):
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            found["versions"][name] = None
    for module in ("vllm._custom_ops", "vllm.vllm_flash_attn", "humming", "flashinfer"):
        top = importlib.util.find_spec(module.partition(".")[0])
        found["peers"][module] = top is not None and importlib.util.find_spec(module) is not None
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        found["device"] = {"name": about.name, "processors": about.multi_processor_count, "bytes": about.total_memory}
    found["kernels"] = {op: ops.kernel_of(op, "cuda") for op in ops.OPS}
    return found


def report(steps: dict[str, dict[str, Any]]) -> str:
    """Microseconds of every peer; in brackets how many times ours it takes."""
    done = {name: one["kernels"] for name, one in steps.items() if "kernels" in one}
    names = list(dict.fromkeys(name for kernels in done.values() for name in kernels))
    rows = []
    for step, kernels in done.items():
        times = [kernels.get(name, {}).get("us") for name in names]
        cells = ["-" if t is None else f"{t:.1f}" + (f" ({t / times[0]:.2f}x)" if times[0] else "") for t in times]
        rows.append([step, *cells])
    return table(["µs", *names], rows) if rows else ""
