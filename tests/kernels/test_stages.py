"""Every kind of online transform: the algebra, what a checkpoint may hold, shards, and what really runs."""

import pytest
import torch

from native_tiers import tier  # noqa: F401
from rotquant_kernels import KINDS, OPS, Stage, backends, convention, kernel_of, native, online, ops, reference
from rotquant_kernels.formats import RowFormat, WeightFormat

K, BLOCK = 96, 16
every = pytest.mark.parametrize("name", KINDS)


def stage_of(name: str, block: int = BLOCK) -> Stage:
    return Stage(name, block, KINDS[name].sample(block, K, torch.Generator().manual_seed(3)))


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=dtype)


@every
def test_weights_undo_it(name):
    """x T (W T⁻ᵀ)ᵀ + what is given back = x Wᵀ, in float64 and with gradients of the tensor that is learned."""
    kind, stage, x, w = KINDS[name], stage_of(name), normal(5, K), normal(7, K)
    if kind.learned:
        parameter = kind.start(stage.held.double()).requires_grad_()
        stage = stage._replace(tensor=kind.value(parameter))
    y = reference.stage_rows(x, *stage)
    assert not torch.allclose(y, x)
    product, moved = y @ kind.weights(w, stage).T, kind.moved(w, stage)
    assert (moved is not None) == kind.affine
    torch.testing.assert_close(product if moved is None else product + moved, x @ w.T, rtol=0, atol=1e-9)
    if kind.learned:
        (y.square() @ normal(K, 1)).sum().backward()
        assert parameter.grad.abs().max() > 0


@every
def test_what_a_checkpoint_may_hold(name):
    kind, tensor = KINDS[name], stage_of(name).tensor
    assert kind.name == name
    assert (tensor is None) == (kind.dtype is None)
    assert kind.block_fault(BLOCK) == ""
    if tensor is None:
        tensor = reference.hadamard(torch.eye(BLOCK), BLOCK)  # a marker
    assert tensor.shape == kind.shape(BLOCK, K)
    assert kind.fault(tensor, BLOCK, K) == ""
    assert kind.fault(torch.full_like(tensor, torch.nan, dtype=torch.float32), BLOCK, K)
    assert kind.fault(tensor.to(torch.int64), BLOCK, K)


@every
def test_ranks_run_their_part(name):
    kind, stage, x = KINDS[name], stage_of(name), normal(5, K)
    span = kind.span(BLOCK, K)
    whole, step = reference.stage_rows(x, *stage), max(span, K // 3)
    parts = []
    for start in range(0, K, step):
        part = None if stage.tensor is None else kind.shard(stage.tensor, start, start + step)
        parts.append(reference.stage_rows(x[:, start : start + step], name, BLOCK, part))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    if span < K:
        changed = x.clone()
        changed[:, :span] += 1
        assert torch.equal(reference.stage_rows(changed, *stage)[:, span:], whole[:, span:])


@every
def test_what_is_named_is_what_runs(name, tier):  # noqa: F811
    """Whether the op hands a kind to the reference, by torch's own record of the ops that ran."""
    stage, x = stage_of(name), normal(5, K, dtype=torch.float32)
    with torch.profiler.profile() as record:
        got = ops.online_stage(x, *stage)
    handed_on = any(event.name == "rotquant::reference_stage" for event in record.events())
    assert backends.stages_of([name]) == {backends.REFERENCE.name if handed_on else f"native ({tier})": [name]}
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, reference.online_stage(x, *stage), rtol=0, atol=0 if handed_on else 1e-5)
    assert torch.equal(ops.online_stage(x.double(), *stage), reference.online_stage(x.double(), *stage))


def test_kernels_are_named_by_kind(tier):  # noqa: F811
    assert set(native.stages()) == KINDS.keys()
    assert kernel_of("online_stage") == f"native ({tier})"
    assert all(kernel_of(op) in (f"native ({tier})", backends.REFERENCE.name) for op in OPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "block"), [(96, 16), (24, 24), (30, 5), (576, 24), (1024, 64), (7, 7)])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "hadamard"])
def test_stages_of_every_shape(name, columns, block, dtype, tier):  # noqa: F811
    """Moves and differences bit for bit, sums of products within their rounding of float64; each row on its own."""
    stage = Stage(name, block, KINDS[name].sample(block, columns, torch.Generator().manual_seed(columns)))
    x = normal(7, 2 * columns).to(dtype)[:, columns // 2 : columns // 2 + columns]
    got, expected = ops.online_stage(x, *stage), reference.stage_rows(x.double(), *stage)
    if name in ("permutation", "shift"):
        assert torch.equal(got, reference.online_stage(x, *stage))
    assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert torch.equal(torch.cat([ops.online_stage(row, *stage) for row in x.split(1)]), got)
    packed = convention.pack_int32(torch.ones(3, columns, dtype=torch.int8), 4)
    weight, scale, rows = ops.prepare_weight(packed, 4, columns), torch.ones(3, 1), RowFormat(8, True, 1.0)
    inside = online.linear(x, weight, scale, None, WeightFormat(), [stage], rows)
    outside = ops.int_linear(got, weight, scale, None, 4, "none", 0, None, 8, True, 1.0)
    assert torch.equal(inside, outside.to(dtype))


def test_wrong_stages_are_refused_by_name():
    x = torch.ones(2, K)
    for run, error in ((reference.online_stage, ValueError), (ops.online_stage, RuntimeError)):
        with pytest.raises(error, match="fourier"):
            run(x, "fourier", BLOCK, None)
        with pytest.raises(error, match="reflection"):
            run(x, "reflection", BLOCK, None)
        with pytest.raises(error, match="dense"):
            run(x, "dense", BLOCK, None)
    order = torch.arange(K, dtype=torch.int32)
    for name, tensor, word in (
        ("permutation", order + 1, f"place {K} of a permutation"), ("permutation", order - 1, "place -1"),
        ("permutation", order[1:], f"must hold {K} int32"), ("shift", order.float()[1:], f"must hold {K} float32"),
        ("shift", order, "float32"), ("kronecker", order.float(), f"must hold {36 + BLOCK**2} float32"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=word):
            ops.online_stage(x, name, BLOCK, tensor)
