"""Procrustes and the optimisers: planted solutions, monotone losses, and the order of methods on toy data."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from rotquant.errors import RotQuantError
from rotquant.learn.objectives import gsr_loss, kurtosis, quantization_error, whip
from rotquant.learn.orthogonal import CayleySGD, QROrth, StiefelAdam, learn_rotation, qr_rotation
from rotquant.learn.procrustes import alternate, annealed_clip, massive_tokens, nearest_rotation, token_weights
from rotquant.learn.targets import clipped_target, corner_target, quantized_target
from rotquant.transforms.hadamard import RandomHadamard
from rotquant_kernels.formats import RowFormat

ASYMMETRIC = RowFormat(symmetric=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rotation(d: int, seed: int) -> torch.Tensor:
    return qr_rotation(torch.randn(d, d, generator=generator(seed), dtype=torch.float64))


def corners(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows at corners of a cube that a hidden rotation has turned: (rows, R that turns them back)."""
    hidden = random_rotation(d, seed + 1)
    signs = torch.randint(0, 2, (n, d), generator=generator(seed), dtype=torch.float64) * 2 - 1
    return signs @ hidden.T, hidden


def is_rotation(r: torch.Tensor, atol: float = 1e-9) -> bool:
    return torch.allclose(r.mT @ r, torch.eye(r.shape[-1], dtype=r.dtype).expand_as(r), atol=atol)


def test_nearest_rotation_solves_procrustes():
    x, hidden = corners(100, 12)
    assert torch.allclose(nearest_rotation(x.T @ (x @ hidden)), hidden, atol=1e-10)


@pytest.mark.parametrize("method", ["procrustes", "adam", "qr"])
def test_hidden_corners_are_found(method):
    """Only signed permutations of the hidden rotation put every row at a corner, where Whip is exp(-1)."""
    x, hidden = corners(1200, 12)
    skew = torch.randn(12, 12, generator=generator(7), dtype=torch.float64)
    start = hidden @ torch.matrix_exp(0.15 * (skew - skew.T))
    before = whip(x @ start).item()
    if method == "procrustes":
        r, losses = alternate(lambda: x.split(500), start, [corner_target] * 60)
        assert losses[-1] < 1e-6
    else:
        lr = {"adam": 0.05, "qr": 0.03}[method]
        r, losses = learn_rotation(lambda: [x], whip, start, method, steps=250, lr=lr)
    assert is_rotation(r)
    assert whip(x @ r).item() < 0.3679 + 0.02 * (before - 0.3679)


@pytest.mark.parametrize("target", ["corner", "clipped"])
def test_alternation_never_raises_its_loss(target):
    goals = {"corner": corner_target, "clipped": partial(clipped_target, kappa=1.5)}
    x = torch.randn(600, 24, generator=generator(), dtype=torch.float64).pow(3)
    weights = partial(token_weights, gamma=10)
    _, losses = alternate(lambda: [x], random_rotation(24, 1), [goals[target]] * 30, weights, tolerance=0)
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(losses))
    assert losses[-1] < 0.97 * losses[0]


def test_alternation_sees_all_batches_and_weights():
    x = torch.randn(90, 32, generator=generator(), dtype=torch.float64)
    x[::9, 3] = 20
    assert massive_tokens(x).sum() == 10
    start = random_rotation(32, 1)
    whole = alternate(lambda: [x], start, [corner_target] * 3)
    parts = alternate(lambda: iter(x.split(7)), start, [corner_target] * 3)
    assert torch.allclose(whole[0], parts[0], atol=1e-9)
    assert parts[1] == pytest.approx(whole[1])
    weighted = alternate(lambda: [x], start, [corner_target] * 3, partial(token_weights, gamma=5.0))
    scaled = x * token_weights(x, 25.0).sqrt()[:, None] ** 0.5
    assert torch.allclose(weighted[0], alternate(lambda: [scaled], start, [corner_target] * 3)[0], atol=1e-9)


def test_alternation_stops_early_and_goes_on_with_the_next_target():
    x, hidden = corners(300, 8)
    _, losses = alternate(lambda: [x], hidden, [corner_target] * 20 + [partial(quantized_target, rows=RowFormat())] * 2)
    assert 6 < len(losses) < 10
    clips = annealed_clip(5)
    assert [t.keywords["kappa"] for t in clips] == pytest.approx([3.2, 2.875, 2.55, 2.225, 1.9])


def test_massive_tokens():
    x = torch.randn(50, 64, generator=generator())
    x[7, 3] = 60
    x[9, [1, 20]] = torch.tensor([-50.0, 40.0])
    assert massive_tokens(x).nonzero().flatten().tolist() == [7, 9]
    assert torch.equal(massive_tokens(1e-4 * x), massive_tokens(x))
    error = (x - quantized_target(x, RowFormat())).norm(dim=1) / x.norm(dim=1)
    assert error[[7, 9]].max() < error[massive_tokens(x).logical_not()].min() + 0.1  # DFRot's rule is about these
    assert token_weights(x, 10.0)[[7, 0]].tolist() == [100, 1]


