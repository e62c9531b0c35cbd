"""What a recipe does to the model in hand, on tokens that nothing learned from, at a fraction of a whole run.

A few stretches of layers, each of neighbours, are quantized as the recipe says; all others stay in full precision.
Windows of the calibration enter each stretch as full precision has them and pass through it as it is served, so that
its layers see each other's errors. It is layers that are saved, and of the windows only what nothing needs: with few
tokens an input, what fits weights to text looks worse than it will be. The judged windows run through the whole of it:

    full precision -> stretch as served -> full precision -> stretch as served -> ... -> logits
    KL of a token = sum p (log p - log q),  p of the full-precision model, q of this one

A small model is one stretch, all of it. What enters the stretches in full precision is computed once for all recipes.

What changes nothing but the KV cache is judged on *all* layers, whose weights and activations have 8 bits then, rounded
to nearest (`cache_alone`), and calibrated on as many tokens as are judged: in a few layers at 4 bits, what the cache
does is lost in what everything else does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rotquant.checkpoint.journal import Journal, Scope, Slot
from rotquant.checkpoint.layers import read_layer
from rotquant.checkpoint.source import Source
from rotquant.choose.full_precision import FullPrecision
from rotquant.common.devices import Devices
from rotquant.common.progress import Progress
from rotquant.learn.layers import LayerLearner
from rotquant.learn.stream import SAMPLED, Job, spread
from rotquant.models import Architecture
from rotquant.recipe import Activations, OnlineStages, Recipe
from rotquant.transforms.fold import Fold
from rotquant.weights.experts import ExpertsQuantizer

SHARE = 10  # one layer in so many is quantized, and at least LEAST
LEAST = 3
STRETCH = 2  # neighbours quantized one behind the other
JUDGED = 2048  # tokens, in windows of at most WINDOW: contexts differ more than tokens of one
WINDOW = 512
CALIBRATED = 8  # windows calibrate a trial, but more where that is little:
TOKENS = 4  # for each input of the widest linear
RUN = 32  # neighbouring tokens whose KL is not independent; shorter where there are fewer than RUNS of them
RUNS = 8
NOTHING = 0.01  # of the mean KL: differences below are rounding


def judged_windows(seq_len: int, effort: float) -> int:
    """How many windows to set aside, for two judges."""
    return 2 * math.ceil(JUDGED * effort / min(seq_len, WINDOW))


def stretches(layers: int, effort: float) -> list[range]:
    """Which layers a trial quantizes: the first ones, and stretches at equal distances behind them."""
    wanted = min(layers, max(LEAST, math.ceil(layers * effort / SHARE)))
    count = math.ceil(wanted / STRETCH)
    sizes = [wanted // count + (i < wanted % count) for i in range(count)]
    free = layers - wanted
    starts = [sum(sizes[:i]) + free * i // count for i in range(count)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def calibration(tokens: Tensor, arch: Architecture, effort: float) -> Tensor:
    """The windows that calibrate a trial, spread over the run's int64 [samples, T], and cut where they are long."""
    widest = max(inputs for _, (_, inputs) in arch.linears())
    length = min(tokens.shape[1], SAMPLED)
    return spread(tokens, math.ceil(effort * max(CALIBRATED, TOKENS * widest / length)), length)


@dataclass(frozen=True)
class Model:
    """What is judged: the full-precision model and its windows."""

    source: Source
    arch: Architecture
    tokens: Tensor  # int64 [samples, T], of a trial's calibration
    judged: Tensor  # int64 [n, T']
    devices: Devices


