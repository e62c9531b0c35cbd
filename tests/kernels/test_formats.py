"""Number formats: what travels in the place of plain numbers, against the arithmetic and the ops that it stands for."""

import pytest
import torch

from rotquant_kernels import calls, reference
from rotquant_kernels.formats import KVFormat, RowFormat, WeightFormat, feedback


def rows(n: int = 6, k: int = 64) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 3 + 1


@pytest.mark.parametrize("form", [RowFormat(4, False, 0.8), RowFormat(8), KVFormat(False, 0.9, 1.0, 0).key])
def test_the_parts_that_learning_uses_are_the_whole(form):
    """range_of, stored, stored_zero and nearest between them make what qparams and quantize make."""
    x = rows()
    scale, bottom = form.range_of(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), form.clip)
    scale = form.stored(scale)
    zero = torch.zeros_like(scale) if bottom is None else form.stored_zero(bottom, scale)
    whole = form.qparams(x)
    assert torch.equal(scale, whole[0])
    assert torch.equal(zero, whole[1])
    codes, inside = form.nearest(x / scale + zero)
    assert torch.equal(codes.to(torch.int8), form.quantize(x, *whole))
    exact, (low, high) = (x / scale + zero).round(), form.bounds
    assert torch.equal(inside, (exact >= low) & (exact <= high))
    assert torch.equal(form.dequantize(form.quantize(x, *whole), *whole), form.fake_quantize(x))
    if bottom is not None:  # what is held is the formula's, rounded
        assert (form.zero_of(bottom, scale) - zero).abs().max() <= 0.5 + 1e-4


def test_a_step_is_the_unclipped_scale_and_a_clip_ratio_is_exchanged():
    x, form = rows(), RowFormat(4, False, 0.7)
    assert torch.equal(form.step(x), form.clipped(1.0).qparams(x)[0][:, 0])
    assert form.clipped(None) is form
    assert {form, form.clipped(0.7)} == {form}  # of equal value, so that layers can be sorted by it


@pytest.mark.parametrize(("bits", "group"), [(4, 0), (4, 20), (8, 32)])
def test_a_weight_comes_back_from_its_packed_form(bits, group):
    form, weight = WeightFormat(bits, group), rows(5, 160 if group else 61)
    columns = weight.shape[1]
    scale = form.scale(form.grouped(weight)).squeeze(-1)
    assert scale.shape == (5, form.groups(columns))
    codes = form.quantize(weight, scale)
    packed = form.pack(codes)
    assert packed.shape == (5, form.words(columns))
    assert torch.equal(form.unpack(packed, columns), codes)
    assert (
        (form.dequantize(codes, scale) - weight).abs() <= 0.51 * scale.repeat_interleave(columns // scale.shape[1], 1)
    ).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_the_ops_are_given_is_the_format(symmetric):
    """Codes, products and pages made through `calls` are the format's own arithmetic."""
    x, form, weights = rows(4, 32), RowFormat(4, symmetric, 0.9), WeightFormat(4, 16)
    codes, scale, zero = calls.quantize(x, form)
    expected = form.qparams(x)
    assert torch.equal(codes, form.quantize(x, *expected))
    assert torch.equal(zero.float(), expected[1])
    weight = rows(32, 32)
    s = weights.scale(weights.grouped(weight)).squeeze(-1)
    stored = weights.quantize(weight, s)
    seen = form.dequantize(codes, scale, zero.float()) @ weights.dequantize(stored, s).T
    got = reference.int_linear(x, weights.pack(stored), s, None, 4, "none", 0, None, *calls.plain(form))
    torch.testing.assert_close(got, seen, rtol=1e-4, atol=1e-3)
    kv = KVFormat(symmetric, 0.9, 0.8, 16)
    pages = torch.zeros(1, 2, 16, kv.token_bytes(16), dtype=torch.uint8)
    key, value = (part.view(3, 2, 16) for part in rows(6, 32).split(3))
    calls.kv_write(key, value, pages, torch.arange(3), kv)
    k, v = reference.kv4_read(pages, torch.tensor([0]), 16, symmetric)
    assert torch.equal(k[:, :3].transpose(0, 1), kv.key.fake_quantize(reference.hadamard(key, 16)))
    assert torch.equal(v[:, :3].transpose(0, 1), kv.value.fake_quantize(value))


def test_keys_with_error_feedback_lie_as_fast_attention_wants_them():
    """Channels side by side: else torch's attention takes its plain path, six times as long."""
    x, passed = torch.randn(9, 2, 16), torch.eye(16).expand(2, 16, 16)
    assert feedback.fake_quantize(x, KVFormat(False, 0.9, 1.0, 0).key, passed).stride(-1) == 1
