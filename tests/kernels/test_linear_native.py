"""The native linear kernels against the reference: integers bit for bit, in every tier."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from native_tiers import EXAMPLES, gemm_tier, tier  # noqa: F401
from rotquant_kernels import build, convention, native, ops, reference

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**31)
# (columns, block of the Hadamard or 0): whole vectors and tails, blocks below and above a vector and a chunk
SHAPES = st.sampled_from(
    [(1, 0), (7, 0), (100, 4), (24, 8), (64, 64), (80, 16), (96, 32), (320, 64), (640, 128), (768, 256), (1536, 512),
     (4096, 4096), (2560, 512), (14336, 2048), (65, 0), (1000, 2)]
)  # fmt: skip
many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def activations(m: int, k: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of many sizes, with zeros, constants, an outlier, ties, and rows that are not finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 10 ** torch.randint(-4, 4, (m, 1), generator=generator)
    kinds = torch.randint(0, 9, (m,), generator=generator)
    x[kinds == 0] = 0
    x[kinds == 1] = 3.25
    x[kinds == 2, 0] = 3e4
    x[kinds == 3] = x[kinds == 3].abs()
    x[kinds == 4] = torch.randint(-15, 16, (int((kinds == 4).sum()), k), generator=generator).float() / 2
    x[kinds == 5, -1] = float("nan")
    x[kinds == 6, k // 2] = float("inf")
    x[kinds == 7] *= 1e-38
    return x.to(dtype)


def gate_up(m: int, k: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows [gate, up], up of every kind; gates from where silu is 0 to where it is the gate."""
    gate = torch.randn(m, k, generator=torch.Generator().manual_seed(seed + 1)) * 12
    gate[:, ::7] *= 10
    return torch.cat((gate.to(dtype), activations(m, k, seed, dtype)), -1)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN where NaN is."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


@many
@given(SEEDS, st.integers(0, 9), SHAPES, DTYPES, st.sampled_from([4, 8, 5]), st.booleans(),
       st.sampled_from([1.0, 0.9, 0.35, 1e-4]))  # fmt: skip
def test_quantized_rows_are_the_references_bit_for_bit(tier, seed, m, shape, dtype, bits, symmetric, clip):  # noqa: F811
    k, block = shape
    x = activations(m, k, seed, dtype)
    settings = ("hadamard" if block else "none", block, None, bits, symmetric, clip)
    for native_part, part in zip(ops.quantize_rows(x, *settings), reference.quantize_rows(x, *settings), strict=True):
        assert same(native_part, part)
    if block:
        rotated = reference.online_stage(x, *settings[:3])
        assert same(ops.online_stage(x, *settings[:3]).nan_to_num(0, 0, 0), rotated.nan_to_num(0, 0, 0))


def linear_case(seed, m, k, n, dtype, groups, w_bits):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, groups, k // groups, generator=generator)
    scale, zero = convention.qparams(w, w_bits, True)
    codes = convention.quantize(w, scale, zero, w_bits).flatten(1)
    codes[0] = -(1 << (w_bits - 1))
    packed = convention.pack_int32(codes, w_bits)
    bias = torch.randn(n, generator=generator).to(dtype)
    return activations(m, k, seed, dtype), packed, scale.squeeze(-1).contiguous(), bias


@many
@given(SEEDS, st.sampled_from([1, 2, 3, 4, 5, 6, 7, 13, 24, 195, 400]),
       st.sampled_from([(64, 0, 1), (24, 8, 3), (100, 4, 1), (77, 0, 7), (1024, 256, 8), (2176, 128, 17)]),
       st.sampled_from([1, 63, 64, 130]), DTYPES, st.sampled_from([4, 8]), st.sampled_from([4, 8]), st.booleans(),
       st.booleans())  # fmt: skip
def test_linear_is_the_reference_bit_for_bit(
    gemm_tier, seed, m, shape, n, dtype, w_bits, a_bits, symmetric, with_bias  # noqa: F811
):  # fmt: skip
    k, block, groups = shape
    x, packed, scale, bias = linear_case(seed, m, k, n, dtype, groups, w_bits)
    rest = (bias if with_bias else None, w_bits, "hadamard" if block else "none", block, None, a_bits, symmetric, 0.8)
    actual = ops.int_linear(x, ops.prepare_weight(packed, w_bits, k, groups), scale, *rest)
    assert same(actual, reference.int_linear(x, packed, scale, *rest))
    broken = ~x.isfinite().all(1)
    assert actual[broken].isnan().all()
    assert actual[~broken].isfinite().all() or dtype == torch.float16


