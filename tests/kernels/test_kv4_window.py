"""Sliding windows and soft caps in the native attention over 4-bit pages, in every tier."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from native_tiers import tier  # noqa: F401
from rotquant_kernels import ops, reference
from rotquant_kernels.backends import REFERENCE, backend_of
from test_kv4_native import DTYPES, HEADS, PAGES, SEEDS, make_batch, some, with_threads

pytestmark = pytest.mark.skipif(backend_of("kv4_write") is REFERENCE, reason="no native kernels here")
CAPS = st.sampled_from([0.0, 0.5, 2.0])
WINDOWS = st.one_of(st.integers(1, 40), st.integers(100, 300))


@some(40)
@given(SEEDS, st.lists(st.tuples(st.integers(1, 400), st.integers(1, 150)), min_size=1, max_size=3), st.integers(1, 9),
       HEADS, PAGES, DTYPES, st.booleans(), WINDOWS, CAPS)  # fmt: skip
def test_attention_adds_little_to_the_error_of_four_bits(
    tier, seed, sequences, group, head, page, dtype, symmetric, window, cap  # noqa: F811
):  # fmt: skip
    """Decode steps, prefills longer than the window, chunks behind a cached context; pages that are gone."""
    lens, steps = [n for n, _ in sequences], [min(sequence) for sequence in sequences]
    whole = make_batch(lens, steps, 1, group, head[0], page, head[1], symmetric, dtype, seed)._replace(cap=cap)
    batch = whole.windowed(window)
    exact = whole._replace(window=window)
    out, codes, real = batch.attend().double(), exact.exact(quantized=True), exact.exact(quantized=False)
    rounding = torch.finfo(dtype).eps * codes.norm()
    assert (out - codes).norm() <= 0.2 * (codes - real).norm() + rounding


@pytest.mark.parametrize("window", [1, 15, 16, 100, 128, 129, 2048, 2100])
def test_every_token_of_the_window_counts_and_no_other(tier, window):  # noqa: F811
    """With q = 0 the result is the mean of V, nearly all of it from the window's first token; those before are huge."""
    batch = make_batch([window + 40], [1], kv_heads=1, group=3, page=48)
    value = torch.ones(window + 40, 1, 64)
    value[:40] = 1e30
    value[40] = 100 * window
    slots = batch.table[0].long()[torch.arange(window + 40) // 48] * 48 + torch.arange(window + 40) % 48
    ops.kv4_write(batch.keys[0], value, batch.cache, slots, 64, False, 1.0, 1.0)
    batch.query.zero_()
    for one in (batch._replace(window=window), batch.windowed(window)):
        assert torch.allclose(one.attend(), torch.tensor(100 + (window - 1) / window), rtol=0.01)


@pytest.mark.parametrize("window", [3, 130, 2200])
def test_results_do_not_depend_on_batch_chunks_threads_or_what_is_not_seen(tier, window):  # noqa: F811
    whole = make_batch([4400, 130, 35, 1], [3, 30, 35, 1], kv_heads=1, group=5, page=32)
    batch = whole.windowed(window)
    out = batch.attend()
    assert torch.equal(whole._replace(window=window).attend(), out)
    assert torch.equal(with_threads(2, batch.attend), out)
    for b, (start, end) in enumerate(zip(batch.starts.tolist(), batch.starts.tolist()[1:], strict=False)):
        for size in (1, 7, 35):
            parts = [batch.part(b, i, min(i + size, end - start)).attend() for i in range(0, end - start, size)]
            assert torch.equal(torch.cat(parts), out[start:end])
    decode = make_batch([5000], [1], kv_heads=1, group=2).windowed(window)
    assert torch.equal(with_threads(2, decode.attend), decode.attend())


def test_a_window_of_the_whole_context_is_none(tier):  # noqa: F811
    batch = make_batch([300, 40], [200, 1])
    assert torch.equal(batch._replace(window=300).attend(), batch.attend())
    assert not torch.equal(batch._replace(window=299).attend(), batch.attend())


def test_the_specification_skips_pages(monkeypatch):
    """A mixed batch in plain torch, against each sequence alone over all of its pages."""
    whole = make_batch([300, 90, 30, 77], [1, 1, 30, 20])
    batch = whole.windowed(20)
    monkeypatch.setattr(ops, "kv4_attention", reference.kv4_attention)
    expected = whole._replace(window=20).exact(quantized=True).float()
    assert torch.allclose(batch.attend(), expected, rtol=1e-4, atol=1e-5)


def test_wrong_windows_are_named():
    batch = make_batch([20], [3])
    with pytest.raises(RuntimeError, match=r"rotquant: .*window"):
        batch._replace(window=-1).attend()
