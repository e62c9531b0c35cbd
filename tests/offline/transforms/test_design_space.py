"""Transforms of the design space: identities, inverses and what each one promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotquant.errors import RotQuantError
from rotquant.learn.quantizers import fake_quantize
from rotquant.learn.scale_search import search_scale
from rotquant.transforms import householder, kronecker, permutation, scaling
from rotquant.transforms.givens import givens
from rotquant.transforms.hadamard import hadamard_rows, paley, split_order
from rotquant.transforms.klt import covariance, equal_variances, klt
from rotquant.transforms.walsh import walsh_rows
from rotquant.transforms.williamson import FIRST_ROWS, williamson
from rotquant_kernels import KINDS, reference, transform
from rotquant_kernels.formats import RowFormat, WeightFormat
from rotquant_kernels.reference import hadamard
from rotquant_kernels.stages.kronecker import factors

SEEDS = st.integers(0, 2**31)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-9) -> bool:
    return torch.allclose(a.double(), b.double(), atol=atol)


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


# ---- orders of Hadamard matrices -----------------------------------------------------------------------


@pytest.mark.parametrize("n", sorted(FIRST_ROWS))
def test_williamson_matrices_are_hadamard(n):
    h = williamson(4 * n)
    assert h is not None
    assert (h.abs() == 1).all()
    assert torch.equal(h @ h.T, 4 * n * eye(4 * n))
    assert paley(4 * n) is None


def test_orders_that_are_covered():
    assert williamson(12) is None
    assert williamson(46) is None
    missing = []
    for n in range(4, 260, 4):
        halves = [n >> k for k in range(8) if n % (1 << k) == 0]
        if split_order(n) is None and not any(williamson(m) is not None for m in halves):
            missing.append(n)
    assert missing == [188, 236, 244]


@pytest.mark.parametrize("m", [12, 20, 28, 36, 40, 44, 56, 60, 68, 76, 84, 108, 140])
def test_paley_orders_and_their_doubles(m):
    for n in (m, 4 * m):
        h = hadamard_rows(eye(n), n) * n**0.5
        assert same(h.abs(), torch.ones(n, n))
        assert same(h @ h.T, n * eye(n))


# ---- Walsh ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 16, 128])
def test_walsh_rows_change_sign_as_often_as_their_number(n):
    w = walsh_rows(eye(n), n)
    assert (w.sign().diff(dim=1) != 0).sum(1).tolist() == list(range(n))
    assert same(w, w.T)
    assert same(w @ w, eye(n))
    assert sorted(map(tuple, w.sign().tolist())) == sorted(map(tuple, hadamard(eye(n), n).sign().tolist()))


def test_walsh_blocks():
    x = normal(3, 24)
    assert same(walsh_rows(x, 8), x @ torch.kron(eye(3), walsh_rows(eye(8), 8)))
    assert same(walsh_rows(walsh_rows(x, 8), 8), x)
    with pytest.raises(RotQuantError, match="not 12"):
        walsh_rows(x, 12)


# ---- Householder ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(2, 40), st.sampled_from([1.0, -1.0, 1e-8, 1e-14, 0.0]))
def test_reflection_maps_one_direction_to_the_other(seed, d, kind):
    """Also where the two are opposite, nearly equal or equal."""
    a, noise = normal(2, d, seed=seed)
    b = noise if kind == 1.0 else (-3 * a if kind == -1.0 else 7 * a + kind * noise)
    v = householder.reflection(a, b)
    assert v.norm().item() == pytest.approx(1)
    s = householder.reflect_rows(eye(d), v)
    assert same(s @ s, eye(d))
    assert same(s, s.T)
    assert same(householder.reflect_rows(a, v) / a.norm(), b / b.norm())
    assert same(householder.reflect_rows(a.float(), v), a.float() @ s.float(), atol=1e-4)


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.ones(1), torch.full((4,), torch.nan), torch.ones(2, 2)])
def test_reflection_needs_a_direction(bad):
    with pytest.raises(RotQuantError, match="source must be"):
        householder.reflection(bad, torch.ones(4))


# ---- Givens --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([2, 6, 32]), st.booleans())
def test_givens_reaches_its_target_and_its_transpose_does_not(seed, size, positive):
    x, u = normal(2, size, seed=seed)
    u = u.abs() if positive else u
    pairing = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    turn = givens(x, u, pairing)
    pairs = pairing.view(-1, 2)
    reached = torch.zeros(size, dtype=torch.float64)
    reached[pairs] = u[pairs] / u[pairs].norm(dim=1, keepdim=True) * x[pairs].norm(dim=1, keepdim=True)
    g = turn.rows(eye(size))
    assert same(g @ g.T, eye(size))
    assert same(turn.rows(x), reached)
    assert same(x @ g, reached)
    assert not same(x @ g.T, reached, atol=1e-3)
    batch = normal(4, size, seed=seed + 1)
    assert same(turn.rows(batch), batch @ g)


def test_givens_leaves_pairs_without_direction_alone():
    turn = givens(torch.tensor([0.0, 0, 1, 2, 3, 4]), torch.tensor([1.0, 1, 0, 0, 0, 5]))
    assert same(turn.rows(torch.tensor([7.0, 8, 1, 2, 3, 4])), torch.tensor([7.0, 8, 1, 2, 0, 5]), atol=1e-5)
    with pytest.raises(RotQuantError, match="even number"):
        givens(torch.ones(3), torch.ones(3))


# ---- Kronecker -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "pair"), [(4096, (64, 64)), (14336, (112, 128)), (11008, (86, 128)), (1, (1, 1)), (13, (1, 13))]
)
def test_factor_pair(n, pair):
    assert kronecker.factor_pair(n) == pair


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
def test_kronecker_is_the_product_and_weights_undo_it(seed, a, b):
    left, right = normal(a, a, seed=seed) + 4 * eye(a), normal(b, b, seed=seed + 1) + 4 * eye(b)
    stage = kronecker.stage(left, right)
    x, w = normal(5, a * b, seed=seed + 2), normal(3, a * b, seed=seed + 3)
    y = reference.stage_rows(x, *stage)
    assert same(y, x @ torch.kron(left, right))
    assert same(y @ KINDS["kronecker"].weights(w, stage).T, x @ w.T, atol=1e-7)
    assert all(map(torch.equal, factors(stage), (left, right)))
    served = transform(x, [stage._replace(tensor=stage.tensor.float())])
    assert torch.allclose(served.double(), y, rtol=1e-4, atol=1e-3)


# ---- permutation ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([(1, 4, 8), (2, 4, 3), (4, 2, 1), (1, 1, 7), (1, 6, 1)]))
def test_zigzag_deals_magnitudes_evenly(seed, shape):
    shards, block, blocks = shape
    size = shards * block * blocks
    magnitude = normal(size, seed=seed).abs().pow(3)
    p = permutation.zigzag(magnitude, block, shards)
    assert sorted(p.tolist()) == list(range(size))
    x = normal(2, size, seed=seed)
    assert torch.equal(x[..., p][..., p.argsort()], x)
    dealt = magnitude[p].view(shards, blocks, block)
    for shard in range(shards):
        own = magnitude.view(shards, -1)[shard]
        assert torch.equal(dealt[shard].flatten().sort().values, own.sort().values)  # channels stay in their shard
        top = own.sort(descending=True).values.view(block, blocks)
        for row in range(block):  # each block holds exactly one channel of each round
            assert torch.equal(dealt[shard][:, row].sort().values, top[row].sort().values)
        means = dealt[shard].mean(1)
        assert means.max() - means.min() <= (own.max() - own.min()) / block + 1e-12


def test_zigzag_by_hand():
    p = permutation.zigzag(torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]), 4)
    assert p.tolist() == [0, 3, 4, 7, 1, 2, 5, 6]
    with pytest.raises(RotQuantError, match="do not divide"):
        permutation.zigzag(torch.ones(12), 4, shards=2)


# ---- scaling -------------------------------------------------------------------------------------------


def test_smooth_scale_is_its_formula():
    x_max, w_max = normal(16).abs() + 0.1, normal(16, seed=1).abs() + 0.1
    scale = scaling.smooth_scale(x_max, w_max, 0.3)
    formula = x_max**0.3 / w_max**0.7
    assert same(scale / scale[0], formula / formula[0])
    assert scale.log().mean().item() == pytest.approx(0, abs=1e-12)
    balanced = scaling.smooth_scale(x_max, w_max, 0.5)
    assert same((x_max / balanced) / (w_max * balanced), ((x_max / balanced) / (w_max * balanced))[0].expand(16))


def test_smooth_scale_survives_zeros_and_extremes():
    for x_max, w_max in (
        (torch.tensor([0.0, 1.0, 1e30]), torch.tensor([1.0, 0.0, 1e-30])),
        (torch.zeros(3), torch.zeros(3)),
        (torch.tensor([0.0, 1.0, 2.0]), torch.ones(3)),
    ):
        for alpha in (0.0, 0.5, 1.0):
            scale = scaling.smooth_scale(x_max, w_max, alpha)
            assert scale.isfinite().all()
            assert (scale >= 0.99 / scaling.LIMIT).all()
            assert (scale <= 1.01 * scaling.LIMIT).all()


def test_search_finds_a_scale_that_rotation_alone_does_not_replace():
    """Outlier channels at down_proj: a Hadamard alone leaves peaks, scaled first they are gone."""
    x, w = normal(128, 64).float(), normal(48, 64, seed=1).float()
    x[:, ::8] *= 30 * normal(128, 8, seed=2).float().abs().clamp(min=0.1)
    rotate = lambda rows: hadamard(rows, 64)  # noqa: E731
    alpha, scale, errors = search_scale(x, w, rotate, RowFormat(), WeightFormat())
    assert len(errors) == 22
    assert errors[alpha] == min(errors.values())
    assert errors[alpha] < 0.8 * errors[None]
    seen, stored = (fake_quantize(rotate(m), RowFormat()) for m in (x / scale.float(), w * scale.float()))
    exact = x @ w.T
    assert errors[alpha] == pytest.approx(((seen @ stored.T - exact).norm() / exact.norm()).item() ** 2, rel=1e-4)
    x, w = normal(64, 32).float(), normal(32, 32, seed=3).float()
    even = search_scale(x, w, lambda rows: rows, RowFormat(), WeightFormat())
    assert even[2][even[0]] <= even[2][None]


# ---- KLT -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [16, 12, 24, 52])
def test_klt_decorrelates_and_hadamard_equalizes(d):
    x = normal(400, d) @ normal(d, d, seed=1) + 5
    c = covariance(x.split(150))
    assert same(c, torch.cov(x.T, correction=0))
    u, values = klt(c)
    assert same(u.T @ u, eye(d))
    assert same(u.T @ c @ u, torch.diag(values), atol=1e-8)
    assert (values.diff() <= 0).all()
    r = equal_variances(c)
    assert same(r.T @ r, eye(d))
    spread = (r.T @ c @ r).diagonal()
    if split_order(d):
        assert same(spread, values.mean().expand(d), atol=1e-8)
    else:
        assert spread.std() < 0.4 * values.std()
    assert torch.equal(equal_variances(c.clone()), r)


def test_covariance_needs_rows():
    with pytest.raises(RotQuantError, match="no rows"):
        covariance([])
