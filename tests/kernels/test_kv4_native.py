"""The native kernels of the 4-bit KV cache in every tier: pages bit for bit, attention against float64."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from native_tiers import tier  # noqa: F401
from rotquant_kernels import ops, reference
from rotquant_kernels.backends import REFERENCE, backend_of

pytestmark = pytest.mark.skipif(backend_of("kv4_write") is REFERENCE, reason="no native kernels here")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**31)
# head size, block of R3 or 0
HEADS = st.sampled_from(
    [(16, 16), (64, 64), (64, 0), (80, 16), (96, 32), (96, 2), (112, 8), (128, 128), (128, 4), (256, 256), (512, 512)]
)
PAGES = st.sampled_from([16, 32, 48, 128])
quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def some(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=quiet)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def strided(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same [T, heads, d] as a view into a wider tensor, as q, k and v of a fused projection are."""
    wide = torch.full((x.shape[0], x.shape[1] * x.shape[2] + 48), 1e4)
    wide[:, 16:-32] = x.flatten(1)
    return wide.to(dtype)[:, 16:-32].unflatten(1, x.shape[1:])


def new_cache(blocks: int, heads: int, page: int, d: int, symmetric: bool) -> torch.Tensor:
    """Pages full of ones: every scale is NaN until it is written."""
    return torch.full((blocks, heads, page, reference.kv_token_bytes(d, symmetric)), 255, dtype=torch.uint8)


