"""Peers of the linear layer that nobody has by accident: AMD's zentorch and llama.cpp's ggml.

zentorch: `pip install --target DIR --no-deps zentorch==<the version that `vllm[zen]` asks for> deprecated wrapt`, then
`--zentorch DIR`. It needs a processor with AVX512_BF16 (without it: illegal instructions or wrong numbers).

ggml: its C libraries, called directly, without llama.cpp around them. Get the sources of llama-cpp-python, whose
archive holds llama.cpp, and build only ggml (two minutes), then `--ggml BUILD/bin`:

    pip download --no-deps --no-binary :all: llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B BUILD -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \\
        -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF \\
        -DLLAMA_BUILD_SERVER=OFF && cmake --build BUILD -t ggml
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import weakref
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels_lanes import Call, SkippedError
from kernels_linear import PEERS, TOKEN8, Activations, Problem, peer

__all__ = ["PEERS"]

# Where the parent says the libraries are (options --zentorch and --ggml).
ZENTORCH, GGML = "ROTQUANT_BENCHMARK_ZENTORCH", "ROTQUANT_BENCHMARK_GGML"

# ---- zentorch, called as vLLM's Zen platform calls it -------------------------------------------------


def zentorch() -> Any:
    if not torch.cpu._is_avx512_bf16_supported():
        raise SkippedError("zentorch needs AVX512_BF16")
    folder = os.environ.get(ZENTORCH)
    if folder and folder not in sys.path:
        sys.path.append(folder)
    try:
        import zentorch  # noqa: F401
    except ImportError as error:
        raise SkippedError(f"{error}; see --zentorch") from None
    return torch.ops.zentorch


@peer("zentorch-bf16", "zentorch", 16)
def _(problem: Problem) -> Iterator[Call]:
    ops = zentorch()
    while True:
        weight = ops.zentorch_weight_prepack_for_linear(problem.weight.bfloat16())
        yield partial(ops.zentorch_linear_unary, weight=weight, is_weight_prepacked=True)


@peer("zentorch-w8a8", "zentorch", 8, acts=TOKEN8)
def _(problem: Problem) -> Iterator[Call]:
    ops = zentorch()
    codes, scale = problem.codes(8, 0)
    scales = scale[:, 0].bfloat16().contiguous()
    while True:
        yield partial(ops.zentorch_dynamic_qlinear, weight=codes.clone(), weight_scales=scales)


@peer("zentorch-w4a8", "zentorch", 4, 128, acts=TOKEN8)
def _(problem: Problem) -> Iterator[Call]:
    ops = zentorch()
    codes, scale = problem.codes(4, 128)
    packed, scales = ops.zentorch_woq_repack_weight(codes).view(torch.int8), scale.t().bfloat16().contiguous()
    while True:
        yield partial(ops.zentorch_dynamic_qlinear, weight=packed.clone(), weight_scales=scales)


@peer("zentorch-w4a16", "zentorch", 4, 128)
def _(problem: Problem) -> Iterator[Call]:
    ops = zentorch()
    codes, scale = problem.codes(4, 128)
    packed, scales = ops.zentorch_woq_repack_weight(codes), scale.t().bfloat16().contiguous()
    while True:
        yield partial(ops.zentorch_woq_linear, weight=packed.clone().t(), weight_scales=scales, weight_zero_points=None)


# ---- ggml ---------------------------------------------------------------------------------------------

F32, Q4_0 = 0, 2  # enum ggml_type
BLOCK = 32  # values that share a scale, in Q4_0 and in the Q8_0 that activations become
CONTEXT_BYTES = 1 << 20  # for descriptions of tensors and graphs; the numbers live in backend buffers


class Parameters(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """Functions of libggml-base and libggml-cpu; all take and give machine words here, that is pointers or numbers."""

    def __init__(self, folder: str) -> None:
        try:
            base, cpu = (ctypes.CDLL(str(Path(folder) / f"libggml-{part}.so")) for part in ("base", "cpu"))
        except OSError as error:
            raise SkippedError(str(error)) from None
        self.libraries = (cpu, base)
        self.silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *words: None)
        self("ggml_log_set", self.silent, None)
        self.backend = self("ggml_backend_cpu_init")
        self.repacked = self.repacking_buffers()

    def __call__(self, name: str, *arguments: Any) -> int:
        library = next((one for one in self.libraries if hasattr(one, name)), None)
        if library is None:
            raise SkippedError(f"this ggml has no {name}")
        function = library[name]  # a new object each time, unlike the attribute
        function.restype = ctypes.c_void_p
        words = [ctypes.c_void_p(one) if isinstance(one, int) else one for one in arguments]
        return function(*words) or 0

    def repacking_buffers(self) -> int:
        """The buffer type that reorders weights for this processor, as llama.cpp does when it loads a model."""
        device = self("ggml_backend_get_device", self.backend)
        registry = self("ggml_backend_dev_backend_reg", device)
        address = self("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
        kinds = itertools.takewhile(bool, (extra[i] for i in itertools.count()))  # ends with NULL
        for kind in kinds:
            if b"REPACK" in ctypes.string_at(self("ggml_backend_buft_name", kind)):
                return kind
        raise SkippedError("this ggml repacks no weights")

    def context(self) -> int:
        return self("ggml_init", Parameters(CONTEXT_BYTES, None, True))


@cache
def ggml() -> Ggml:
    if not os.environ.get(GGML):
        raise SkippedError("no ggml; see --ggml")
    return Ggml(os.environ[GGML])


@cache
def scratch(size: int) -> tuple[int, int]:
    """A buffer for input and output and where its memory starts; never freed, a few MB."""
    buffer = ggml()("ggml_backend_alloc_buffer", ggml().backend, size)
    return buffer, ggml()("ggml_backend_buffer_get_base", buffer)


def q8_0(x: Tensor) -> Tensor:
    """ggml's activations: int8 with a float16 scale for each 32 values of a token."""
    parts = x.float().unflatten(-1, (-1, BLOCK))
    scale = parts.abs().amax(-1, keepdim=True) / 127
    return ((parts / scale).round() * scale.half().float()).flatten(-2)


