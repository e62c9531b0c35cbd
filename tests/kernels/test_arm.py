"""The tiers of Arm processors against the reference, under an emulator: as the native ones, bit for bit.

With CXXFLAGS="-g1 -fsanitize=address,undefined -fno-sanitize-recover=all" every access is checked, in a minute.
"""

import itertools

import pytest
import torch

from emulated_tier import Calls, numbers, program, rows
from rotquant_kernels import KINDS, build, ops, reference
from test_kv4_native import feedback_of, make_batch, new_cache, rows_to_write
from test_linear_native import activations, gate_up, linear_case, same

# Processors of the emulator and the tier that each must choose.
PROCESSORS = {"neoverse-n1": "neon", "max": "i8mm", "cortex-a72": "scalar"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = [(1, 0), (7, 0), (100, 4), (96, 32), (320, 64), (2560, 512), (65, 0)]  # (columns, block of the Hadamard or 0)
LAYERS = [(64, 0, 1), (24, 8, 3), (77, 0, 7), (576, 64, 9)]  # columns, block, groups
HEADS = [(16, 16), (64, 64), (80, 16), (112, 8), (128, 0)]  # head size, block of R3 or 0


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    return program(tmp_path_factory.mktemp("arm"))


def quantized(calls: Calls):
    """Calls of `quantize`; pairs of a call and what checks its result."""
    for seed, ((k, block), dtype, silu) in enumerate(itertools.product(ROWS, DTYPES, (False, True))):
        x = (gate_up if silu else activations)(7, k, seed, dtype)
        settings = ((4, True, 0.9), (8, False, 1.0), (5, True, 1e-4), (4, False, 0.35))[seed % 4]
        stage = ("hadamard" if block else "none", block, None)
        expected = reference.quantize_rows(x, *stage, *settings, silu)
        call = calls.add("quantize", 7 * (5 * k + 8), *rows(x, stage, *settings, silu))

        def check(data: bytes, k=k, x=x, stage=stage, expected=expected, silu=silu) -> bool:
            parts = numbers(data, torch.uint8).view(7, -1)
            turned, codes, scale, zero = parts.split([4 * k, k, 4, 4], 1)
            actual = (
                codes.contiguous().view(torch.int8),
                scale.contiguous().view(torch.float32),
                zero.contiguous().view(torch.int32),
            )
            if stage[0] != "none" and not silu:
                wanted = reference.online_stage(x, *stage)
                if not same(turned.contiguous().view(torch.float32).nan_to_num(0, 0, 0), wanted.nan_to_num(0, 0, 0)):
                    return False
            return all(map(same, actual, expected))

        yield call, check


def linears(calls: Calls):
    shapes = itertools.product(LAYERS, (1, 2, 3, 4, 5, 6, 7, 13), (4, 8), (4, 8))
    for seed, ((k, block, groups), m, w_bits, a_bits) in enumerate(shapes):
        dtype, n, symmetric = DTYPES[seed % 3], (1, 64, 130)[seed // 2 % 3], bool(seed & 4)
        x, packed, scale, bias = linear_case(seed, m, k, n, dtype, groups, w_bits)
        stage = ("hadamard" if block else "none", block, None)
        expected = reference.int_linear(x, packed, scale, bias, w_bits, *stage, a_bits, symmetric, 0.8)
        panels = ops.prepare_weight(packed, w_bits, k, groups)
        arguments = (n, groups, w_bits, 0, 0, panels, scale, bias, None, None)
        first = rows(x, stage, a_bits, symmetric, 0.8, False)
        call = calls.add("linear", expected.numel() * expected.itemsize, *first, *arguments)
        yield call, lambda data, e=expected: same(numbers(data, e.dtype).view(e.shape), e)


def many_rows(calls: Calls):
    """More rows than one call of the GEMM takes."""
    x, packed, scale, bias = linear_case(5, 195, 64, 70, torch.bfloat16, 1, 4)
    expected = reference.int_linear(x, packed, scale, bias, 4, "none", 0, None, 4, False, 0.9)
    panels = ops.prepare_weight(packed, 4, 64, 1)
    arguments = (70, 1, 4, 0, 0, panels, scale, bias, None, None)
    call = calls.add("linear", 195 * 70 * 2, *rows(x, ("none", 0, None), 4, False, 0.9, False), *arguments)
    yield call, lambda data: same(numbers(data, torch.bfloat16).view(195, 70), expected)


def transformed(calls: Calls):
    """Transforms whose sums of products are held to float64, or that only move numbers."""
    for name, (k, block), dtype in itertools.product(KINDS, ((96, 16), (576, 24)), DTYPES):
        if name == "hadamard":
            continue
        tensor = KINDS[name].sample(block, k, torch.Generator().manual_seed(k))
        x = torch.randn(5, k, generator=torch.Generator().manual_seed(k)).to(dtype)
        turned = reference.stage_rows(x.double(), name, block, tensor)
        call = calls.add("quantize", 5 * (5 * k + 8), *rows(x, (name, block, tensor), 4, True, 1.0, False))

        def near(data: bytes, k=k, turned=turned) -> bool:
            actual = numbers(data, torch.uint8).view(5, -1)[:, : 4 * k].contiguous().view(torch.float32)
            return bool((actual - turned).abs().max() < 2e-6 * turned.abs().max())

        yield call, near


def branches(calls: Calls):
    """The low-rank branch, in ranks of whole vectors, of part of one, and of more than the epilogue takes at once."""
    generator = torch.Generator().manual_seed(1)
    for rank, dtype in itertools.product((1, 24, 70), DTYPES):
        k = 96
        _, packed, scale, bias = linear_case(rank, 5, k, 70, dtype, 1, 4)
        x = torch.randn(5, k, generator=generator).to(dtype)
        down, up = (torch.randn(s, generator=generator).to(dtype) for s in ((k, rank), (rank, 70)))
        plain = reference.int_linear(x.float(), packed, scale, bias.float(), 4, "none", 0, None, 4, True, 0.8).double()
        wanted = plain + x.double() @ down.double() @ up.double()
        first = rows(x, ("none", 0, None), 4, True, 0.8, False)
        arguments = (70, 1, 4, rank, 0, ops.prepare_weight(packed, 4, k), scale, bias, down, up)
        call = calls.add("linear", 5 * 70 * dtype.itemsize, *first, *arguments)

        def close(data: bytes, dtype=dtype, wanted=wanted) -> bool:
            error = (numbers(data, dtype).view(5, 70) - wanted).abs().max()
            return bool(error <= (torch.finfo(dtype).eps + 1e-5) * wanted.abs().max())

        yield call, close


def directions(calls: Calls):
    """A branch that takes its directions off the rows, on numbers whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(2)
    for rank, dtype in itertools.product((1, 24, 70), DTYPES):
        k = 100
        _, packed, scale, bias = linear_case(rank, 5, k, 70, dtype, 1, 4)
        x, down = (torch.randint(-3, 4, s, generator=generator).to(dtype) for s in ((5, k), (k, rank)))
        down, up = down / 4, torch.zeros(rank, 70, dtype=dtype)
        rest = (4, "none", 0, None, 4, True, 0.8, down, up)
        expected = reference.int_linear(x, packed, scale, bias, *rest, low_rank_subtracts=True)
        first = rows(x, ("none", 0, None), 4, True, 0.8, False)
        arguments = (70, 1, 4, rank, 1, ops.prepare_weight(packed, 4, k), scale, bias, down, up)
        call = calls.add("linear", 5 * 70 * dtype.itemsize, *first, *arguments)
        yield call, lambda data, e=expected: same(numbers(data, e.dtype).view(e.shape), e)


def pages(calls: Calls):
    for seed, ((d, rotate), dtype, symmetric, fed_back) in enumerate(
        itertools.product(HEADS, DTYPES, (False, True), (0, 1))
    ):
        key, value = (rows_to_write(21, 2, d, seed + i).to(dtype) for i in range(2))
        slots = torch.randperm(96, generator=torch.Generator().manual_seed(seed))[:21]
        slots[::5] = -1
        cache = new_cache(2, 2, 48, d, symmetric)
        expected = cache.clone()
        feedback = feedback_of(2, d, seed)
        rest = slots, rotate, symmetric, 0.95, 0.9, feedback if fed_back else None
        reference.kv4_write(key, value, expected, *rest)
        shape, settings = (
            (2, 48, d, int(symmetric), cache),
            (DTYPES.index(dtype), rotate, 0.95, 0.9, fed_back, feedback),
        )
        call = calls.add("kv_write", cache.numel(), *shape, *settings, key, value, slots)
        yield call, lambda data, e=expected: torch.equal(numbers(data, torch.uint8).view(e.shape), e)


def attended(calls: Calls):
    shapes = [(40, 3, 1), (129, 1, 7), (300, 12, 3), (2200, 2, 4)]  # tokens in the cache, new ones, heads of a group
    for seed, ((length, steps, group), (d, rotate), symmetric) in enumerate(
        itertools.product(shapes, HEADS[1:4], (False, True))
    ):
        dtype = DTYPES[seed % 3]
        batch = make_batch([length], [steps], 2, group, d, 48, rotate, symmetric, dtype, seed)
        codes, real = batch.exact(quantized=True), batch.exact(quantized=False)
        query, table = batch.query[:steps].contiguous(), batch.table[0]
        for chunked in (0, 1):
            shape = (2, 48, d, int(symmetric), batch.cache)
            settings = (DTYPES.index(dtype), rotate, group, 0, length, chunked, batch.scale, query, table)
            call = calls.add("kv_attend", query.numel() * query.itemsize, *shape, *settings)

            def near(data: bytes, codes=codes, real=real, dtype=dtype) -> bool:
                out = numbers(data, dtype).view(codes.shape).double()
                return bool((out - codes).norm() <= 0.2 * (codes - real).norm() + torch.finfo(dtype).eps * codes.norm())

            yield call, near


def added(calls: Calls):
    for n, dtype in itertools.product((1, 70, 128), DTYPES):
        x = torch.randn(3, n, generator=torch.Generator().manual_seed(n)).to(dtype)
        weights = torch.tensor([0.3, 0.0, -1.7])
        total = torch.zeros(n)
        for row, weight in zip(x, weights, strict=True):
            total = total + row.float() * weight
        expected = total.to(dtype)
        call = calls.add("add_rows", n * dtype.itemsize, DTYPES.index(dtype), n, x, weights)
        yield call, lambda data, e=expected: same(numbers(data, e.dtype), e)


GROUPS = (quantized, linears, many_rows, transformed, branches, directions, pages, attended, added)


def test_every_function_is_the_reference_s(tool):
    calls = Calls()
    checks = [(group.__name__, *found) for group in GROUPS for found in group(calls)]
    for processor in ("neoverse-n1", "max"):
        tier, results = calls.run(tool, processor)
        assert tier == PROCESSORS[processor]
        wrong = [(name, call) for name, call, check in checks if not check(results[call])]
        assert not wrong, tier


def test_a_processor_gets_the_best_tier_that_it_has_and_no_other(tool):
    assert {processor: Calls().run(tool, processor)[0] for processor in PROCESSORS} == PROCESSORS
    assert Calls().run(tool, "max", "neon")[0] == "neon"
    with pytest.raises(AssertionError):
        Calls().run(tool, "cortex-a72", "neon")


def test_each_architecture_compiles_its_own_tiers():
    names = {machine: {f.name for f in build.sources(machine)} for machine in ("x86_64", "aarch64", "riscv64")}
    assert names["x86_64"] & set(build.ARM) == names["aarch64"] & set(build.X86) == set()
    assert names["x86_64"] - set(build.X86) == names["aarch64"] - set(build.ARM) == names["riscv64"]
    assert {"tier_scalar.cpp", "dispatch.cpp"} <= names["riscv64"]
