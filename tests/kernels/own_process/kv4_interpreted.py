"""The Triton kernels of the 4-bit KV cache in Triton's interpreter, on CPU tensors: run by `test_cuda_kv4.py` in a
process of its own, since Triton decides at its import whether it interprets."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import empty_steps
from rotquant_kernels import reference
from rotquant_kernels.cuda import kv4, kv4_dense, workspace
from rotquant_kernels.cuda.rope import Rope, turned
from test_kv4_native import Batch, feedback_of, make_batch, randn, rows_to_write, strided
from test_linear_native import same

SEEDS = st.integers(0, 2**31)
# head size, block of R3 or 0
HEADS = st.sampled_from([(64, 64), (64, 0), (80, 16), (96, 32), (128, 128), (256, 256), (512, 256), (16, 2)])
PAGES = st.sampled_from([16, 48, 128])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def few(examples: int) -> settings:
    """Shrinking a failure would take minutes here."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=examples, deadline=None, suppress_health_check=quiet, phases=[Phase.explicit, Phase.generate]
    )


def attend(batch: Batch) -> torch.Tensor:
    """Rows of the batch; what follows them must be 0."""
    b, out = batch, strided(torch.full(batch.query.shape, 7.0), batch.query.dtype)
    kv4.attention(b.query, b.cache, b.starts, b.lens, b.table, out, b.scale, b.rotate, b.symmetric, b.window, b.cap)
    assert (out[int(b.starts[-1]) :] == 0).all()
    return out[: int(b.starts[-1])]


@pytest.fixture
def planned(monkeypatch):
    """Sets the rows of a program and the parts of the context."""
    return lambda rows, splits: monkeypatch.setattr(kv4, "plan", lambda *numbers: kv4.Plan(rows, splits))


@few(15)
@given(SEEDS, st.integers(1, 20), st.integers(1, 2), HEADS, PAGES, DTYPES, st.booleans(),
       st.sampled_from([1.0, 0.95, 0.4]), st.booleans())  # fmt: skip
def test_pages_are_the_references_bit_for_bit(seed, tokens, heads, head, page, dtype, symmetric, clip, fed_back):
    d, rotate = head
    tokens = min(tokens, 3) if fed_back else tokens  # which takes a step for each channel
    key, value = (strided(rows_to_write(tokens + 1, heads, d, seed + i), dtype) for i in range(2))
    if dtype == torch.bfloat16:  # the interpreter reads its subnormals wrongly
        key, value = (x.masked_fill(x.abs() < torch.finfo(dtype).tiny, 0) for x in (key, value))
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(3 * page, generator=generator)[:tokens]
    slots[torch.rand(len(slots), generator=generator) < 0.2] = -1
    token = reference.kv_token_bytes(d, symmetric)
    room = torch.randint(0, 256, (3, heads + 1, page, token), generator=generator).to(torch.uint8)
    expected, actual = room.clone(), room.view(torch.int8)
    rest = slots, rotate, symmetric, clip, 0.9, feedback_of(heads, d, seed) if fed_back else None
    reference.kv4_write(key, value, expected[:, 1:], *rest)
    kv4.write(key, value, actual[:, 1:], *rest)
    assert torch.equal(room, expected)


@few(7)
@given(SEEDS, st.lists(st.tuples(st.integers(1, 280), st.integers(1, 12)), min_size=1, max_size=2), st.integers(1, 8),
       HEADS, PAGES, DTYPES, st.booleans(), st.sampled_from([0.1, 1.0, 4.0]),
       st.sampled_from([(8, 1), (8, 4), (16, 2), (32, 4), (64, 1), (64, 4)]))  # fmt: skip
def test_attention_adds_little_to_the_error_of_four_bits(
    planned, seed, sequences, group, head, page, dtype, symmetric, size, plan
):
    planned(*plan)
    lens, steps = [n for n, _ in sequences], [min(sequence) for sequence in sequences]
    batch = make_batch(lens, steps, 1, group, head[0], page, head[1], symmetric, dtype, seed, size)
    out, codes, real = attend(batch).double(), batch.exact(quantized=True), batch.exact(quantized=False)
    rounding = torch.finfo(dtype).eps * codes.norm()
    assert (out - codes).norm() <= 0.2 * (codes - real).norm() + rounding


