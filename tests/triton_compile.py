"""Ahead-of-time compilation of Triton kernels for GPUs that are not here."""

import re
from collections import Counter
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rotquant_kernels.cuda import gemm, rows


def compiled(kernel: Any, arch: int, types: dict[str, str], constants: dict[str, Any], **options: Any) -> Any:
    """`kernel` for sm_`arch`; pointers and sizes count as multiples of 16, as a launch finds them, but for "tokens"."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    sixteen = [["tt.divisibility", 16]]
    attributes = {
        (i,): sixteen
        for i, name in enumerate(names)
        if name not in constants and name != "tokens" and types[name] not in ("i1", "fp32")
    }
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options | rows.EXACT)


def instructions(kernel: Any) -> Counter[str]:
    """How often each PTX instruction occurs."""
    return Counter(re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]+)", kernel.asm["ptx"], re.M))


def linear(arch: int, tokens: int, groups: int = 1, bits: int = 4, symmetric: bool = True, rank: int = 0) -> Any:
    """`gemm.linear_kernel` as launched for so many tokens of 4096 columns, bias and bfloat16."""
    columns, size = 4096, gemm.tiles(tokens, 4096, groups)
    types = dict.fromkeys(("tokens", "columns", "channels", "padded", "rank"), "i32")
    types |= {
        "codes": "*i8",
        "scales": "*fp32",
        "zeros": "*i32",
        "words": "*i8",
        "sums": "*i32",
        "weight_scale": "*fp32",
    }
    types |= {"down": "*fp32", "up": "*bf16", "bias": "*bf16", "out": "*bf16"}
    steps = columns // (groups * size.k) if groups > 1 else 0
    constants: dict[str, Any] = {"BITS": bits, "GROUPS": groups, "STEPS": steps, "SYMMETRIC": symmetric, "RANK": rank}
    constants |= {"BIAS": True, "EVEN": True, "TN": size.n, "TM": size.m, "TK": size.k, "ASM": True}
    constants |= {} if rank else {"down": None, "up": None}
    return compiled(gemm.linear_kernel, arch, types, constants, num_warps=size.warps, num_stages=size.stages)


def quantize(arch: int, source: str, columns: int, block: int, bits: int = 4, symmetric: bool = True) -> Any:
    """`rows.quantize_kernel` as launched for rows of bfloat16."""
    types = {
        "x": "*bf16",
        "residual": "*bf16",
        "norm": "*bf16",
        "stream": "*bf16",
        "codes": "*i8",
        "scales": "*fp32",
        "zeros": "*i32",
    }
    types |= {"x_stride": "i32", "columns": "i32", "clip": "fp32", "eps": "fp32"}
    width = triton.next_power_of_2(columns)
    constants: dict[str, Any] = {"SOURCE": source, "WIDTH": width, "BLOCK": block, "LOG": block.bit_length() - 1}
    constants |= {"BITS": bits, "SYMMETRIC": symmetric, "ORDER": "natural"}
    constants |= {} if source == "rms_norm" else dict.fromkeys(("residual", "norm", "stream"))
    return compiled(rows.quantize_kernel, arch, types, constants, num_warps=rows.warps(width))
