"""How a step on a GPU is cut into launches, and that its parts put together are the whole."""

import random
from types import SimpleNamespace

import pytest
import torch

from rotquant_kernels import ops, reference
from rotquant_kernels.cuda import workspace
from rotquant_kernels.formats import KVFormat
from vllm_rotquant import steps
from vllm_rotquant.kv_cache import KV4Impl, KV4Metadata

HEADS, KV_HEADS, DIM, PAGE = 6, 2, 64, 16


def batch(new, lens, seed=0):
    """Pages, starts, lengths and table of sequences, and queries with two rows of padding."""
    generator = torch.Generator().manual_seed(seed)
    spaces = -(-max(lens) // PAGE)
    table = torch.randperm(len(lens) * spaces, generator=generator).int().view(len(lens), spaces)
    cache = torch.zeros(table.numel(), KV_HEADS, PAGE, reference.kv_token_bytes(DIM, False), dtype=torch.uint8)
    key, value = torch.randn(2, table.numel() * PAGE, KV_HEADS, DIM, generator=generator).bfloat16()
    ops.kv4_write(key, value, cache, torch.arange(len(key)), DIM, False, 1.0, 1.0)
    starts = torch.tensor([0, *new]).cumsum(0).int()
    query = torch.randn(sum(new) + 2, HEADS, DIM, generator=generator).bfloat16()
    return query, cache, starts, torch.tensor(lens, dtype=torch.int32), table


@pytest.fixture
def impl():
    layer = SimpleNamespace(
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=DIM, kv_cache_dtype="auto", dtype=torch.bfloat16,
        impl=SimpleNamespace(scale=DIM**-0.5, logits_soft_cap=None), sliding_window=None,
    )  # fmt: skip
    return KV4Impl(layer, KVFormat(False, 1.0, 1.0, DIM))


def test_every_sequence_is_launched_once():
    chance = random.Random(3)
    for _ in range(300):
        count = chance.randrange(1, 20)
        new = [chance.choice((1, 1, 1, 4, 20, 63, 64, 300)) for _ in range(count)]
        lens = [n + chance.choice((0, 5, 900, 3000)) for n in new]
        limits = steps.Limits(chance.choice((1, 4, 8)), PAGE, chance.choice((0, 1024, 4096)))
        found = list(steps.runs(new, lens, limits))
        assert [s for _, first, last in found for s in range(first, last)] == list(range(count))
        for kind, first, last in found:
            assert {steps.kind(new[s], lens[s], limits) for s in range(first, last)} == {kind}
            if kind == "dense":
                assert sum(steps.padded(lens[s]) for s in range(first, last)) <= limits.room
                assert min(new[first:last]) >= steps.DENSE_TOKENS


def test_a_step_of_one_kind_is_one_call():
    """As a CUDA graph captures it: decodes, padded ones too, and speculative tokens."""
    limits = steps.Limits(4, PAGE, 4096)
    for new in ([1, 1, 1], [1, 1, 0], [4, 4]):
        _, _, *given = batch(new, [40] * len(new))
        assert steps.parts(new, [40] * len(new), *given, limits) == []
    assert len(steps.parts([1, 20], [40, 40], *batch([1, 20], [40, 40])[2:], limits)) == 2


def test_the_parts_of_a_step_are_the_whole(impl, monkeypatch):
    """Decodes, a chunk and two prompts; the prompts once by the int8 kernel, once over a workspace."""
    new, lens = [1, 1, 9, 70, 100], [300, 17, 200, 70, 160]
    query, cache, *given = batch(new, lens)
    whole = impl.forward(None, query, query, query, cache, KV4Metadata(*given), torch.full_like(query, 7))
    rows = sum(new)
    limits = impl.limits(PAGE)
    assert limits == steps.Limits(HEADS // KV_HEADS, PAGE, 0)
    parts = steps.parts(new, lens, *given, limits)
    assert [part.rows for part in parts] == [slice(0, 2), slice(2, rows)]
    assert parts[0].block_table.shape[1] == -(-300 // PAGE)
    cut = impl.forward(None, query, query, query, cache, KV4Metadata(*given, parts), torch.full_like(query, 7))
    assert torch.equal(cut, whole)
    assert not cut[rows:].any()

    kv4_dense = pytest.importorskip("rotquant_kernels.cuda.kv4_dense")
    monkeypatch.setattr(kv4_dense, "gather", lambda cache, table, lens, room, dim, dtype, symmetric: (
        reference.kv4_gather(cache, table, lens, dim, symmetric, workspace.PAGE, dtype)))  # fmt: skip
    monkeypatch.setattr(kv4_dense, "turned", lambda q, rotate: reference.hadamard(q.float(), rotate).to(q.dtype))
    called: list[int] = []
    impl.dense = "stand-in", over_sdpa(called)
    parts = steps.parts(new, lens, *given, impl.limits(PAGE))
    assert [part.room is not None for part in parts] == [False, False, True]
    cut = impl.forward(None, query, query, query, cache, KV4Metadata(*given, parts), torch.full_like(query, 7))
    assert called == [2]
    assert (cut.float() - whole.float()).norm() < 0.02 * whole.float().norm()
    assert not cut[rows:].any()


def over_sdpa(called):
    """torch's attention over a workspace, read by its table; notes how many sequences each call has."""

    def dense(query, keys, values, out, starts, lens, table, most_new, longest, scale):
        called.append(len(lens))
        for b, length in enumerate(lens.tolist()):
            rows = slice(int(starts[b]), int(starts[b + 1]))
            new = rows.stop - rows.start
            assert new <= most_new
            assert length <= longest
            q = query[rows].movedim(1, 0)
            k, v = (x[table[b].long()].flatten(0, 1)[:length].movedim(1, 0) for x in (keys, values))
            seen = torch.ones(new, length, dtype=torch.bool).tril(length - new)
            product = torch.nn.functional.scaled_dot_product_attention
            out[rows] = product(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True).movedim(1, 0)

    return dense