@many
@given(
    SEEDS, st.sampled_from([1, 5, 40]), st.sampled_from([8, 24, 64, 128]), st.sampled_from([0, 1, 24, 32, 100]), DTYPES
)
def test_dense_transforms_and_the_low_rank_branch(tier, seed, m, block, rank, dtype):  # noqa: F811
    """Their sums are floating point, so rows are compared with the same codes, or with float64."""
    k, n = 6 * block, 100
    x, packed, scale, bias = linear_case(seed, m, k, n, torch.float32, 1, 4)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.linalg.qr(torch.randn(block, block, generator=generator)).Q.contiguous()
    y = ops.online_stage(x, "dense", block, matrix)
    expected = (x.double().unflatten(-1, (-1, block)) @ matrix.double()).flatten(-2)
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()
    down, up = (torch.randn(shape, generator=generator) for shape in ((k, rank), (rank, n)))
    branch = (down.to(dtype), up.to(dtype)) if rank else (None, None)
    rest = (bias.to(dtype), 4, "none", 0, None, 4, True, 0.8)
    prepared = ops.prepare_weight(packed, 4, k, 1)
    actual = ops.int_linear(x, prepared, scale, *rest, *branch)
    if rank:
        plain = reference.int_linear(x.float(), packed, scale, *rest).double()
        expected = plain + x.double() @ branch[0].double() @ branch[1].double()
        assert (actual - expected).abs().max() <= (torch.finfo(dtype).eps + 1e-5) * expected.abs().max()