class Batch(NamedTuple):
    """Sequences in a cache and the queries of one step; the last row of `query` is padding."""

    query: torch.Tensor
    cache: torch.Tensor
    starts: torch.Tensor
    lens: torch.Tensor
    table: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    rotate: int
    symmetric: bool
    window: int = 0
    cap: float = 0.0

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5

    def attend(self) -> torch.Tensor:
        out = strided(torch.full(self.query.shape, 7.0), self.query.dtype)
        ops.kv4_attention(
            self.query, self.cache, self.starts, self.lens, self.table, out, self.scale, self.rotate, self.symmetric,
            self.window, self.cap,
        )  # fmt: skip
        assert (out[int(self.starts[-1]) :] == 0).all()
        return out[: int(self.starts[-1])]

    def part(self, sequence: int, first: int, last: int) -> "Batch":
        """Only the queries first to last of one sequence."""
        start, steps = int(self.starts[sequence]), int(self.starts[sequence + 1] - self.starts[sequence])
        lens = self.lens[sequence : sequence + 1] - steps + last
        return self._replace(
            query=self.query[start + first : start + last],
            starts=torch.tensor([0, last - first], dtype=torch.int32),
            lens=lens,
            table=self.table[sequence : sequence + 1],
        )

    def exact(self, quantized: bool) -> torch.Tensor:
        """Attention in float64, over the cache's codes or over K and V as they were."""
        rows = []
        for b, n in enumerate(self.lens.tolist()):
            query = self.query[int(self.starts[b]) : int(self.starts[b + 1])].double()
            k, v = self.keys[b].double().movedim(1, 0), self.values[b].double().movedim(1, 0)
            if quantized:
                pages = self.table[b, : -(-n // self.cache.shape[2])].long()
                k, v = (x.double() for x in reference.kv4_read(self.cache, pages, query.shape[-1], self.symmetric))
                query = reference.hadamard(query, self.rotate) if self.rotate else query
            given = query[None], k[None], v[None], torch.tensor([n]), self.scale, self.window, self.cap
            rows.append(reference.attend(*given)[0])
        return torch.cat(rows)

    def windowed(self, window: int) -> "Batch":
        """The same with a window, and without the pages that it leaves behind: their numbers mean nothing, and what
        other sequences have not left in a page is spoilt too."""
        table, page = self.table.clone(), self.cache.shape[2]
        cache, steps = torch.full_like(self.cache, 255), self.starts.diff()
        for row, old, first, n in zip(table, self.table, (self.lens - steps + 1 - window).tolist(), self.lens.tolist(),
                                      strict=True):  # fmt: skip
            kept = slice(max(first, 0) // page, -(-n // page))
            cache[old[kept].long()] = self.cache[old[kept].long()]
            row[: kept.start] = 10**9
        return self._replace(table=table, cache=cache, window=window)


def make_batch(
    lens, steps, kv_heads=2, group=2, d=64, page=16, rotate=64, symmetric=False, dtype=torch.float32, seed=0, size=1.0
):
    spaces = -(-max(lens) // page)
    table = torch.randperm(len(lens) * spaces, generator=torch.Generator().manual_seed(seed)).int()
    table = table.view(len(lens), spaces)
    cache = new_cache(table.numel(), kv_heads, page, d, symmetric)
    keys = [strided(randn(n, kv_heads, d, seed=seed + 2 * b + 1), dtype) for b, n in enumerate(lens)]
    values = [strided(randn(n, kv_heads, d, seed=seed + 2 * b + 2), dtype) for b, n in enumerate(lens)]
    for pages, k, v in zip(table.long(), keys, values, strict=True):
        position = torch.arange(len(k))
        slots = pages[position // page] * page + position % page
        ops.kv4_write(k, v, cache, slots, rotate, symmetric, 1.0, 1.0)
    query = strided(randn(sum(steps) + 1, kv_heads * group, d, seed=seed) * size, dtype)
    starts = torch.tensor([0, *torch.tensor(steps).cumsum(0)], dtype=torch.int32)
    lens = torch.tensor(lens, dtype=torch.int32)
    # A row of vLLM's block table is longer than what is in use, and what follows may be anything.
    table = torch.cat((table, torch.full_like(table, 10**9)), dim=1)
    return Batch(query, cache, starts, lens, table, keys, values, rotate, symmetric)


def test_codes_lie_where_the_layout_says():
    n, d = 48, 32
    codes = torch.randint(0, 16, (2, n, d), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for name in ("k", "v"):
        stored = reference.pack_codes(codes, name)
        assert torch.equal(reference.unpack_codes(stored, name, d), codes)
        for token, dim in ((0, 0), (5, 3), (17, 12), (47, 31), (30, 20)):
            channel, step = (token % 16, dim % 16) if name == "k" else (dim % 16, token % 16)
            at = token // 16 * 8 * d + dim // 16 * 128 + step // 8 * 64 + 4 * channel + step % 4
            assert ((stored[:, at] >> (4 if step % 8 >= 4 else 0)) & 15).equal(codes[:, token, dim])


def rows_to_write(tokens: int, heads: int, d: int, seed: int) -> torch.Tensor:
    """Rows of many sizes, with zeros, one sign, an outlier, ties, and rows that are not finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, heads, d, generator=generator)
    x = x * 10.0 ** torch.randint(-6, 6, (tokens, heads, 1), generator=generator)
    kinds = torch.randint(0, 12, (tokens, heads), generator=generator)
    x[kinds == 0] = 0
    x[kinds == 1] = x[kinds == 1].abs()
    x[kinds == 2, 0] = -3e4
    x[kinds == 3] = torch.randint(-15, 16, (int((kinds == 3).sum()), d), generator=generator).float() / 2
    x[kinds == 4, -1] = float("nan")
    x[kinds == 5, d // 2] = float("-inf")
    x[kinds == 6] *= 1e30
    x[kinds == 7] *= 1e-30
    x[kinds == 8] = 3e38
    return x


def feedback_of(heads: int, d: int, seed: int) -> torch.Tensor:
    """F of keys with error feedback; what lies on and below the diagonal is not read."""
    return randn(heads, d, d, seed=seed + 7) * 0.3


@some(150)
@given(SEEDS, st.integers(1, 40), st.integers(1, 3), HEADS, PAGES, DTYPES, st.booleans(),
       st.sampled_from([1.0, 0.95, 0.4]), st.booleans(), st.booleans())  # fmt: skip
def test_pages_are_the_references_bit_for_bit(
    tier, seed, tokens, heads, head, page, dtype, symmetric, clip, signed, fed_back,  # noqa: F811
):  # fmt: skip
    d, rotate = head
    key, value = (strided(rows_to_write(tokens + 1, heads, d, seed + i), dtype) for i in range(2))
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(3 * page, generator=generator)[:tokens]
    slots[torch.rand(len(slots), generator=generator) < 0.2] = -1
    token = reference.kv_token_bytes(d, symmetric)
    room = torch.randint(0, 256, (3, heads + 1, page, token), generator=generator).to(torch.uint8)
    expected, actual = room.clone(), room.view(torch.int8) if signed else room
    rest = slots, rotate, symmetric, clip, 0.9, feedback_of(heads, d, seed) if fed_back else None
    reference.kv4_write(key, value, expected[:, 1:], *rest)
    ops.kv4_write(key, value, actual[:, 1:], *rest)
    assert torch.equal(room, expected)


def test_pages_do_not_depend_on_the_number_of_threads(tier):  # noqa: F811
    key, value, slots = randn(300, 2, 64, seed=1), randn(300, 2, 64, seed=2), torch.randperm(320)[:300]
    caches = [new_cache(20, 2, 16, 64, True) for _ in range(2)]
    for threads, cache in enumerate(caches, 1):
        with_threads(threads, lambda c=cache: ops.kv4_write(key, value, c, slots, 64, True, 1.0, 1.0))
    assert torch.equal(*caches)


def with_threads(threads, run):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


@some(60)
@given(SEEDS, st.lists(st.tuples(st.integers(1, 300), st.integers(1, 12)), min_size=1, max_size=3), st.integers(1, 2),
       st.integers(1, 9), HEADS, PAGES, DTYPES, st.booleans(), st.sampled_from([0.1, 1.0, 4.0]))  # fmt: skip
def test_attention_adds_little_to_the_error_of_four_bits(
    tier, seed, sequences, kv_heads, group, head, page, dtype, symmetric, size  # noqa: F811
):  # fmt: skip
    lens, steps = [n for n, _ in sequences], [min(sequence) for sequence in sequences]
    batch = make_batch(lens, steps, kv_heads, group, *head[:1], page, head[1], symmetric, dtype, seed, size)
    out, codes, real = batch.attend().double(), batch.exact(quantized=True), batch.exact(quantized=False)
    rounding = torch.finfo(dtype).eps * codes.norm()
    assert (out - codes).norm() <= 0.25 * (codes - real).norm() + rounding


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129, 300, 2047, 2049])
def test_every_visible_token_counts_and_no_other(tier, length):  # noqa: F811
    """With q = 0 the result is the mean of V, nearly all of it from the last token; the ones after it are huge."""
    batch = make_batch([length + 40], [1], kv_heads=1, group=3, page=48)
    value = torch.ones(length + 40, 1, 64)
    value[length - 1] = 100 * length
    value[length:] = 1e30
    batch.values[0].copy_(value)
    slots = batch.table[0].long()[torch.arange(length + 40) // 48] * 48 + torch.arange(length + 40) % 48
    ops.kv4_write(batch.keys[0], value, batch.cache, slots, 64, False, 1.0, 1.0)
    batch.query.zero_()
    out = batch._replace(lens=batch.lens - 40).attend()
    assert torch.allclose(out, torch.tensor(100 + (length - 1) / length), rtol=0.01)


def test_results_do_not_depend_on_batch_chunks_or_threads(tier):  # noqa: F811
    batch = make_batch([4400, 130, 35, 1], [3, 30, 35, 1], kv_heads=1, group=5, page=32)
    whole = batch.attend()
    assert torch.equal(with_threads(2, batch.attend), whole)
    for b, (start, end) in enumerate(zip(batch.starts.tolist(), batch.starts.tolist()[1:], strict=False)):
        for size in (1, 2, 7, 35):
            parts = [batch.part(b, i, min(i + size, end - start)).attend() for i in range(0, end - start, size)]
            assert torch.equal(torch.cat(parts), whole[start:end])
    decode = make_batch([5000], [1], kv_heads=1, group=2)
    assert torch.equal(with_threads(2, decode.attend), decode.attend())


@pytest.mark.parametrize("d", [16, 80, 112, 512])
def test_many_rows_of_a_block_find_the_bits_of_few(tier, d):  # noqa: F811
    """A block of many rows goes through matrix units where there are some; heads may end within what they multiply."""
    batch = make_batch([150, 37], [13, 9], kv_heads=1, group=3, d=d, rotate=16)
    whole = batch.attend()
    alone = [batch.part(b, i, i + 1).attend() for b, steps in enumerate((13, 9)) for i in range(steps)]
    assert torch.equal(torch.cat(alone), whole)


@pytest.mark.parametrize("where", ["key", "value", "query"])
def test_a_row_that_is_not_finite_spoils_only_what_sees_it(tier, where):  # noqa: F811
    batch = make_batch([150, 40], [20, 3])
    before, position, slot = batch.attend(), 140, int(batch.table[0, 140 // 16]) * 16 + 140 % 16
    if where == "query":
        batch.query[10] = float("inf")
        hit = torch.arange(23) == 10
    else:
        bad = torch.full((1, 2, 64), float("nan"))
        key, value = (bad, randn(1, 2, 64, seed=1)) if where == "key" else (randn(1, 2, 64, seed=1), bad)
        ops.kv4_write(key, value, batch.cache, torch.tensor([slot]), 64, False, 1.0, 1.0)
        hit = (torch.arange(23) >= position - 130) & (torch.arange(23) < 20)
    after = batch.attend()
    assert after[hit].isnan().all()
    assert torch.equal(after[~hit], before[~hit])


@pytest.mark.parametrize("query_size", [0.0, 1e-38, 1e-30, 1e-3, 1e4, 1e20, 1e30])
@pytest.mark.parametrize("value_size", [0.0, 1e-30, 1e-3, 1e5])
def test_extreme_sizes_stay_averages(tier, query_size, value_size):  # noqa: F811
    batch = make_batch([200], [4], size=query_size)
    value = batch.values[0] * value_size
    slots = batch.table[0].long()[torch.arange(200) // 16] * 16 + torch.arange(200) % 16
    ops.kv4_write(batch.keys[0], value, batch.cache, slots, 64, False, 1.0, 1.0)
    codes = reference.kv4_read(batch.cache, batch.table[0, :13].long(), 64, False)[1][:, :200]
    assert batch.attend().abs().max() <= 1.01 * codes.abs().max()


def bad_calls():
    """(what the message must name, changes to the arguments of kv4_write or kv4_attention)"""
    int64 = torch.int64
    return [
        ("slots", {"slots": torch.tensor([0, 64])}),
        ("slots", {"slots": torch.tensor([0, 1], dtype=torch.int32)}),
        ("slots", {"slots": torch.arange(4)}),
        ("key", {"key": torch.zeros(2, 3, 64)}),
        ("value", {"value": torch.zeros(2, 2, 64, dtype=torch.bfloat16)}),
        ("key", {"key": torch.zeros(2, 2, 64, dtype=int64)}),
        ("key", {"key": torch.zeros(2, 2, 128)[..., ::2]}),
        ("cache", {"cache": torch.zeros(4, 2, 16, 68, dtype=torch.uint8)}),
        ("cache", {"cache": torch.zeros(4, 2, 16, 69)}),
        ("cache", {"cache": torch.zeros(4, 2, 8, 69, dtype=torch.uint8)}),
        ("cache", {"cache": torch.zeros(4, 16, 2, 69, dtype=torch.uint8).transpose(1, 2)}),
        ("rotate", {"rotate": 48}),
        ("key_feedback", {"key_feedback": torch.zeros(2, 64, 32), "k_clip": 1.0}),
        ("key_feedback", {"key_feedback": torch.zeros(1, 64, 64), "k_clip": 1.0}),
        ("key_feedback", {"key_feedback": torch.zeros(2, 64, 64, dtype=torch.float64), "k_clip": 1.0}),
        ("key_feedback", {"key_feedback": torch.zeros(2, 64, 64).mT, "k_clip": 1.0}),
        ("block_table", {"block_table": torch.tensor([[0, 4]], dtype=torch.int32)}),
        ("block_table", {"block_table": torch.tensor([[-1, 0]], dtype=torch.int32)}),
        ("block_table", {"block_table": torch.tensor([[0, 1]])}),
        ("seq_lens", {"seq_lens": torch.tensor([33], dtype=torch.int32)}),
        ("seq_lens", {"seq_lens": torch.tensor([20])}),
        ("query_start", {"query_start": torch.tensor([0, 3], dtype=torch.int32)}),
        ("query_start", {"query_start": torch.tensor([1, 2], dtype=torch.int32)}),
        ("out", {"out": torch.zeros(2, 4, 64, dtype=torch.float16)}),
        ("heads", {"query": torch.zeros(2, 3, 64)}),
    ]


@pytest.mark.parametrize(("name", "changes"), bad_calls())
def test_wrong_arguments_are_named_and_nothing_is_written(name, changes):
    cache, out = torch.zeros(4, 2, 16, 69, dtype=torch.uint8), torch.zeros(2, 4, 64)
    both = {"cache": cache, "rotate": 64, "symmetric": False}
    write = {"key": torch.ones(2, 2, 64), "value": torch.ones(2, 2, 64), "slots": torch.arange(2), "k_clip": 1.0}
    attention = {
        "query": torch.ones(2, 4, 64),
        "query_start": torch.tensor([0, 2], dtype=torch.int32),
        "seq_lens": torch.tensor([20], dtype=torch.int32),
        "block_table": torch.tensor([[0, 1]], dtype=torch.int32),
        "out": out,
        "scale": 0.125,
    }
    run, own = (ops.kv4_write, write | {"v_clip": 1.0}) if changes.keys() & write else (ops.kv4_attention, attention)
    with pytest.raises(RuntimeError, match=f"rotquant: .*{name}"):
        run(**both | own | changes)
    assert not cache.any()
    assert not out.any()


def test_attention_keeps_its_schema():
    batch = make_batch([20], [3])
    out = torch.empty_like(batch.query)
    arguments = (batch.query, batch.cache, batch.starts, batch.lens, batch.table, out, batch.scale, 64, False)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.rotquant.kv4_attention.default, arguments, test_utils=checks)