class Judge:
    """KL of recipes on one model.

    Args:
        effort: how many times the layers, at least LEAST, and the tokens.
        journal: keeps what full precision makes of the windows.
    """

    def __init__(self, model: Model, effort: float, journal: Journal | Scope) -> None:
        self.model, self.arch, self.journal = model, model.arch, journal
        self.effort, self.stretches = effort, stretches(self.arch.layers, effort)
        longest = max(model.tokens.shape[1], model.judged.shape[1])
        self.full = FullPrecision(model.source, self.arch, model.devices, longest)
        known = journal.kept("full precision")
        if known is None:
            known = self._full_precision()
            journal.keep("full precision", known)
        self.known = known

    @property
    def layers(self) -> int:
        """Layers quantized in a trial."""
        return sum(map(len, self.stretches))

    @torch.no_grad()
    def _full_precision(self) -> dict[str, Tensor]:
        """Residual streams float32 [n, T, hidden] entering each stretch, and what the judged ones shall come to."""
        starts = {stretch.start for stretch in self.stretches}
        tokens, judged = (self.full.embedded(windows) for windows in (self.model.tokens, self.model.judged))
        found: dict[str, Tensor] = {}
        with Progress("choosing: full precision, layer", self.arch.layers, short=True) as progress:
            for index in range(self.arch.layers):
                if index in starts:
                    found |= {f"tokens {index}": tokens, f"judged {index}": judged}
                if index < max(starts):
                    tokens = self.full.layer(index, tokens)
                judged = self.full.layer(index, judged)
                progress.step()
        return found | self.full.wanted(judged)

    def __call__(
        self, job: Job, turn: int, slots: Callable[[str], Slot], progress: Progress, whole: bool = False
    ) -> Tensor:
        """KL float32 [n (T' - 1)] of each predicted token, the layers of the stretches quantized, or the whole model.

        Args:
            turn: 0 or 1, on every other window from this one on.
            job: a recipe, and its transforms with what belongs to the whole model known. Those of the stretches'
                layers are learned here unless the recipe learns end to end, which completes all.
            slots: by step, of loops of learning; progress: hears of each quantized layer.
        """
        matrix = basis(job, self.arch.hidden_size)
        done, following = self.judged("judged 0", turn), 0
        with torch.no_grad():
            for stretch in [range(self.arch.layers)] if whole else self.stretches:
                for index in range(following, stretch.start):
                    done = self.full.layer(index, done)
                tokens = self.known[f"tokens {stretch.start}"]
                tokens = tokens[: math.ceil(JUDGED * self.effort / tokens.shape[1])] if whole else tokens
                done = self._served(job, stretch, matrix, tokens, done, slots, progress)
                following = stretch.stop
            for index in range(following, self.arch.layers):
                done = self.full.layer(index, done)
            return self.full.kl({name: self.judged(name, turn) for name in self.full.kept}, done)

    def judged(self, where: str, turn: int) -> Tensor:
        """Half of the judged windows in full precision; where there is but one window, that."""
        every = self.known[where]
        return every if len(every) == 1 else every[turn::2]

    def _served(
        self, job: Job, stretch: range, matrix: Tensor | None, tokens: Tensor, judged: Tensor,
        slots: Callable[[str], Slot], progress: Progress,
    ) -> Tensor:  # fmt: skip
        """The judged windows float32 [n, T', hidden] behind a stretch whose layers are quantized for it; tokens: what
        enters it of the calibration."""
        turned = lambda h: h if matrix is None else h @ matrix  # noqa: E731
        recipe, entering = job.recipe, turned(tokens)
        learner = None
        if recipe.learns_layers and not recipe.learn.end_to_end:
            learner = LayerLearner(job, entering)
        chain = entering.to(job.dtype, copy=True) if recipe.needs_inputs else None  # which moves in place
        quantizer = ExpertsQuantizer(recipe, job.transforms, self.full.decoders, job.dtype, job.devices)
        fold, h = Fold(self.arch, job.transforms), turned(judged).to(job.dtype)
        for index in stretch:
            if learner:
                with torch.enable_grad():
                    job.transforms.layers[index] = learner(index, None, slots(f"learn layer {index}"), progress.within)
            tensors = read_layer(self.model.source, self.arch, index)
            _, chain = quantizer(index, fold.layer(tensors, index), chain)
            h = quantizer.passed(h)
            progress.step()
        return h.float() if matrix is None else h.float() @ matrix.T


def cache_alone(recipe: Recipe) -> Recipe:
    """The recipe with 8 bits for all but the cache; what it does to queries, keys and values stays."""
    weights = recipe.weights.model_copy(
        update={"bits": 8, "group_size": 0, "method": "rtn", "clip_search": False, "rank": 0}
    )
    scales = recipe.scales.model_copy(update={"norms": "none", "up": "none", "order": False})
    return recipe.model_copy(
        update={
            "weights": weights, "scales": scales, "online": OnlineStages(), "activations": Activations(bits=8),
            "learn": recipe.learn.model_copy(update={"surrogate": None}),
        }
    )  # fmt: skip


def basis(job: Job, size: int) -> Tensor | None:
    """R1 as a matrix, float32 [hidden, hidden]."""
    r1 = job.transforms.r1
    return None if r1 is None else r1.rows(torch.eye(size, dtype=torch.float64)).float()


def relative(kl: Tensor, before: Tensor) -> Tensor:
    """How much lower or higher the KL of each token is, from -2 to 2, of two KLs [n]: 2 (a - b) / (a + b).

    A hundredth of the tokens holds a quarter of the KL. The mean of their differences is mostly chance; this counts
    every token alike, but for those whose KL is nothing beside the mean.
    """
    a, b = (x.double().clamp(min=0) for x in (kl, before))
    return 2 * (a - b) / (a + b + NOTHING * (a.mean() + b.mean())).clamp(min=1e-30)


def error_of(difference: Tensor) -> float:
    """Standard error of the mean of a difference [n] of tokens in their order, from means over runs of tokens."""
    size = max(1, min(RUN, len(difference) // RUNS))
    runs = difference.double()[: len(difference) // size * size].view(-1, size).mean(1)
    return (runs.std() / math.sqrt(len(runs))).item()
