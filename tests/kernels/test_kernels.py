"""The numeric convention against compressed-tensors, and every op against an independent computation."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from rotquant_kernels import (
    OPS,
    convention,
    int_linear,
    prepare_weight,
    quantize_rows,
    reference,
)
from rotquant_kernels.formats import KVFormat

SEEDS = st.integers(0, 2**31)


def randn(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 70), st.sampled_from([4, 8]), st.booleans(), st.sampled_from([1e-4, 1.0, 1e4]))
def test_convention_is_that_of_compressed_tensors(seed, columns, bits, symmetric, size):
    x = randn(5, columns, seed=seed, scale=size)
    x[1] = 0
    x[2] = x[2].abs()
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="token", dynamic=True)
    scale, zero = calculate_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), args)
    expected = fake_quantize(x, scale, zero, args)
    ours, our_zero = convention.qparams(x, bits, symmetric)
    actual = convention.dequantize(convention.quantize(x, ours, our_zero, bits), ours, our_zero)
    assert torch.equal(actual, expected)


@given(SEEDS, st.integers(1, 40), st.sampled_from([4, 8]))
def test_packing_is_that_of_compressed_tensors(seed, columns, bits):
    low, high = convention.int_range(bits)
    q = torch.randint(low, high + 1, (3, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = convention.pack_int32(q, bits)
    assert torch.equal(packed, pack_to_int32(q, bits))
    assert torch.equal(convention.unpack_int32(packed, bits, columns), q)


@given(SEEDS, st.floats(0.3, 1.0))
def test_clip_shrinks_the_range_and_saturates(seed, clip):
    x = randn(4, 64, seed=seed)
    scale, zero = convention.qparams(x, 4, True, clip)
    assert torch.allclose(scale, x.abs().amax(1, keepdim=True) * clip / 7.5)
    assert convention.quantize(x, scale, zero, 4).abs().max() <= 8


@pytest.mark.parametrize("block", [1, 2, 64, 256])
def test_hadamard_is_sylvesters_and_its_own_inverse(block):
    x = randn(6, 512, seed=block).double()
    h = deterministic_hadamard_matrix(block, torch.float64) / block**0.5
    expected = (x.unflatten(-1, (-1, block)) @ h).flatten(-2)
    assert torch.allclose(reference.hadamard(x, block), expected, atol=1e-12)
    assert torch.allclose(reference.hadamard(reference.hadamard(x, block), block), x, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    SEEDS, st.integers(1, 9), st.sampled_from([16, 48, 176]), st.integers(1, 33), st.sampled_from([4, 8]),
    st.sampled_from([4, 8]), st.booleans(), st.sampled_from([0.7, 1.0]), st.sampled_from(["none", "hadamard", "dense"]),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_int_linear_is_the_product_of_the_dequantized(
    seed, m, k, n, w_bits, a_bits, symmetric, clip, kind, bias, grouped
):
    x, w = randn(m, k, seed=seed), randn(n, k, seed=seed + 1)
    matrix = torch.linalg.qr(randn(16, 16, seed=seed + 2)).Q if kind == "dense" else None
    groups = w.unflatten(1, (-1, 16 if grouped else k))
    scale, zero = convention.qparams(groups, w_bits, True)
    codes = convention.quantize(groups, scale, zero, w_bits)
    b = randn(n, seed=seed + 3) if bias else None
    packed = prepare_weight(convention.pack_int32(codes.flatten(1), w_bits), w_bits, k, scale.shape[1])
    actual = int_linear(x, packed, scale.squeeze(-1), b, w_bits, kind, 16, matrix, a_bits, symmetric, clip)
    q, s, z = quantize_rows(x, kind, 16, matrix, a_bits, symmetric, clip)
    expected = convention.dequantize(q, s, z).double() @ convention.dequantize(codes, scale, zero).flatten(1).double().T
    expected = expected + b if bias else expected
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-6


def test_int_linear_does_not_depend_on_the_batch():
    x, w = randn(33, 64, seed=1), randn(24, 64, seed=2)
    scale, zero = convention.qparams(w, 4, True)
    packed = prepare_weight(convention.pack_int32(convention.quantize(w, scale, zero, 4), 4), 4, 64)
    run = lambda rows: int_linear(rows, packed, scale, None, 4, "hadamard", 64, None, 4, False, 0.9)  # noqa: E731
    assert torch.equal(run(x), torch.cat([run(row) for row in x.split(1)]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rotate", [0, 64])
def test_kv4_reference_is_attention_over_fake_quantized_kv(symmetric, rotate):
    block, heads, d, lengths, steps = 16, 2, 64, [37, 5, 20, 33], [4, 1, 1, 33]
    cache = torch.full((12, heads, block, reference.kv_token_bytes(d, symmetric)), 255, dtype=torch.uint8)
    table = torch.tensor([[3, 1, 7], [0, 11, 11], [2, 5, 11], [4, 6, 8]], dtype=torch.int32)
    keys = [randn(n, heads, d, seed=n) for n in lengths]
    values = [randn(n, heads, d, seed=n + 100) for n in lengths]
    for row, k, v in zip(table, keys, values, strict=True):
        slots = torch.tensor([row[i // block] * block + i % block for i in range(len(k))] + [-1])
        pad = torch.full((1, heads, d), 1e4)
        reference.kv4_write(torch.cat((k, pad)), torch.cat((v, pad)), cache, slots, rotate, symmetric, 0.95, 0.9)
    starts = torch.tensor([0, *torch.tensor(steps).cumsum(0)], dtype=torch.int32)
    query = randn(sum(steps) + 2, 4, d, seed=7)
    lens = torch.tensor(lengths, dtype=torch.int32)
    out = torch.full_like(query, float("nan"))
    reference.kv4_attention(query, cache, starts, lens, table, out, d**-0.5, rotate, symmetric)
    assert out[sum(steps) :].abs().max() == 0
    for b, (k, v) in enumerate(zip(keys, values, strict=True)):
        q = query[starts[b] : starts[b + 1]]
        if rotate:
            q, k = reference.hadamard(q, rotate), reference.hadamard(k, rotate)
        form = KVFormat(symmetric, 0.95, 0.9, rotate)
        k, v = form.key.fake_quantize(k), form.value.fake_quantize(v)
        k, v, q = (t.repeat_interleave(4 // t.shape[1], 1).movedim(1, 0) for t in (k, v, q))
        visible = torch.ones(steps[b], lengths[b]).tril(lengths[b] - steps[b]).bool()
        expected = (q @ k.mT * d**-0.5).masked_fill(~visible, float("-inf")).softmax(-1) @ v
        assert (out[starts[b] : starts[b + 1]] - expected.movedim(0, 1)).abs().max() < 1e-5


def test_kv_page_really_holds_four_bits():
    for d, ratio in ((64, 3.5), (128, 3.7)):
        assert 4 * d / reference.kv_token_bytes(d, symmetric=False) >= ratio


def test_schemas_and_fakes_hold_under_torch_compile():
    x, w = randn(3, 32, seed=1), randn(8, 32, seed=2)
    scale, zero = convention.qparams(w, 4, True)
    packed = prepare_weight(convention.pack_int32(convention.quantize(w, scale, zero, 4), 4), 4, 32)
    checks = ("test_schema", "test_faketensor")
    arguments = (x, packed, scale, None, 4, "hadamard", 32, None, 4, True, 0.9)
    torch.library.opcheck(torch.ops.rotquant.int_linear.default, arguments, test_utils=checks)
    torch.library.opcheck(
        torch.ops.rotquant.quantize_rows.default, (x, "none", 0, None, 4, False, 1.0), test_utils=checks
    )
    cache = torch.zeros(2, 1, 16, reference.kv_token_bytes(32, True), dtype=torch.uint8)
    kv = (x.view(3, 1, 32), x.view(3, 1, 32), cache, torch.tensor([0, 5, -1]), 32, True, 1.0, 1.0)
    torch.library.opcheck(torch.ops.rotquant.kv4_write.default, kv, test_utils=checks)
    assert set(OPS) == {
        "online_stage", "quantize_rows", "pack_weight", "int_linear", "kv4_write", "kv4_attention",
        "rms_norm_quantize", "quantized_linear", "moe_experts",
    }  # fmt: skip
