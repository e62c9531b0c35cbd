"""Greedy chains of stages, and the low-rank branch."""

from functools import partial

import pytest
import torch

from rotquant.errors import RotQuantError
from rotquant.learn.greedy import duquant_step, greedy_rotation, greedy_stages, ruquant_step
from rotquant.learn.objectives import gsr_loss, quantization_error
from rotquant.learn.quantizers import fake_quantize_weight
from rotquant.weights.low_rank import beside, directions, low_rank, truncated
from rotquant_kernels.formats import RowFormat, WeightFormat
from rotquant_kernels.online import transform


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def outliers(n: int = 96, k: int = 64) -> torch.Tensor:
    x = torch.randn(n, k, generator=generator())
    x[:, [3, 17, 18]] *= torch.tensor([20.0, 30.0, 12.0])
    return x


def peak(x: torch.Tensor) -> float:
    return (x.abs().amax(1) / x.square().mean(1).sqrt()).mean().item()


@pytest.mark.parametrize("method", ["ruquant", "duquant"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_greedy_chains_lower_peaks_and_keep_products(method, symmetric):
    x, w = outliers(), torch.randn(8, 64, generator=generator(1))
    stages = greedy_stages(x, 16, generator(2), method, RowFormat(4, symmetric), rounds=16)
    assert [s.kind for s in stages][:3] == ["dense", "permutation", "dense"]
    y, v = transform(x, stages), transform(w, stages)
    assert torch.allclose(y @ v.T, x @ w.T, atol=1e-3)
    assert torch.allclose(y.norm(dim=1), x.norm(dim=1), rtol=1e-5)
    assert peak(y) < 0.6 * peak(x)
    assert quantization_error(y, RowFormat(4, symmetric)) < 0.5 * quantization_error(x, RowFormat(4, symmetric))
    again = greedy_stages(x, 16, generator(2), method, RowFormat(4, symmetric), rounds=16)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(stages, again, strict=True))


def test_permutations_stay_within_their_shard_and_no_reflection_crosses_it():
    stages = greedy_stages(outliers(), 16, generator(2), shards=2, rounds=4)
    assert [s.kind for s in stages] == ["dense", "permutation", "dense"]
    assert (stages[1].tensor[:32] < 32).all()


@pytest.mark.parametrize("step", ["ruquant", "duquant"])
def test_steps_are_orthogonal_and_the_best_product_is_kept(step):
    make = {"ruquant": lambda: ruquant_step(generator(), True), "duquant": lambda: duquant_step(generator())}[step]
    rows = outliers().view(-1, 16).double()
    matrix = make()(rows)
    assert torch.allclose(matrix @ matrix.T, torch.eye(16, dtype=torch.float64), atol=1e-10)
    if step == "ruquant":  # the worst vector arrives at its positive target
        arrived = rows @ ruquant_step(generator(), False)(rows)
        assert (arrived.amin(1) > -1e-9).any()
        assert not (rows.amin(1) > 0).any()
    losses = []
    for rounds in range(8):
        r = greedy_rotation(outliers(), 16, make(), rounds, RowFormat())
        losses.append(gsr_loss((rows @ r).view(-1, 64), RowFormat()).item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_greedy_refuses():
    with pytest.raises(RotQuantError, match="unknown greedy method"):
        greedy_stages(outliers(), 16, generator(), "other")
    with pytest.raises(RotQuantError, match="do not divide"):
        greedy_stages(outliers(), 24, generator())


ROUND = partial(fake_quantize_weight, form=WeightFormat())


def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with a few strong directions, and inputs with strong channels."""
    g = generator(5)
    weight = torch.randn(96, 4, generator=g) @ torch.randn(4, 64, generator=g) + torch.randn(96, 64, generator=g)
    x = torch.randn(1000, 64, generator=g) * torch.exp(torch.randn(64, generator=g))
    return weight, x @ (torch.eye(64) + 0.2 * torch.randn(64, 64, generator=g))


def output_error(weight: torch.Tensor, x: torch.Tensor, branch: object) -> float:
    made = x @ branch.down @ branch.up + x @ ROUND(branch.residual).T
    return ((made - x @ weight.T).norm() / (x @ weight.T).norm()).item() ** 2


def test_the_branch_lowers_the_output_error():
    weight, x = layer()
    hessian = x.T @ x / len(x)
    rtn = ((x @ (ROUND(weight) - weight).T).norm() / (x @ weight.T).norm()).item() ** 2
    plain = low_rank(weight, 8, ROUND, generator())
    aware = low_rank(weight, 8, ROUND, generator(), hessian, damping=1e-4)
    maxima = low_rank(weight, 8, ROUND, generator(), hessian, row_maxima=True, damping=1e-4)
    errors = [output_error(weight, x, b) for b in (plain, aware, maxima)]
    assert errors[0] < 0.7 * rtn
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] <= 1.0001 * errors[1]
    assert min(aware.errors) == pytest.approx(errors[1], rel=0.02)
    assert min(aware.errors) < aware.errors[0]  # alternation helped


def test_row_maxima_fall():
    weight, _ = layer()
    weight[:, 7] *= 4
    plain, maxima = (low_rank(weight, 4, ROUND, generator(), row_maxima=m, iterations=3) for m in (False, True))
    assert maxima.errors[0] == plain.errors[0]
    assert min(maxima.errors) < min(plain.errors)


def test_the_branch_and_the_residual_are_the_weight():
    weight, _ = layer()
    branch = low_rank(weight, 8, ROUND, generator(), dtype=torch.bfloat16)
    assert torch.equal(branch.down, branch.down.bfloat16().float())
    assert branch.down.shape == (64, 8)
    assert branch.up.shape == (8, 96)
    assert torch.allclose((branch.down @ branch.up).T + branch.residual, weight, atol=1e-4)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_branch_of_the_inputs_is_the_weight(shards):
    """x Wᵀ = (x - z Dᵀ) Rᵀ + z U, z = x D, of any D; D are the directions that leave least, within their shards."""
    weight, x = layer()
    down = directions(x.T @ x, 8, shards, generator())
    assert torch.allclose(down.T @ down, torch.eye(8), atol=1e-5)
    for start in range(0, 64, 64 // shards):
        part = slice(start, start + 64 // shards)
        own = down[part, start * 8 // 64 : start * 8 // 64 + 8 // shards]
        least = torch.linalg.svdvals(x[:, part])[8 // shards :].square().sum()
        assert (x[:, part] - x[:, part] @ own @ own.T).square().sum() < 1.01 * least
    for d in (down, down.bfloat16().float(), torch.randn(64, 8, generator=generator()) / 8):
        up, rest = beside(weight.double().float(), d)
        z = x @ d
        assert torch.allclose((x - z @ d.T) @ rest.T + z @ up, x @ weight.T, atol=1e-3)
    assert beside(weight, down)[1].norm() < weight.norm()


def test_directions_refuse():
    with pytest.raises(RotQuantError, match="rank 3 for 2 tensor-parallel ranks of 4 inputs"):
        directions(torch.eye(8), 3, 2, generator())


def test_truncated_is_the_best_approximation():
    weight, x = layer()
    u, v = truncated(weight, 5, generator())
    exact = torch.linalg.svdvals(weight)[5:].square().sum()
    assert (weight - u @ v).square().sum() < 1.01 * exact
    root = torch.linalg.cholesky(x.T @ x / len(x))
    u, v = truncated(weight, 5, generator(), root)
    assert torch.allclose(v @ v.T, torch.eye(5), atol=1e-5)
    exact = torch.linalg.svdvals(weight @ root)[5:].square().sum()
    assert ((weight - u @ v) @ root).square().sum() < 1.01 * exact


def test_low_rank_refuses():
    weight, _ = layer()
    for rank in (0, 65):
        with pytest.raises(RotQuantError, match=r"not within 1 \.\. 64"):
            low_rank(weight, rank, ROUND, generator())
    with pytest.raises(RotQuantError, match="not positive"):
        low_rank(weight, 2, ROUND, generator(), -torch.eye(64))
    with pytest.raises(RotQuantError, match="not finite"):
        low_rank(weight * torch.nan, 2, ROUND, generator())
