"""The Triton kernels of linear layers in Triton's interpreter, on CPU tensors: run by `test_cuda_linear.py` in a
process of its own, since Triton decides at its import whether it interprets."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import empty_steps
import test_experts
from rotquant_kernels import KINDS, convention, reference
from rotquant_kernels.cuda import experts, gemm, layout, linear, rows, scaled_mm
from rotquant_kernels.cuda.device import Device
from test_linear_native import activations, gate_up, linear_case, same

SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
# columns, block of the Hadamard or 0: less than a warp, no power of two, a block of a whole long row
SHAPES = st.sampled_from([(1, 0), (7, 0), (100, 4), (64, 64), (96, 32), (768, 256), (4096, 4096), (14336, 2048)])
few = settings(max_examples=18, deadline=None, suppress_health_check=[HealthCheck.too_slow],
               phases=[Phase.explicit, Phase.generate])  # fmt: skip
# shrinking a failure would take minutes here


def inputs(m: int, k: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of every kind; bfloat16 without subnormals, which the interpreter reads wrongly. (It also rounds to bfloat16
    by truncation, so no result here is one.)"""
    x = activations(m, k, seed, dtype)
    return x.masked_fill(x.abs() < torch.finfo(dtype).tiny, 0) if dtype == torch.bfloat16 else x


def all_same(got, expected) -> bool:
    return all(same(a, b) for a, b in zip(got, expected, strict=True))


@few
@given(SEEDS, st.integers(0, 5), SHAPES, DTYPES, st.sampled_from([4, 8, 5]), st.booleans(),
       st.sampled_from([1.0, 0.9, 0.35, 1e-4]))  # fmt: skip
def test_quantized_rows_are_the_references_bit_for_bit(seed, m, shape, dtype, bits, symmetric, clip):
    k, block = shape
    x = inputs(m, k, seed, dtype)
    settings = ("hadamard" if block else "none", block, None, bits, symmetric, clip)
    assert all_same(rows.quantize_rows(x, *settings), reference.quantize_rows(x, *settings))
    if block:
        rotated = reference.online_stage(x, *settings[:3])
        assert same(rows.online_stage(x, *settings[:3]).nan_to_num(0, 0, 0), rotated.nan_to_num(0, 0, 0))


@pytest.mark.parametrize(("k", "block"), [(18944, 512), (24576, 8192), (32768, 32768), (70000, 0)])
def test_rows_that_go_through_a_program_in_parts_are_the_references_too(k, block):
    """Blocks within a part, as large as a part, and over several; more rows than programs."""
    turn = ("hadamard" if block else "none", block, None)
    x, both = inputs(5, k, block, torch.float16), gate_up(2, k, block, torch.float16)
    for bits, symmetric in ((4, False), (8, True)):
        settings = (*turn, bits, symmetric, 0.9)
        assert all_same(rows.quantize_rows(x, *settings), reference.quantize_rows(x, *settings))
        assert all_same(rows.quantize_rows(both, *settings, True), reference.quantize_rows(both, *settings, True))
    rotated = reference.turned(x, *turn)
    assert same(rows.turned(x, *turn).nan_to_num(0, 0, 0), rotated.nan_to_num(0, 0, 0))


@pytest.mark.parametrize("silu_mul", [False, True])
@pytest.mark.parametrize(("m", "k"), [(1, 6), (5, 72), (3, 1000), (2, 16640)])
def test_a_shift_is_taken_inside_the_launch(m, k, silu_mul):
    """Of rows that go through a program in parts, too."""
    x = gate_up(m, k, m, torch.float16) if silu_mul else inputs(m, k, m, torch.float16)
    shift = torch.randn(k, generator=torch.Generator().manual_seed(k))
    for bits, symmetric in ((4, False), (8, True)):
        settings = ("shift", 0, shift, bits, symmetric, 0.9, silu_mul)
        assert all_same(rows.quantize_rows(x, *settings), reference.quantize_rows(x, *settings))
    with pytest.raises(ValueError, match="a shift of"):
        rows.quantize_rows(x, "shift", 0, shift[1:], 4, True, 0.9, silu_mul)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("m", "k", "block"), [(1, 6, 1), (5, 72, 24), (40, 192, 64), (3, 256, 128)])
