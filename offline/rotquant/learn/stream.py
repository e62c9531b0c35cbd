"""The full-precision model over the calibration windows, one layer at a time, and what its sites see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotquant.checkpoint.layers import read_layer
from rotquant.checkpoint.source import Source
from rotquant.models import Architecture, Layer, Tensors
from rotquant.models.decoder import Decoder, Linear, decoders
from rotquant.models.expert_tensors import each
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
    device: str
    tp_max: int

    def decoders(self) -> list[Decoder]:
        return decoders(self.arch, self.tokens.shape[1], self.device)

    def embedded(self, samples: int) -> Tensor:
        """What enters layer 0, float32 [samples, T, hidden], in R1's basis; on the CPU."""
        h = self.source.get(self.arch.names.embedding)[self.tokens[:samples]].float() * self.arch.embedding_scale
        return self.transforms.r1.rows(h) if self.transforms.r1 else h

    def read(self, index: int) -> Tensors:
        """The tensors of a layer as they are in the source."""
        return read_layer(self.source, self.arch, index)

    def layer(self, index: int) -> Tensors:
        """The tensors of a layer, R1 folded, float32."""
        tensors = each(self.read(index), Tensor.double)
        if self.transforms.r1:
            tensors = fold_r1(tensors, self.transforms.r1, self.arch.kinds[index])
        return each(tensors, lambda tensor: tensor.float().to(self.device))


class Capture:
    """Samples of what the sites of a layer see: their inputs, and the values as "v".

    Of each window the same tokens at every site: the first, where massive activations live, and others drawn at random.

    Args:
        kind: the layer; rows: tokens to keep of each site, about; windows: in how many windows.
    """

    def __init__(self, kind: Layer, rows: int, windows: int, random: torch.Generator) -> None:
        self.kind, self.per_window, self.random = kind, max(2, rows // windows), random
        self.first = {(*kind.full_precision.get(site, ()), *linears)[0]: site for site, linears in kind.sites.items()}
        self.experts = {m.down for m in kind.mlp.gated} if len(kind.mlp.gated) > 1 else set[str]()
        self.kept: dict[str, list[Tensor]] = {}

    def watching(self, linear: Linear, steps: int) -> Linear:
        """The same linears; call anew for each window of `steps` tokens."""
        chosen = torch.randperm(steps - 1, generator=self.random)[: self.per_window - 1].sort().values + 1
        chosen = torch.cat((torch.zeros(1, dtype=torch.int64), chosen))

        def watched(name: str, x: Tensor) -> Tensor:
            y = linear(name, x)
            if name in self.experts:  # each sees other tokens: some of every one's
                self.kept.setdefault("down", []).append(x[: max(1, self.per_window // len(self.experts))].cpu())
            elif name in self.first:
                self.kept.setdefault(self.first[name], []).append(x[chosen].cpu())
            elif name == self.kind.attention.value:
                self.kept.setdefault("v", []).append(y[chosen].cpu())
            return y

        return watched

    def rows(self, site: str) -> Tensor:
        """The sampled tokens of a site, float32 [n, channels]."""
        return torch.cat(self.kept[site])


@torch.no_grad()
def forward(job: Learner, decoder: Decoder, tensors: Tensors, chain: Tensor, seen: Capture | None = None) -> Tensor:
    """The chain [samples, T, hidden] after a full-precision layer; `seen` samples what its sites see."""
    linear = decoder.float_linear(tensors)
    steps = chain.shape[1]
    watched = [seen.watching(linear, steps) if seen else linear for _ in chain]
    return torch.stack([decoder.layer(tensors, h.to(job.device), f).cpu() for h, f in zip(chain, watched, strict=True)])