@many
@given(
    SEEDS, st.sampled_from([1, 5, 40]), st.sampled_from([(24, 1), (96, 8), (100, 0), (320, 64)]),
    st.sampled_from([1, 8, 24, 32, 100]), DTYPES, st.booleans(),
)  # fmt: skip
def test_a_branch_that_subtracts_is_the_references_bit_for_bit(tier, seed, m, shape, rank, dtype, symmetric):  # noqa: F811
    """On numbers whose sums are exact in any order."""
    (k, block), n = shape, 100
    _, packed, scale, bias = linear_case(seed, m, k, n, torch.float32, 1, 4)
    generator = torch.Generator().manual_seed(seed)
    whole = lambda *shape: torch.randint(-3, 4, shape, generator=generator).float()  # noqa: E731
    x, down, up = whole(m, k).to(dtype), (whole(k, rank) / 4).to(dtype), whole(rank, n).to(dtype)
    turn = ("hadamard" if block == 64 else "none", block, None)  # a norm that is a power of two

    def run(op, weight: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        rest = (bias.to(dtype), 4, *turn, 4, symmetric, 0.8)
        return op(x, weight, scale, *rest, down, up, low_rank_subtracts=True)

    prepared = ops.prepare_weight(packed, 4, k, 1)
    nothing = torch.zeros_like(up)
    assert same(run(ops.int_linear, prepared, nothing), run(reference.int_linear, packed, nothing))
    actual, expected = run(ops.int_linear, prepared, up).double(), run(reference.int_linear, packed, up).double()
    assert (actual - expected).abs().max() <= (torch.finfo(dtype).eps + 1e-5) * expected.abs().max()
    # What it takes off comes back by U = Dᵀ Wᵀ, but for what rounding the rest costs: here the identity, unrounded.
    y, d, w = reference.turned(x, *turn).double(), down.double(), whole(n, k).double()
    assert torch.equal((y - y @ d @ d.T) @ w.T + y @ d @ (d.T @ w.T), y @ w.T)


@many
@given(SEEDS, st.integers(0, 9), SHAPES, DTYPES, st.sampled_from([4, 8]), st.booleans())
def test_silu_mul_in_front_is_the_references_bit_for_bit(tier, seed, m, shape, dtype, bits, symmetric):  # noqa: F811
    k, block = shape
    settings = ("hadamard" if block else "none", block, None, bits, symmetric, 0.9, True)
    for x in (gate_up(m, k, seed, dtype), torch.empty(m, 2 * k + 3, dtype=dtype)[:, 3:]):
        x[:] = gate_up(m, k, seed, dtype)
        pairs = zip(ops.quantize_rows(x, *settings), reference.quantize_rows(x, *settings), strict=True)
        assert all(same(ours, expected) for ours, expected in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_silu_mul_is_that_of_a_model(dtype):
    """Within a step of its dtype of torch's, whose exp has another last bit; exact where that cannot show."""
    gate = torch.cat((torch.linspace(-100, 100, 40001), torch.tensor([0.0, 6e4, -6e4, float("inf")]))).to(dtype)
    x = torch.stack((gate, torch.ones_like(gate)), -1)
    ours, theirs = convention.silu_mul(x)[:, 0], torch.nn.functional.silu(gate)
    error = (ours.double() - theirs.double()).abs()
    assert (error[:-1] <= (2 * torch.finfo(dtype).eps * theirs.double().abs()).clamp(min=1e-35)[:-1]).all()
    assert ours[-1] == float("inf")
    if dtype != torch.float32:
        assert (error[:-1] > 0).float().mean() < 1e-3
    broken = torch.tensor([[float("nan"), 1], [1, float("nan")], [-float("inf"), 1]], dtype=dtype)
    assert convention.silu_mul(broken).isnan().all()


@many
@given(SEEDS, st.sampled_from([1, 5, 195]), st.sampled_from([(100, 4, 1), (24, 8, 3), (2176, 128, 17)]), DTYPES,
       st.sampled_from([0, 24]))  # fmt: skip
def test_silu_mul_in_front_of_a_layer(tier, seed, m, shape, dtype, rank):  # noqa: F811
    k, block, groups = shape
    _, packed, scale, bias = linear_case(seed, 1, k, 70, dtype, groups, 4)
    x, prepared = gate_up(m, k, seed, dtype), ops.prepare_weight(packed, 4, k, groups)
    generator = torch.Generator().manual_seed(seed)
    branch = [torch.randn(s, generator=generator).to(dtype) for s in ((k, rank), (rank, 70))] if rank else [None, None]
    rest = (bias, 4, "hadamard", block, None, 4, False, 0.8, *branch)
    actual = ops.int_linear(x, prepared, scale, *rest, True)
    assert same(actual, ops.int_linear(convention.silu_mul(x), prepared, scale, *rest))
    if not rank:
        assert same(actual, reference.int_linear(x, packed, scale, *rest, True))


def test_results_do_not_depend_on_the_batch_the_strides_or_the_threads(gemm_tier):  # noqa: F811
    x, packed, scale, bias = linear_case(3, 300, 512, 200, torch.bfloat16, 4, 4)
    prepared = ops.prepare_weight(packed, 4, 512, 4)
    run = lambda rows: ops.int_linear(rows, prepared, scale, bias, 4, "hadamard", 128, None, 4, False, 0.9)  # noqa: E731
    whole = run(x)
    assert same(torch.cat([run(row) for row in x.split([1, 5, 6, 7, 81, 200])]), whole)
    down, up = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in ((512, 40), (40, 200)))
    rest = (prepared, scale, bias, 4, "none", 0, None, 4, False, 0.9, down.bfloat16() / 32, up.bfloat16(), False, True)
    beside = ops.int_linear(x, *rest)  # with a branch that takes its directions off the input
    assert same(torch.cat([ops.int_linear(row, *rest) for row in x[:80].split([1, 1, 5, 1, 72])]), beside[:80])
    wide = torch.full((300, 700), 1e9, dtype=torch.bfloat16)
    wide[:, 100:612] = x
    assert same(run(wide[:, 100:612]), whole)
    assert same(run(x.view(3, 100, 512)).view(300, -1), whole)
    assert same(run(x.t().contiguous().t()), whole)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert same(run(x), whole)
        assert same(run(x[:1]), whole[:1])
    finally:
        torch.set_num_threads(before)


def test_wrong_arguments_are_refused_by_name():
    x, packed, scale, _ = linear_case(1, 2, 64, 70, torch.float32, 1, 4)
    prepared = ops.prepare_weight(packed, 4, 64, 1)
    good = [x, prepared, scale, None, 4, "hadamard", 64, None, 4, True, 0.9]
    for place, wrong, word in (
        (0, x.double(), "x must be float32"),
        (0, x[:, :32].contiguous(), "prepare_weight"),
        (1, packed, "prepare_weight"),
        (2, scale[:64], "prepare_weight"),
        (2, scale.double(), "weight_scale"),
        (3, scale[:3, 0], "bias"),
        (4, 8, "prepare_weight"),
        (5, "fourier", "fourier"),
        (6, 48, "48 does not divide 64"),
        (8, 16, "16 bits"),
        (10, 0.0, "clip"),
    ):
        arguments = list(good)
        arguments[place] = wrong
        with pytest.raises(RuntimeError, match=word):
            ops.int_linear(*arguments)
    with pytest.raises(RuntimeError, match="gate and up, not 63"):
        ops.quantize_rows(x[:, :63], "none", 0, None, 4, True, 0.9, True)
    with pytest.raises(RuntimeError, match="a dense transform needs its tensor"):
        ops.quantize_rows(x, "dense", 64, None, 4, True, 0.9)
    with pytest.raises(RuntimeError, match="does not hold"):
        ops.prepare_weight(packed, 4, 72, 1)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_library_is_compiled_once_and_a_broken_compiler_is_loud(tmp_path):
    show = "from rotquant_kernels import ops; print(ops.kernel_of('int_linear'))"
    broken = python(show, XDG_CACHE_HOME=str(tmp_path), CXX="false", PATH=os.path.dirname(sys.executable))
    assert broken.stdout.strip() == "reference (torch)"
    assert "not available" in broken.stderr
    assert "compiler" in broken.stderr
    quick = {"XDG_CACHE_HOME": str(tmp_path), "ROTQUANT_CPU_TIER": "scalar", "CXXFLAGS": "-O0"}
    first, second = (python(show, **quick) for _ in range(2))
    assert first.stdout == second.stdout == "native (scalar)\n"
    assert "compiling" in first.stderr
    assert "compiling" not in second.stderr
    assert python(show, ROTQUANT_CPU_TIER="reference").stdout == "reference (torch)\n"
    wrong = python(show, ROTQUANT_CPU_TIER="sse9")
    assert wrong.returncode
    assert "sse9" in wrong.stderr


def test_fingerprint_follows_flags(monkeypatch):
    before = build.fingerprint()
    monkeypatch.setenv("CXXFLAGS", "-O1")
    assert build.fingerprint() != before
    assert native.cache_folder().name.endswith(build.fingerprint())