def test_a_dense_stage_is_the_product(m, k, block, dtype):
    """Tiles and what is left of them; rows with a stride, and with dimensions of their own."""
    generator = torch.Generator().manual_seed(block)
    matrix = torch.linalg.qr(torch.randn(block, block, generator=generator)).Q.contiguous()
    wide = torch.randn(m, k + 3, generator=generator).to(dtype)
    expected = (wide[:, 3:].double().unflatten(-1, (-1, block)) @ matrix.double()).flatten(-2)
    whole = rows.online_stage(wide[:, 3:], "dense", block, matrix.mT.contiguous().mT)
    assert whole.dtype == torch.float32
    assert (whole - expected).abs().max() < 1e-5 * expected.abs().max()
    assert same(rows.online_stage(wide[None, :, 3:], "dense", block, matrix)[0], whole)
    assert same(rows.online_stage(wide[:1, 3:], "dense", block, matrix), whole[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_stages_without_a_kernel_are_the_references(kind):
    x, tensor = torch.randn(5, 128), KINDS[kind].sample(32, 128, torch.Generator().manual_seed(1))
    given = x if kind not in rows.STAGES else x.double()
    assert same(rows.online_stage(given, kind, 32, tensor), reference.online_stage(given, kind, 32, tensor))


@few
@given(SEEDS, st.sampled_from([(1, 5), (9, 8), (3, 77), (130, 1), (64, 64), (70, 3000)]), st.sampled_from([4, 8]))
def test_the_layout_holds_every_code_and_every_sum(seed, shape, bits):
    low, high = convention.int_range(bits)
    codes = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    weight = layout.unpack(
        layout.pack_weight(convention.pack_int32(codes, bits), bits, shape[1], 1), bits, shape[1], shape[0], 1
    )
    chunks = weight.words.transpose(0, 1)
    if bits == 4:
        chunks = torch.cat((chunks << 4 >> 4, chunks >> 4), -1)
    assert torch.equal(chunks.flatten(1)[: shape[0], : shape[1]], codes)
    assert not chunks.flatten(1)[:, shape[1] :].any()
    assert not chunks[shape[0] :].any()
    assert torch.equal(weight.sums[0, : shape[0]], codes.sum(1, dtype=torch.int32))


@few
@given(SEEDS, st.sampled_from([1, 3, 17, 33, 70]),
       st.sampled_from([(64, 0, 1), (100, 4, 1), (77, 0, 1), (512, 256, 4), (192, 64, 2), (96, 32, 3), (2048, 0, 8),
                        (192, 0, 2), (480, 0, 3)]),
       st.sampled_from([1, 63, 130]), st.sampled_from([torch.float32, torch.float16]), st.sampled_from([4, 8]),
       st.sampled_from([4, 8]), st.booleans(), st.booleans(), st.booleans())  # fmt: skip
def test_linear_is_the_reference_bit_for_bit(seed, m, shape, n, dtype, w_bits, a_bits, symmetric, with_bias, split):
    k, block, groups = shape
    if split:  # the columns, among the many processors of a GPU
        k, block, groups = {64: 1024, 100: 1536, 77: 2047}.get(k, k), 0, 1
    x, packed, scale, bias = linear_case(seed, m, k, n, dtype, groups, w_bits)
    rest = (bias if with_bias else None, w_bits, "hadamard" if block else "none", block, None, a_bits, symmetric, 0.8)
    with mock.patch.object(gemm, "device_of", return_value=Device(132, 8, 90 * split)) if split else nullcontext():
        actual = gemm.int_linear(x, layout.pack_weight(packed, w_bits, k, groups), scale, *rest)
    assert same(actual, reference.int_linear(x, packed, scale, *rest))


@pytest.mark.parametrize("splits", [2, 3, 8])
def test_columns_in_parts_are_the_whole(splits):
    """More parts than steps, and parts that do not divide them; a branch and a bias are added once. The branch's floats
    are summed here in an order that the processor chooses for the shape."""
    _, packed, scale, bias = linear_case(4, 1, 700, 70, torch.float32, 1, 4)
    generator = torch.Generator().manual_seed(splits)
    x, down, up = (torch.randn(shape, generator=generator) for shape in ((33, 700), (700, 20), (20, 70)))
    rest = layout.pack_weight(packed, 4, 700, 1), scale, bias, 4, "none", 0, None, 4, False, 0.8
    launches = []
    real = gemm.tiles

    def cut(*given):
        launches.append(splits)
        return real(*given)._replace(splits=splits)

    for branch in ((None, None), (down, up)):
        whole = gemm.int_linear(x, *rest, *branch)
        with mock.patch.object(gemm, "tiles", cut):
            parts = gemm.int_linear(x, *rest, *branch)
        assert same(parts, whole) if branch[0] is None else torch.allclose(parts, whole, rtol=1e-5, atol=1e-3)
    assert launches == [splits, splits]


def test_the_largest_integers_are_exact():
    """16 K q_w q_x of the longest rows fits into the accumulator, also as the kernel shifts it."""
    k, n = 28672, 1
    codes = torch.full((n, k), -8, dtype=torch.int8)
    x = torch.full((1, k), -1.0)
    x[0, 0] = 1.0
    rest = (None, 4, "none", 0, None, 8, False, 1.0)
    packed, scale = convention.pack_int32(codes, 4), torch.ones(n, 1)
    actual = gemm.int_linear(x, layout.pack_weight(packed, 4, k, 1), scale, *rest)
    assert same(actual, reference.int_linear(x, packed, scale, *rest))


@pytest.mark.parametrize("rank", [1, 20])
def test_dense_transforms_and_the_low_rank_branch(rank):
    k, n, m, block = 192, 70, 5, 24
    _, packed, scale, bias = linear_case(rank, 1, k, n, torch.float32, 1, 4)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(m, k, generator=generator)
    matrix = torch.linalg.qr(torch.randn(block, block, generator=generator)).Q.contiguous()
    down, up = (torch.randn(shape, generator=generator) for shape in ((k, rank), (rank, n)))
    weight = layout.pack_weight(packed, 4, k, 1)
    shift = torch.randn(k, generator=generator)
    for transform, size, tensor in (
        ("dense", block, matrix), ("hadamard", 64, None), ("shift", 0, shift), ("none", 0, None),
    ):  # fmt: skip
        rest = (bias, 4, transform, size, tensor, 4, False, 0.8)
        actual = gemm.int_linear(x, weight, scale, *rest, down, up)
        expected = reference.int_linear(x, packed, scale, *rest, down, up)
        plain = reference.int_linear(x, packed, scale, *rest)
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (actual - plain).abs().max() > 0.1 * expected.abs().max()
        subtracted = reference.int_linear(x, packed, scale, *rest, down / 16, up, low_rank_subtracts=True)
        actual = gemm.int_linear(x, weight, scale, *rest, down / 16, up, low_rank_subtracts=True)
        assert (actual - subtracted).abs().max() <= 1e-5 * subtracted.abs().max()


def test_results_do_not_depend_on_the_batch_or_the_strides():
    x, packed, scale, bias = linear_case(3, 36, 128, 40, torch.float16, 2, 4)
    weight = layout.pack_weight(packed, 4, 128, 2)
    run = lambda x: gemm.int_linear(x, weight, scale, bias, 4, "hadamard", 64, None, 4, False, 0.9)  # noqa: E731
    whole = run(x)
    assert same(torch.cat([run(part) for part in x.split([1, 5, 30])]), whole)
    wide = torch.full((36, 200), 1e4, dtype=torch.float16)
    wide[:, 30:158] = x
    assert same(run(wide[:, 30:158]), whole)
    assert same(run(x.view(2, 18, 128)).view(36, -1), whole)
    assert same(run(x.t().contiguous().t()), whole)
    assert run(x[:0]).shape == (0, 40)


def test_every_tile_of_a_long_batch_is_made():
    """Also where the tiles of tokens that go together are no whole number of them."""
    x, packed, scale, _ = linear_case(7, 1100, 64, 200, torch.float32, 1, 4)
    rest = (None, 4, "none", 0, None, 4, False, 0.9)
    expected = reference.int_linear(x, packed, scale, *rest)
    for device in (Device(1, 8), Device(132, 8, 90)):  # narrow tiles, and Hopper's wide ones
        with mock.patch.object(gemm, "device_of", return_value=device):
            assert same(gemm.int_linear(x, layout.pack_weight(packed, 4, 64, 1), scale, *rest), expected)


def served_product(codes, weight, scale, weight_scale, dtype, sums, zero):
    """A server's GEMM in torch, as CUTLASS asks to be called and in the order in which it multiplies."""
    assert (codes.dtype, weight.dtype, codes.stride(1), weight.stride(0)) == (torch.int8, torch.int8, 1, 1)
    assert (len(codes) == len(scale), weight.shape[1] == len(weight_scale)) == (True, True)
    acc = codes.double() @ weight.double()
    if sums is not None:
        assert (sums.dtype, zero.dtype, sums.shape) == (torch.int32, torch.int32, (1, weight.shape[1]))
        acc = acc - zero.double() * sums
    return (acc.float() * weight_scale.t() * scale).to(dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_many_tokens_over_an_unpacked_weight_are_the_same(monkeypatch, bits, symmetric):
    """From the table's number of tokens on; what the server's GEMM would not compute alike stays in Triton."""
    calls = []
    product = scaled_mm.Provided("-", lambda *given: calls.append(1) or served_product(*given))
    monkeypatch.setattr(scaled_mm, "_provided", product)
    monkeypatch.setattr(gemm, "device_of", lambda _: Device(132, 8, 90))
    real = gemm.tiles
    monkeypatch.setattr(gemm, "tiles", lambda tokens, *a: real(max(tokens, 5000), *a))  # an interpreter is slow
    for k, n, dtype, biased, taken in (
        (304, 208, torch.float16, False, 1), (64, 16, torch.bfloat16, False, 1), (64, 16, torch.float16, True, 0),
        (64, 16, torch.float32, False, 0), (72, 16, torch.float16, False, 0), (64, 24, torch.float16, False, 0),
    ):  # fmt: skip
        x, packed, scale, bias = linear_case(k, 5, k, n, torch.float16, 1, bits)
        codes = reference.quantize_rows(x, "none", 0, None, 8, symmetric, 0.9)
        rest = scale, bias.to(dtype) if biased else None, bits, symmetric, dtype
        y = gemm.quantized_linear(*codes, layout.pack_weight(packed, bits, k, 1), *rest)
        assert same(y, reference.quantized_linear(*codes, packed, *rest))
        assert len(calls) == taken
        calls.clear()
    monkeypatch.setattr(gemm, "tiles", real)
    gemm.quantized_linear(*codes, layout.pack_weight(packed, bits, k, 1), *rest)
    assert not calls


def nearly(got, expected) -> None:
    """Codes equal but for ties: one step, in less than one of two hundred."""
    difference = (got[0].int() - expected[0].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.005
    assert torch.allclose(got[1], expected[1], rtol=0.01)


@few
@given(SEEDS, SHAPES, st.sampled_from([torch.float32, torch.float16]), st.booleans())
def test_silu_mul_in_front_is_the_references_bit_for_bit(seed, shape, dtype, symmetric):
    k, block = shape
    x = gate_up(4, k, seed, dtype)
    settings = ("hadamard" if block else "none", block, None, 4, symmetric, 0.9, True)
    assert all_same(rows.quantize_rows(x, *settings), reference.quantize_rows(x, *settings))


@pytest.mark.parametrize("transform", ["hadamard", "dense", "none"])
def test_silu_mul_in_front_of_a_layer(transform):
    """Also where the low-rank branch or a dense product reads its rows."""
    m, k, n = 9, 96, 70
    _, packed, scale, bias = linear_case(6, 1, k, n, torch.float16, 1, 4)
    x, weight = gate_up(m, k, 6, torch.float16), layout.pack_weight(packed, 4, k, 1)
    generator = torch.Generator().manual_seed(6)
    matrix = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q.contiguous()
    rest = (bias, 4, transform, 32, matrix if transform == "dense" else None, 4, True, 0.9)
    for rank in (0, 8):
        branch = [torch.randn(s, generator=generator) for s in ((k, rank), (rank, n))] if rank else [None, None]
        expected = gemm.int_linear(convention.silu_mul(x), weight, scale, *rest, *branch)
        assert same(gemm.int_linear(x, weight, scale, *rest, *branch, True), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_norm_quantizes_in_one_launch(dtype, symmetric):
    generator = torch.Generator().manual_seed(4)
    x, residual = ((3 * torch.randn(6, 768, generator=generator)).to(dtype) for _ in range(2))
    weight = (1 + torch.randn(768, generator=generator) / 4).to(dtype)
    shift = torch.randn(768, generator=generator)
    for before, by in ((residual, None), (residual.t().contiguous().t(), shift), (None, None), (None, shift)):
        arguments = (x, before, weight, 1e-6, 8, symmetric, 1.0, by)
        expected = reference.rms_norm_quantize(*arguments)
        got = rows.rms_norm_quantize(*arguments)
        nearly(got, expected)
        assert same(got[3], expected[3])
    with pytest.raises(ValueError, match="residual stream"):
        rows.rms_norm_quantize(x, residual.double(), weight, 1e-6, 8, symmetric, 1.0)


def test_a_linear_layer_of_quantized_rows_is_the_whole():
    x, packed, scale, bias = linear_case(5, 20, 192, 90, torch.float16, 3, 4)
    weight = layout.pack_weight(packed, 4, 192, 3)
    whole = gemm.int_linear(x, weight, scale, bias, 4, "hadamard", 64, None, 4, False, 0.9)
    quantized = rows.quantize_rows(x, "hadamard", 64, None, 4, False, 0.9)
    assert same(gemm.quantized_linear(*quantized, weight, scale, bias, 4, False, x.dtype), whole)
    plain = reference.quantized_linear(*quantized, packed, scale, bias, 4, False, x.dtype)
    assert same(plain, whole)


def test_wrong_arguments_are_refused_by_name():
    x, packed, scale, _ = linear_case(1, 2, 64, 70, torch.float32, 1, 4)
    good = [x, layout.pack_weight(packed, 4, 64, 1), scale, None, 4, "hadamard", 64, None, 4, True, 0.9]
    for place, wrong, word in (
        (0, x[:, :32].contiguous(), "does not divide 32"),
        (1, packed, "prepare_weight"),
        (2, torch.ones(200, 1), "prepare_weight"),
        (2, scale.double(), "weight_scale must be float32"),
        (3, scale[:3, 0], "bias"),
        (4, 8, "prepare_weight"),
        (5, "fourier", "fourier"),
        (6, 48, "48 is no power of two"),
        (8, 16, "16 bits"),
        (10, 0.0, "clip"),
    ):
        arguments = list(good)
        arguments[place] = wrong
        with pytest.raises(ValueError, match=word):
            gemm.int_linear(*arguments)
    with pytest.raises(ValueError, match="do not hold"):
        layout.pack_weight(packed, 4, 72, 1)
    with pytest.raises(ValueError, match="multiple of 32"):
        layout.pack_weight(packed, 4, 64, 4)
    for block, matrix, word in (
        (32, None, "needs its matrix"), (48, torch.eye(48), "48 does not divide 64"), (32, torch.eye(16), "float32"),
        (32, torch.eye(32).double(), r"float32 \[32, 32\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            rows.online_stage(x, "dense", block, matrix)
    with pytest.raises(ValueError, match="norm of 40000 columns"):
        rows.rms_norm_quantize(torch.zeros(1, 40000), None, torch.ones(40000), 1e-5, 4, True, 1.0)


@pytest.mark.parametrize("columns", [32, 384, 16416])
def test_codes_for_humming_are_the_same_in_its_order(columns):
    x = inputs(5, columns, 7, torch.float16)
    codes, *rest = rows.quantize_rows(x, "hadamard", 32, None, 4, True, 0.9)
    pairs = codes.view(5, -1, 2, 16).transpose(-1, -2)  # position 2 b + h of a chunk is column 16 h + b
    eight, *same_scale = rows.quantize_rows(x, "hadamard", 32, None, 4, True, 0.9, order="humming8")
    assert all_same(same_scale, rest)
    assert torch.equal(eight, pairs.flatten(1))
    four = rows.quantize_rows(x, "hadamard", 32, None, 4, True, 0.9, order="humming4")[0]
    assert torch.equal(torch.stack((four << 4 >> 4, four >> 4), -1).flatten(1), pairs.flatten(1))


@pytest.mark.parametrize(("tokens", "bits", "groups", "places"), [(9, 4, 2, [5, 2, 6]), (13, 8, 1, None)])
def test_experts_are_the_specification_bit_for_bit(monkeypatch, tokens, bits, groups, places):
    """Some without tokens, some of another process; a row of zeros and one that is not finite."""
    monkeypatch.setattr(test_experts, "HIDDEN", 64)
    mixture = test_experts.Mixture(tokens, 64, 16, bits, groups, torch.float16)
    expected = mixture.run(test_experts.SPECIFICATION, places=places, act_bits=bits, symmetric=bits == 8)
    monkeypatch.setattr(test_experts, "prepare_experts", layout.pack_weight)
    got = mixture.run(experts.moe_experts, places=places, act_bits=bits, symmetric=bits == 8)
    assert same(got, expected)


def test_tiles_of_experts_hold_every_pair_once():
    """Of many pairs, whose tiles are more than one for an expert: by number, without a product."""
    chosen = (torch.randn(300, 7, generator=torch.Generator().manual_seed(1)) + torch.arange(7)).topk(3).indices
    pairs = experts.sorted_pairs(chosen, None, 7)
    tables = experts.tiles_of(pairs, 32)
    seen = []
    for expert, first, count in zip(*(table.tolist() for table in tables), strict=True):
        for pair in range(first, first + max(count, 0)):
            assert expert in chosen[pairs.token[pair]]
            seen.append(pair)
    assert sorted(seen) == list(range(900))
    assert torch.equal(pairs.token[pairs.place.long()].view(300, 3), torch.arange(300)[:, None].expand(-1, 3).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_without_rows(dtype):
    kernels = {**rows.IMPLEMENTATIONS, **gemm.IMPLEMENTATIONS, **linear.IMPLEMENTATIONS, **experts.IMPLEMENTATIONS}
    assert empty_steps.check(kernels, dtype) >= {
        "online_stage",
        "quantize_rows",
        "int_linear",
        "rms_norm_quantize",
        "quantized_linear",
        "moe_experts",
    }