def rope_of(dims: int, pairs: bool, dtype: torch.dtype) -> Rope:
    angles = torch.arange(400)[:, None] * 10.0 ** -torch.linspace(0, 3, dims // 2)
    return Rope(torch.cat((angles.cos(), angles.sin()), -1).to(dtype), pairs)


@few(4)
@given(SEEDS, st.lists(st.tuples(st.integers(1, 140), st.integers(1, 9)), min_size=1, max_size=3), HEADS, PAGES,
       st.sampled_from([torch.float32, torch.float16]), st.booleans(), st.booleans(), st.booleans())  # fmt: skip
@example(0, [(20, 3), (5, 1)], (64, 64), 16, torch.float32, False, False, True)  # few rows: keys with error feedback
def test_rotary_positions_are_the_same_inside_a_launch(
    planned, seed, sequences, head, page, dtype, symmetric, pairs, part
):
    """Bit for bit as if q and k had been turned before: pages, attention of both kinds, queries of a long prefill."""
    lens, steps = [n for n, _ in sequences], [min(sequence) for sequence in sequences]
    batch = make_batch(lens, steps, 1, 3, head[0], page, head[1], symmetric, dtype, seed)
    rope = rope_of(head[0] // 2 if part else head[0], pairs, dtype)
    positions = torch.cat([torch.arange(n - new, n) for n, new in zip(lens, steps, strict=True)])
    count = len(positions)
    placed = torch.cat((turned(batch.query[:count], positions, rope), batch.query[count:]))

    key, value = (strided(rows_to_write(count + 2, 2, head[0], seed + i), dtype) for i in range(2))
    key = key.nan_to_num(0, 0, 0)  # a product of infinity may be NaN in one order and not in the other
    slots = torch.randperm(-(-count // page) * page + page, generator=torch.Generator().manual_seed(seed))[:count]
    pages = torch.zeros(-(-count // page) + 1, 2, page, reference.kv_token_bytes(head[0], symmetric), dtype=torch.uint8)
    expected, rest = (
        pages.clone(),
        (head[1], symmetric, 0.95, 0.9, feedback_of(2, head[0], seed) if count < 6 else None),
    )
    reference.kv4_write(turned(key[:count], positions, rope), value[:count], expected, slots, *rest)
    kv4.write(key, value, pages, slots, *rest, rope, batch.starts, batch.lens)
    assert torch.equal(pages, expected)

    for plan in ((8, 2), (64, 1)):
        planned(*plan)
        out = torch.empty_like(batch.query)
        given = batch.starts, batch.lens, batch.table, out, batch.scale, head[1], symmetric, 0, 0.0
        kv4.attention(batch.query, batch.cache, *given, rope)
        assert same(out[:count], attend(batch._replace(query=placed)))
    given = head[1], batch.starts, batch.lens, rope
    assert same(kv4_dense.turned(batch.query[:count], *given), kv4_dense.turned(placed[:count], head[1]))


def over_sdpa(query, keys, values, out, starts, lens, table, most_new, longest, scale):
    """torch's attention in the place of FlashAttention; reads the workspace as that does, by its table."""
    for b, length in enumerate(lens.tolist()):
        rows = slice(int(starts[b]), int(starts[b + 1]))
        k, v = (x[table[b].long()].flatten(0, 1)[:length].movedim(1, 0) for x in (keys, values))
        q, new = query[rows].movedim(1, 0), rows.stop - rows.start
        assert (new <= most_new, length <= longest) == (True, True)
        seen = torch.ones(new, length, dtype=torch.bool).tril(length - new)
        product = torch.nn.functional.scaled_dot_product_attention
        out[rows] = product(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True).movedim(1, 0)


@few(6)
@given(SEEDS, st.lists(st.integers(1, 300), min_size=1, max_size=3), HEADS, PAGES, DTYPES, st.booleans())
def test_gathered_pages_are_the_references_bit_for_bit(seed, lens, head, page, dtype, symmetric):
    dtype = torch.float16 if dtype == torch.bfloat16 else dtype  # which the interpreter rounds by truncation
    batch = make_batch(lens, [1] * len(lens), 2, 1, head[0], page, head[1], symmetric, dtype, seed)
    slot = batch.table[0, :1].long() * page  # V of a sequence's first token is not finite
    bad = torch.full((1, 2, head[0]), float("nan"))
    reference.kv4_write(torch.ones_like(bad), bad, batch.cache, slot, head[1], symmetric, 1.0, 1.0)
    room = workspace.workspace([n + 5 for n in lens], torch.device("cpu"))  # an upper bound is enough
    got = kv4_dense.gather(batch.cache, batch.table, batch.lens, room, head[0], dtype, symmetric)
    expected = reference.kv4_gather(batch.cache, batch.table, batch.lens, head[0], symmetric, workspace.PAGE, dtype)
    counts = [-(-n // workspace.PAGE) for n in lens]
    for one, other in zip(got, expected, strict=True):
        for b, part in enumerate(other.split(counts)):
            assert same(one[room.table[b, : counts[b]].long()], part)
    turned = reference.hadamard(batch.query.float(), head[1]) if head[1] else batch.query.float()
    assert same(kv4_dense.turned(batch.query, head[1]), turned.to(dtype))


@few(4)
@given(SEEDS, HEADS, PAGES, st.booleans(), st.sampled_from([0.1, 1.0, 4.0]))
def test_a_long_prefill_over_the_workspace_adds_little_to_the_error_of_four_bits(seed, head, page, symmetric, size):
    lens, steps = [200, 70], [100, 70]
    batch = make_batch(lens, steps, 1, 3, head[0], page, head[1], symmetric, torch.float32, seed, size)
    rounded = batch.query[: sum(steps)].bfloat16().float()  # as the workspace of a model in bfloat16 would be
    room = workspace.workspace(lens, torch.device("cpu"))
    out = torch.empty_like(batch.query[: sum(steps)])

    def dense(query, keys, values, *rest):
        over_sdpa(*(x.bfloat16().float() for x in (query, keys, values)), *rest)

    kv4_dense.attention(
        rounded, batch.cache, batch.starts, batch.lens, batch.table, out, batch.scale, head[1], symmetric, room,
        max(steps), dense,
    )  # fmt: skip
    codes, real = batch.exact(quantized=True), batch.exact(quantized=False)
    assert (out.double() - codes).norm() <= 0.2 * (codes - real).norm()


@few(4)
@given(SEEDS, st.lists(st.tuples(st.integers(1, 400), st.integers(1, 12)), min_size=1, max_size=2), HEADS, PAGES,
       st.booleans(), st.sampled_from([1, 17, 100, 130]), st.sampled_from([0.0, 0.5]),
       st.sampled_from([(8, 1), (8, 4), (64, 1), (64, 4)]))  # fmt: skip
def test_a_window_hides_what_is_before_it(planned, seed, sequences, head, page, symmetric, window, cap, plan):
    """Pages that are gone among it; a window that is ignored, or one token too long, gives NaN."""
    planned(*plan)
    lens, steps = [n for n, _ in sequences], [min(sequence) for sequence in sequences]
    whole = make_batch(lens, steps, 1, 3, head[0], page, head[1], symmetric, torch.float32, seed)._replace(cap=cap)
    exact = whole._replace(window=window)
    out, codes, real = attend(whole.windowed(window)), exact.exact(quantized=True), exact.exact(quantized=False)
    assert (out - codes).norm() <= 0.2 * (codes - real).norm() + 1e-6 * codes.norm()


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("window", [1, 100, 128])
def test_every_token_of_the_window_counts(planned, rows, window):
    """With q = 0 the result is the mean of V, nearly all of it from the window's first token."""
    planned(rows, 2)
    batch = make_batch([window + 40], [1], kv_heads=1, group=3, page=48)
    value = torch.ones(window + 40, 1, 64)
    value[:40] = 1e30
    value[40] = 100 * window
    slots = batch.table[0].long()[torch.arange(window + 40) // 48] * 48 + torch.arange(window + 40) % 48
    reference.kv4_write(batch.keys[0], value, batch.cache, slots, 64, False, 1.0, 1.0)
    batch.query.zero_()
    assert torch.allclose(attend(batch.windowed(window)), torch.tensor(100 + (window - 1) / window), rtol=0.01)


@pytest.mark.parametrize("rows", [8, 64])
def test_a_row_is_the_same_alone_in_parts_and_in_a_batch(planned, rows):
    """But for the order in which float32 sums of tiles are added."""
    batch = make_batch([300, 20, 1], [5, 20, 1], kv_heads=1, group=3, page=32)
    planned(rows, 1)
    whole = attend(batch)
    close = {"rtol": 2e-6, "atol": 2e-6 * whole.abs().max().item()}
    planned(72 - rows, 1)
    assert torch.allclose(attend(batch.part(0, 1, 3)), whole[1:3], **close)
    planned(rows, 4)
    assert torch.allclose(attend(batch), whole, **close)
    empty = batch._replace(starts=torch.tensor([0, 5, 5, 25, 26], dtype=torch.int32), lens=batch.lens[[0, 0, 1, 2]],
                           table=batch.table[[0, 0, 1, 2]])  # fmt: skip
    assert torch.equal(attend(empty), attend(batch))


@pytest.mark.parametrize("rows", [8, 32])
@pytest.mark.parametrize("window", [0, 250, 256])
def test_neighbours_at_the_edge_of_a_tile_see_what_is_theirs(planned, rows, window):
    """With q = 0 a row is the mean of the V that it sees: windows begin, and contexts end, on both sides of an edge."""
    planned(rows, 1)
    batch = make_batch([388], [8], kv_heads=1, group=1, page=32)
    value = torch.zeros(388)
    value[120:140] = value[378:] = 1000
    slots = batch.table[0].long()[torch.arange(388) // 32] * 32 + torch.arange(388) % 32
    reference.kv4_write(batch.keys[0], value[:, None, None].expand(-1, 1, 64), batch.cache, slots, 64, False, 1.0, 1.0)
    batch.query.zero_()
    out = attend(batch.windowed(window) if window else batch)
    for row, seen in enumerate(range(381, 389)):
        mean = value[max(seen - window, 0) if window else 0 : seen].mean()
        assert torch.allclose(out[row], mean, rtol=0.01)


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("length", [1, 128, 129])
def test_every_visible_token_counts_and_no_other(planned, rows, length):
    """With q = 0 the result is the mean of V, nearly all of it from the last token; the ones after it are huge."""
    planned(rows, 1)
    batch = make_batch([length + 40], [1], kv_heads=1, group=3, page=48)
    value = torch.ones(length + 40, 1, 64)
    value[length - 1] = 100 * length
    value[length:] = 1e30
    slots = batch.table[0].long()[torch.arange(length + 40) // 48] * 48 + torch.arange(length + 40) % 48
    reference.kv4_write(batch.keys[0], value, batch.cache, slots, 64, False, 1.0, 1.0)
    batch.query.zero_()
    out = attend(batch._replace(lens=batch.lens - 40))
    assert torch.allclose(out, torch.tensor(100 + (length - 1) / length), rtol=0.01)


@pytest.mark.parametrize(("rows", "where"), [(8, "key"), (64, "key"), (8, "value"), (64, "value"), (8, "query")])
def test_a_row_that_is_not_finite_spoils_only_what_sees_it(planned, rows, where):
    planned(rows, 1)
    batch = make_batch([150], [20], kv_heads=1)
    before, slot = attend(batch), int(batch.table[0, 140 // 16]) * 16 + 140 % 16
    if where == "query":
        batch.query[10] = float("inf")
        hit = torch.arange(20) == 10
    else:
        bad, good = torch.full((1, 1, 64), float("nan")), randn(1, 1, 64, seed=1)
        key, value = (bad, good) if where == "key" else (good, bad)
        reference.kv4_write(key, value, batch.cache, torch.tensor([slot]), 64, False, 1.0, 1.0)
        hit = torch.arange(20) >= 10
    after = attend(batch)
    assert after[hit].isnan().all()
    assert torch.equal(after[~hit], before[~hit])


@pytest.mark.parametrize("query_size", [0.0, 1e-38, 1e20, 1e30])
@pytest.mark.parametrize("value_size", [0.0, 1e-30, 1e5])
def test_extreme_sizes_stay_averages(query_size, value_size):
    batch = make_batch([100], [2], kv_heads=1, size=query_size)
    slots = batch.table[0].long()[torch.arange(100) // 16] * 16 + torch.arange(100) % 16
    value = batch.values[0] * value_size
    reference.kv4_write(batch.keys[0], value, batch.cache, slots, 64, False, 1.0, 1.0)
    codes = reference.kv4_read(batch.cache, batch.table[0, :7].long(), 64, False)[1][:, :100]
    assert attend(batch).abs().max() <= 1.01 * codes.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_without_rows(dtype):
    assert empty_steps.check(kv4.IMPLEMENTATIONS, dtype) == {"kv4_write", "kv4_attention"}
