"""Which sites get 8-bit activations: the damage that fewer bits do at each, measured in the quantized chain.

The damage of a site is how far the output h' of its layer moves when this site alone is rounded to the recipe's bits
and the layer's others to 8, for each token relative to the residual stream, which is how the norm behind it sees it:

    d = mean over tokens of |h'(site at b bits) - h'|² / |h'|²

A few windows tell it. Weights are rounded to nearest, which changes little about the activations, and the chain goes
on with the recipe's bits everywhere, as the served model's would without a budget.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rotquant.checkpoint.journal import Slot
from rotquant.checkpoint.layers import read_layer
from rotquant.checkpoint.source import Source
from rotquant.common.devices import Devices
from rotquant.common.progress import Progress, say
from rotquant.models import Architecture
from rotquant.models.decoder import decoders
from rotquant.recipe import Recipe
from rotquant.transforms.fold import Fold
from rotquant.transforms.space import LayerTransforms, Transforms
from rotquant.weights.experts import ExpertsQuantizer
from rotquant_kernels.formats import RowFormat

WINDOWS, STEPS = 2, 512  # calibration windows that are looked at, and tokens of each; twice as many chose the same


def pairs(arch: Architecture) -> list[tuple[int, str]]:
    """Every (layer, site), in order."""
    return [(index, site) for index, kind in enumerate(arch.kinds) for site in kind.sites]


def widen(arch: Architecture, transforms: Transforms, damage: Tensor, count: int) -> Transforms:
    """The transforms with 8 bits at the `count` sites of most damage, float64 [pairs]."""
    chosen = worst(arch, damage, count)
    share = float(damage.sort(descending=True).values[:count].sum() / damage.sum())
    say(f"precision: 8-bit activations at {count} of {len(damage)} sites, with {share:.0%} of the damage")
    layers = [layer.widened(chosen.get(index, ())) for index, layer in enumerate(transforms.layers)]
    return replace(transforms, layers=layers)


def worst(arch: Architecture, damage: Tensor, count: int) -> dict[int, list[str]]:
    """The `count` sites of most damage, by layer."""
    known, found = pairs(arch), defaultdict[int, list[str]](list)
    for i in damage.argsort(descending=True, stable=True)[:count].tolist():
        found[known[i][0]].append(known[i][1])
    return found


class DamageMeter:
    """Measures a model's sites layer by layer.

    Args:
        recipe, arch, source, transforms: what is quantized, and how; dtype: of the checkpoint.
        tokens: int64 [samples, T], calibration windows; devices: over which they are spread.
    """

    def __init__(
        self, recipe: Recipe, arch: Architecture, source: Source, transforms: Transforms, tokens: Tensor,
        dtype: torch.dtype, devices: Devices,
    ) -> None:  # fmt: skip
        self.recipe, self.arch, self.source, self.transforms = recipe, arch, source, transforms
        self.tokens, self.dtype, self.devices = tokens[:WINDOWS, :STEPS], dtype, devices
        rounded = recipe.weights.model_copy(update={"method": "rtn", "clip_search": False})
        coarse = recipe.model_copy(update={"weights": rounded})
        computed = decoders(arch, self.tokens.shape[1])
        self.quantizer = ExpertsQuantizer(coarse, transforms, computed, dtype, devices)
        self.fold = Fold(arch, transforms)

    @torch.no_grad()
    def __call__(self, slot: Slot) -> Tensor:
        """Damage of each of `pairs`, float64; snapshots go to the slot."""
        found: dict[str, Tensor] = slot.found or {"chain": self._embedded(), "damage": torch.zeros(0).double()}
        chain, damage = found["chain"], found["damage"]
        with Progress("precision: layer", self.arch.layers, slot.done) as progress:
            for index in range(slot.done, self.arch.layers):
                chain, own = self._layer(index, chain)
                damage = torch.cat((damage, own))
                slot.save(index + 1, lambda chain=chain, damage=damage: {"chain": chain, "damage": damage})  # type: ignore[misc]
                progress.step(" ".join(f"{value:.1e}" for value in own.tolist()))
        return damage

    def _embedded(self) -> Tensor:
        """What enters layer 0, [samples, T, hidden]."""
        rows = self.fold.embedding(self.source.get(self.arch.names.embedding)[self.tokens.flatten()])
        return rows.to(self.dtype).view(*self.tokens.shape, -1) * self.arch.embedding_factor(self.dtype)

    def _layer(self, index: int, chain: Tensor) -> tuple[Tensor, Tensor]:
        """The chain behind a layer, and the damage of its sites."""
        kind, layer = self.arch.kinds[index], self.transforms.layers[index]
        folded = self.fold.layer(read_layer(self.source, self.arch, index), index)
        # A branch of the inputs, or of keys' feedback, needs some; weights rounded to nearest do not.
        needed = self.recipe.weights.subtracts or self.recipe.kv.key_feedback
        self.quantizer(index, folded, chain.clone() if needed else None)
        served, wide = self.quantizer.served, layer.widened(kind.sites)
        exact = [replace(one, rows=self._rows(wide)) for one in served]
        alone = {
            site: [replace(one, rows=self._rows(layer.widened(kind.sites.keys() - {site}))) for one in served]
            for site in kind.sites
        }

        def damage(on: int, _: int, h: Tensor) -> Tensor:
            wanted = exact[on].layer(h).float()
            size = wanted.square().sum(-1)
            moved = [(alone[site][on].layer(h).float() - wanted).square().sum(-1) for site in kind.sites]
            return torch.stack([(distance / size).double().mean() for distance in moved])

        found = self.devices.map(damage, chain, out=torch.empty(len(chain), len(kind.sites), dtype=torch.float64))
        return self.quantizer.passed(chain), found.mean(0)

    def _rows(self, layer: LayerTransforms) -> Callable[[str], RowFormat]:
        return lambda site: layer.rows(site, self.recipe.activations.rows)