@pytest.mark.parametrize("optimiser", [CayleySGD, StiefelAdam])
def test_optimisers_solve_a_planted_procrustes(optimiser):
    """A batch of two problems: min |X R - Y|² has its solution in the component of the start."""
    x = torch.randn(2, 80, 10, generator=generator(), dtype=torch.float64)
    start = torch.stack([random_rotation(10, s) for s in (1, 2)])
    turn = torch.stack([torch.matrix_exp(0.3 * (a - a.T)) for a in torch.randn(2, 10, 10, generator=generator(3))])
    answer = start @ turn.double()
    r = torch.nn.Parameter(start.clone())
    engine = optimiser([r], lr=1.0 if optimiser is CayleySGD else 0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(engine, 300)
    for _ in range(300):
        engine.zero_grad()
        loss = (x @ r - x @ answer).square().mean()
        loss.backward()
        engine.step()
        schedule.step()
        assert is_rotation(r.detach())
    assert loss < 1e-6


def test_a_cayley_step_is_the_formula_of_spinquant():
    x = random_rotation(6, 0)
    r = torch.nn.Parameter(x.clone())
    g = torch.randn(6, 6, generator=generator(), dtype=torch.float64)
    r.grad = g
    CayleySGD([r], lr=0.01, momentum=0.0).step()
    w = -g @ x.T - 0.5 * x @ (x.T @ -g @ x.T)
    a = w - w.T
    y = x - 0.01 * g
    for _ in range(60):
        y = x + 0.005 * a @ (x + y)
    assert torch.allclose(r.detach(), y, atol=1e-10)


def test_qr_orth_starts_where_it_is_told_and_has_gradients():
    skew = torch.randn(7, 7, generator=generator(3), dtype=torch.float64)
    start = torch.matrix_exp(skew - skew.T)
    model = QROrth(start)
    assert torch.allclose(model(), start, atol=1e-12)
    z = torch.randn(5, 5, generator=generator(), dtype=torch.float64, requires_grad=True)
    assert is_rotation(qr_rotation(z).detach())
    assert torch.autograd.gradcheck(qr_rotation, z)


def test_learning_refuses_what_it_cannot_do():
    with pytest.raises(RotQuantError, match="unknown optimiser 'sgd'"):
        learn_rotation(lambda: [torch.ones(2, 4)], whip, torch.eye(4), "sgd")
    with pytest.raises(RotQuantError, match="no calibration rows"):
        learn_rotation(lambda: [], whip, torch.eye(4))


@pytest.mark.parametrize(
    "objective", [whip, kurtosis, partial(gsr_loss, rows=ASYMMETRIC), partial(quantization_error, rows=RowFormat())]
)
def test_every_objective_falls_when_it_is_trained(objective):
    x, _ = corners(400, 16, seed=4)
    x = (x + 0.1 * torch.randn(400, 16, generator=generator())).float()
    start = random_rotation(16, 9).float()
    r, _ = learn_rotation(lambda: x.split(100), objective, start, "qr", steps=160, lr=0.02)
    assert objective(x @ r.float()) < 0.8 * objective(x @ start)


class Toy:
    """Rows with a structure that a rotation can use, turned by a hidden one, and a few with one massive channel."""

    def __init__(self, d: int = 32, n: int = 3000) -> None:
        g = generator(11)
        sources = torch.randn(2 * n, d, generator=g).sign() * torch.rand(2 * n, d, generator=g).pow(0.3)
        rows = sources @ random_rotation(d, 12).float()
        massive = torch.randn(24, d, generator=g)
        massive[:, 5] = 60 * torch.exp(0.1 * torch.randn(24, generator=g))
        self.train, self.test = torch.cat((rows[:n], massive[:12])), (rows[n:], massive[12:])
        self.hadamard = RandomHadamard(d, g).rows(torch.eye(d, dtype=torch.float64))
        self.random = random_rotation(d, 13)

    def errors(self, r: torch.Tensor) -> tuple[float, float]:
        """Held-out relative error of 4-bit asymmetric tokens: (normal, massive)."""
        return tuple(quantization_error(x @ r.float(), ASYMMETRIC).item() for x in self.test)


@pytest.fixture(scope="module")
def toy():
    return Toy()


def test_hadamard_suits_massive_tokens_and_learning_suits_the_others(toy):
    """The order that the methods have on larger toy data: learning helps normal tokens, gamma protects massive ones."""

    def alternated(target):
        return toy.errors(alternate(lambda: [toy.train], toy.hadamard, [target] * 40)[0])

    def whipped(gamma):
        weights = partial(token_weights, gamma=gamma)
        r, _ = learn_rotation(lambda: [toy.train], whip, toy.hadamard.float(), "qr", 100, 0.02, weights)
        return toy.errors(r)

    start, corner, dfrot = (
        toy.errors(toy.hadamard),
        alternated(corner_target),
        alternated(partial(quantized_target, rows=RowFormat())),
    )
    plain, heavy = whipped(1.0), whipped(10.0)
    assert start[1] < 0.7 * toy.errors(toy.random)[1]
    assert max(corner[0], plain[0]) < 0.7 * start[0]
    assert corner[1] < 0.6 * plain[1]
    assert heavy[1] < 0.8 * plain[1]
    assert dfrot[0] == pytest.approx(start[0], rel=0.05)  # quantized targets hardly move normal tokens
