"""The full-precision model over the calibration windows, one layer at a time, and what its sites see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotquant.checkpoint.source import Source
from rotquant.common.devices import Devices
from rotquant.models import Architecture, Layer, Tensors
from rotquant.models.decoder import Decoder, Linear, decoders
from rotquant.recipe import Recipe
from rotquant.transforms.fold import fold_r1
from rotquant.transforms.space import Transforms


@dataclass
class Learner:
    """What learning works on; `transforms` is completed step by step."""

    recipe: Recipe
    arch: Architecture
    source: Source
    tokens: Tensor  # int64 [samples, T]
    transforms: Transforms
    dtype: torch.dtype  # of the checkpoint
    seed: int
    devices: Devices
    tp_max: int

    @property
    def device(self) -> torch.device:
        """Where what is learned lies; the windows are spread over all devices."""
        return self.devices.first

    def decoders(self) -> list[Decoder]:
        return decoders(self.arch, self.tokens.shape[1], self.device)

    def embedded(self, samples: int) -> Tensor:
        """What enters layer 0 of so many windows, spread over all: float32 [samples, T, hidden], R1's basis, CPU."""
        tokens = self.tokens[torch.arange(samples) * len(self.tokens) // samples]
        h = self.source.get(self.arch.names.embedding)[tokens].float() * self.arch.embedding_scale
        return self.transforms.r1.rows(h) if self.transforms.r1 else h

    def read(self, index: int) -> Tensors:
        """The tensors of a layer as they are in the source."""
        return self.arch.kinds[index].split(self.source.layer(self.arch.layer_prefix(index)))

    def layer(self, index: int) -> Tensors:
        """The tensors of a layer, R1 folded, float32."""
        tensors = {name: t.double() for name, t in self.read(index).items()}
        if self.transforms.r1:
            tensors = fold_r1(tensors, self.transforms.r1, self.arch.kinds[index])
        return {name: t.float().to(self.device) for name, t in tensors.items()}


class Capture:
    """Samples of what the sites of a layer see: their inputs, and the values as "v".

    Of each window the same tokens at every site: the first, where massive activations live, and others drawn at random.

    Args:
        kind: the layer; rows: tokens to keep of each site, about; windows: how many, of `steps` tokens each.
    """

    def __init__(self, kind: Layer, rows: int, windows: int, steps: int, random: torch.Generator) -> None:
        self.kind, kept = kind, max(2, rows // windows)
        first = torch.zeros(1, dtype=torch.int64)
        drawn = (torch.randperm(steps - 1, generator=random)[: kept - 1].sort().values + 1 for _ in range(windows))
        self.chosen = [torch.cat((first, others)) for others in drawn]
        self.first = {linears[0]: site for site, linears in kind.sites.items()}
        self.kept: dict[str, list[Tensor | None]] = {site: [None] * windows for site in (*kind.sites, "v")}

    def watching(self, linear: Linear, window: int) -> Linear:
        """The same linears, seen in one window."""

        def watched(name: str, x: Tensor) -> Tensor:
            y = linear(name, x)
            if name in self.first:
                self.kept[self.first[name]][window] = x[self.chosen[window]].cpu()
            elif name == self.kind.attention.value:
                self.kept["v"][window] = y[self.chosen[window]].cpu()
            return y

        return watched

    def rows(self, site: str) -> Tensor:
        """The sampled tokens of a site, float32 [n, channels]."""
        return torch.cat([rows for rows in self.kept[site] if rows is not None])


@torch.no_grad()
def forward(job: Learner, decoder: Decoder, tensors: Tensors, chain: Tensor, seen: Capture | None = None) -> Tensor:
    """The chain [samples, T, hidden] after a full-precision layer; `seen` samples what its sites see."""
    devices = job.devices
    layers = [(decoder.on(p), t) for p, t in zip(devices.places, devices.copies(tensors), strict=True)]

    def layer(on: int, window: int, h: Tensor) -> Tensor:
        decoder, tensors = layers[on]
        linear = decoder.float_linear(tensors)
        return decoder.layer(tensors, h, seen.watching(linear, window) if seen else linear)

    return devices.map(layer, chain, out=torch.empty_like(chain))
