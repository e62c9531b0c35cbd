"""How many sites need 8-bit activations for a budget of KL: measured on the whole model, quantized as it will be.

    sites in the order of their damage (`weights.precision`)  ->  sets of the worst: none, some, all
    each layer is quantized once, with the recipe's bits; judged windows pass through it once for each set, as served
    KL of each set  ->  the fewest sites that keep the budget

Between two sets KL is taken to be linear in the damage that is left. Weights are fitted to inputs at the recipe's bits
here and to those that the sites get in the run itself, which is nearer to full precision, as are tuning and
`weights.wide_bits`: what is found errs on the safe side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from rotquant.checkpoint.journal import Slot
from rotquant.checkpoint.layers import read_layer
from rotquant.choose.full_precision import FullPrecision
from rotquant.choose.judge import WINDOW, basis, calibration
from rotquant.common.progress import Progress, say
from rotquant.errors import RotQuantError
from rotquant.learn.stream import Job
from rotquant.transforms.fold import Fold
from rotquant.transforms.space import LayerTransforms
from rotquant.weights.experts import ExpertsQuantizer
from rotquant.weights.precision import worst
from rotquant_kernels.formats import RowFormat

LEFT = (1.0, 0.7, 0.5, 0.35, 0.2, 0.1, 0.0)  # of the damage, in the sets that are measured


def sets(damage: Tensor) -> list[int]:
    """How many of the worst sites each measured set has, rising: nearest to LEFT."""
    left = remaining(damage)
    return sorted({int((left - share).abs().argmin()) for share in LEFT} | {0, len(damage)})


def remaining(damage: Tensor) -> Tensor:
    """Share of the damage float64 [n] that is left with the k worst sites at 8 bits, for k from 0 to n."""
    falling = damage.sort(descending=True).values
    return torch.cat((damage.new_ones(1), 1 - falling.cumsum(0) / falling.sum())).clamp(min=0)


def fewest(damage: Tensor, measured: Sequence[int], kl: Sequence[float], most: float) -> int | None:
    """The fewest of the worst sites that keep the budget, by the KL of each measured set; None where none does."""
    left = remaining(damage)
    for (low, high), (a, b) in zip(pairwise(measured), pairwise(kl), strict=True):
        span = float(left[low] - left[high])
        for count in range(low, high + 1):
            share = float(left[low] - left[count]) / span if span else 1.0
            if a + (b - a) * share <= most:
                return count
    return None


class BudgetMeter:
    """KL of the sets of one model.

    Args:
        job: the work of the run, its transforms complete; aside: windows int64 [n, T] that nothing learns from.
        damage: of each of `precision.pairs`, float64.
    Raises:
        RotQuantError: no such windows.
    """

    def __init__(self, job: Job, aside: Tensor | None, damage: Tensor) -> None:
        if aside is None:
            raise RotQuantError(
                f"calibration text: no window is left to measure the budget {job.recipe.activations.budget} on; give"
                " more text, lower --samples, or take a budget of sites"
            )
        self.job, self.windows, self.damage = job, aside[:, :WINDOW], damage
        self.measured = sets(damage)
        self.worst = [worst(job.arch, damage, count) for count in self.measured]
        self.tokens = calibration(job.tokens, job.arch, 1)
        self.full = FullPrecision(job.source, job.arch, job.devices, max(self.tokens.shape[1], self.windows.shape[1]))
        self.fold = Fold(job.arch, job.transforms)
        self.quantizer = ExpertsQuantizer(job.recipe, job.transforms, self.full.decoders, job.dtype, job.devices)

    @torch.no_grad()
    def __call__(self, slot: Slot) -> list[float]:
        """Nats a token of each of `measured`; snapshots go to the slot."""
        found = slot.found or {
            "chain": self._embedded(self.tokens), "full": self.full.embedded(self.windows),
            "sets": self._embedded(self.windows).expand(len(self.measured), -1, -1, -1).clone(),
        }  # fmt: skip
        with Progress("precision: KL, layer", self.job.arch.layers, slot.done) as progress:
            for index in range(slot.done, self.job.arch.layers):
                found = self._layer(index, found)
                slot.save(index + 1, lambda found=found: found)  # type: ignore[misc]
                progress.step()
        matrix = basis(self.job, self.job.arch.hidden_size)
        own = (h.float() if matrix is None else h.float() @ matrix.T for h in found["sets"])
        wanted = self.full.wanted(found["full"])
        return [self.full.kl(wanted, h).mean().item() for h in own]

    def _embedded(self, windows: Tensor) -> Tensor:
        """What enters layer 0 as it is served, [n, T, hidden]."""
        rows = self.fold.embedding(self.job.source.get(self.job.arch.names.embedding)[windows.flatten()])
        return rows.to(self.job.dtype).view(*windows.shape, -1) * self.job.arch.embedding_factor(self.job.dtype)

    def _layer(self, index: int, before: dict[str, Tensor]) -> dict[str, Tensor]:
        """All chains behind a layer."""
        layer, chain = self.job.transforms.layers[index], before["chain"]
        tensors = read_layer(self.job.source, self.job.arch, index)
        _, after = self.quantizer(index, self.fold.layer(tensors, index), chain if self._needs_inputs else None)
        for sites, h in zip(self.worst, before["sets"], strict=True):
            rows = self._rows(layer.widened(sites.get(index, ())))
            served = [replace(one, rows=rows) for one in self.quantizer.served]
            self.job.devices.map(lambda on, _, x, served=served: served[on].layer(x), h, out=h)
        full = self.full.layer(index, before["full"])
        return {"chain": chain if after is None else after, "full": full, "sets": before["sets"]}

    @property
    def _needs_inputs(self) -> bool:
        return self.job.recipe.needs_inputs

    def _rows(self, layer: LayerTransforms) -> Callable[[str], RowFormat]:
        return lambda site: layer.rows(site, self.job.recipe.activations.rows)


def affordable(job: Job, aside: Tensor | None, damage: Tensor, slot: Slot) -> int:
    """How many of the worst sites get 8 bits for the recipe's budget of KL, and says what it brings."""
    most = job.recipe.activations.most_kl
    assert most is not None
    meter = BudgetMeter(job, aside, damage)
    kl = meter(slot)
    found = fewest(damage, meter.measured, kl, most)
    line = f"precision: KL {kl[0]:.4f} with 4-bit activations everywhere, {kl[-1]:.4f} with 8 bits; at most {most:g}"
    if found is None:
        say(f"{line} was asked for: weights and cache alone take more, so that all sites get 8 bits")
        return len(damage)
    say(line)
    return found
