"""The full-precision model over the calibration windows, one layer at a time, and what its sites see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotquant.checkpoint import Source
from rotquant.decoder import Decoder, Linear, float_linear
from rotquant.fold import Tensors, fold_r1
from rotquant.models import EMBEDDING, Architecture, rotary
from rotquant.recipe import Recipe
from rotquant.space import SITE_OF, SITES, Transforms


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

    def decoder(self) -> Decoder:
        cos, sin = rotary(self.arch.config, self.tokens.shape[1])
        return Decoder(self.arch, cos[0].to(self.device), sin[0].to(self.device))

    def embedded(self, samples: int) -> Tensor:
        """What enters layer 0, float32 [samples, T, hidden], in R1's basis; on the CPU."""
        h = self.source.get(EMBEDDING)[self.tokens[:samples]].float()
        return self.transforms.r1.rows(h) if self.transforms.r1 else h

    def layer(self, index: int) -> Tensors:
        """The tensors of a layer, R1 folded, float32."""
        tensors = {name: t.double() for name, t in self.source.layer(self.arch.layer_prefix(index)).items()}
        if self.transforms.r1:
            tensors = fold_r1(tensors, self.transforms.r1)
        return {name: t.float().to(self.device) for name, t in tensors.items()}


class Capture:
    """Samples of what the sites of a layer see: their inputs, and the outputs of v_proj as "v".

    Of each window the same tokens at every site: the first, where massive activations live, and others drawn at random.

    Args:
        rows: tokens to keep of each site, about; windows: in how many windows.
    """

    def __init__(self, rows: int, windows: int, random: torch.Generator) -> None:
        self.per_window, self.random = max(2, rows // windows), random
        self.kept: dict[str, list[Tensor]] = {}

    def watching(self, linear: Linear, steps: int) -> Linear:
        """The same linears; call anew for each window of `steps` tokens."""
        chosen = torch.randperm(steps - 1, generator=self.random)[: self.per_window - 1].sort().values + 1
        chosen = torch.cat((torch.zeros(1, dtype=torch.int64), chosen))

        def watched(name: str, x: Tensor) -> Tensor:
            y = linear(name, x)
            if name in FIRST_OF_SITE:
                self.kept.setdefault(SITE_OF[name], []).append(x[chosen].cpu())
            elif name == "self_attn.v_proj":
                self.kept.setdefault("v", []).append(y[chosen].cpu())
            return y

        return watched

    def rows(self, site: str) -> Tensor:
        """The sampled tokens of a site, float32 [n, channels]."""
        return torch.cat(self.kept[site])


FIRST_OF_SITE = {linears[0] for linears in SITES.values()}


@torch.no_grad()
def forward(job: Learner, decoder: Decoder, tensors: Tensors, chain: Tensor, seen: Capture | None = None) -> Tensor:
    """The chain [samples, T, hidden] after a full-precision layer; `seen` samples what its sites see."""
    linear = float_linear(tensors)
    steps = chain.shape[1]
    watched = [seen.watching(linear, steps) if seen else linear for _ in chain]
    return torch.stack([decoder.layer(tensors, h.to(job.device), f).cpu() for h, f in zip(chain, watched, strict=True)])