def q4_0(problem: Problem) -> Tensor:
    """The weight in ggml's file format: blocks of a float16 scale and 16 bytes, byte j holding values j and j + 16."""
    codes, scale = problem.codes(4, BLOCK)
    halves = (codes + 8).to(torch.uint8).view(-1, 2, BLOCK // 2)
    nibbles = halves[:, 0] | halves[:, 1] << 4
    return torch.cat((scale.half().view(-1, 1).view(torch.uint8), nibbles), dim=1).contiguous()


def release(lib: Ggml, memory: int, contexts: list[int]) -> None:
    lib("ggml_backend_buffer_free", memory)
    for context in contexts:
        lib("ggml_free", context)


class Matrix:
    """One copy of the weight in ggml's hands."""

    def __init__(self, problem: Problem, blocks: Tensor) -> None:
        self.ggml, self.problem = ggml(), problem
        self.plans: dict[int, tuple[int, Tensor]] = {}
        self.contexts = [self.ggml.context()]
        self.weight = self.ggml("ggml_new_tensor_2d", self.contexts[0], Q4_0, problem.k, problem.n)
        self.memory = self.ggml("ggml_backend_alloc_ctx_tensors_from_buft", self.contexts[0], self.ggml.repacked)
        self.ggml("ggml_backend_tensor_set", self.weight, blocks.data_ptr(), 0, blocks.numel())
        weakref.finalize(self, release, self.ggml, self.memory, self.contexts).atexit = False

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) not in self.plans:
            self.plans[len(x)] = self.plan(x)
        graph, y = self.plans[len(x)]
        self.ggml("ggml_backend_graph_compute", self.ggml.backend, graph)
        return y

    def plan(self, x: Tensor) -> tuple[int, Tensor]:
        """Graph and output for one number of rows. All copies share their input and output, as a server's layers do."""
        lib, (k, n) = self.ggml, (self.problem.k, self.problem.n)
        lib("ggml_backend_cpu_set_n_threads", lib.backend, torch.get_num_threads())
        buffer, start = scratch(4 * len(x) * (k + n) + 256)
        context = lib.context()
        self.contexts.append(context)
        inputs = lib("ggml_new_tensor_2d", context, F32, k, len(x))
        outputs = lib("ggml_mul_mat", context, self.weight, inputs)
        lib("ggml_backend_tensor_alloc", buffer, inputs, start)
        lib("ggml_backend_tensor_alloc", buffer, outputs, start + 4 * len(x) * k)
        values = x.float().contiguous()
        lib("ggml_backend_tensor_set", inputs, values.data_ptr(), 0, 4 * values.numel())
        graph = lib("ggml_new_graph", context)
        lib("ggml_build_forward_expand", graph, outputs)
        memory = (ctypes.c_float * (len(x) * n)).from_address(start + 4 * len(x) * k)
        return graph, torch.frombuffer(memory, dtype=torch.float32).view(len(x), n)


@peer("ggml-q4_0", "ggml", 4, BLOCK, acts=Activations(8, rounded=q8_0))
def _(problem: Problem) -> Iterator[Call]:
    """llama.cpp's Q4_0, repacked for this processor; float32 in and out, conversions not timed."""
    ggml()  # skips before the work
    blocks = q4_0(problem)
    while True:
        yield Matrix(problem, blocks)
