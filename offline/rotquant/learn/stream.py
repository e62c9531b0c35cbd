"""The full-precision model over the calibration windows, one layer at a time, and what its sites see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotquant.checkpoint.layers import read_layer
from rotquant.checkpoint.source import Source
from rotquant.common.devices import Devices
from rotquant.models import Architecture, Layer, Tensors
from rotquant.models.attention import Attention
from rotquant.models.decoder import Decoder, Linear, bias_of, decoders, rms_norm
from rotquant.models.expert_tensors import each
from rotquant.models.mixture import inner, route, shared_output
from rotquant.models.mlp import Experts
from rotquant.recipe import Recipe
from rotquant.transforms.fold import fold_r1
from rotquant.transforms.space import Transforms


@dataclass
class Job:
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

    def embedded(self, samples: int, longest: int | None = None) -> Tensor:
        """What enters layer 0 of `spread` windows: float32 [samples, T, hidden], in R1's basis, on the CPU."""
        tokens = spread(self.tokens, samples, longest)
        h = self.source.get(self.arch.names.embedding)[tokens].float() * self.arch.embedding_factor(self.dtype)
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


def spread(tokens: Tensor, samples: int, longest: int | None = None) -> Tensor:
    """So many windows of int64 [n, T], or all of fewer, spread over all, each cut after so many tokens."""
    samples = min(len(tokens), samples)
    return tokens[torch.arange(samples) * len(tokens) // samples, :longest]


SAMPLED = 512  # tokens of a window that samples of rows, and trials (`choose`), look at, at most
ROWS = 4096  # tokens of an expert computed at a time
KEPT = 256  # of those that pass through an expert are sampled


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
        self.inner: dict[str, Tensor] = {}  # of a mixture, by the last linear of each gated MLP, what it reads

    def watching(self, linear: Linear, window: int) -> Linear:
        """The same linears, seen in one window."""

        def watched(name: str, x: Tensor) -> Tensor:
            y = linear(name, x)
            if name in self.first:
                self.kept[self.first[name]][window] = x[self.chosen[window]].cpu()
            elif self.kind.attends and name == self.kind.attends.value:
                self.kept["v"][window] = values(self.kind, self.kind.attends, y[self.chosen[window]]).cpu()
            return y

        return watched

    def watching_inner(self, linear: Linear) -> Linear:
        """The same linears of a mixture, of which those behind an activation are seen by their first rows."""
        last = set(self.kind.sites["down"])

        def watched(name: str, x: Tensor) -> Tensor:
            if name in last and name not in self.inner:
                self.inner[name] = x[:: max(1, len(x) // KEPT)][:KEPT].cpu()
            return linear(name, x)

        return watched

    def reads(self, linear: str) -> Tensor:
        """Samples of what the last linear of a gated MLP reads, float32 [n, channels]; [0] where no token comes."""
        return self.inner.get(linear, torch.empty(0)) if isinstance(self.kind.mlp, Experts) else self.rows("down")

    def rows(self, site: str) -> Tensor:
        """The sampled tokens of a site, float32 [n, channels]; of none, [0], where nothing was seen."""
        return torch.cat([torch.empty(0), *(rows for rows in self.kept[site] if rows is not None)])


def values(kind: Layer, attention: Attention, y: Tensor) -> Tensor:
    """The values [n, kv_heads * d] that attention mixes, from what their linear makes."""
    if not attention.normed_values:
        return y
    return rms_norm(y.unflatten(-1, (-1, attention.head_dim)), y.new_ones(attention.head_dim), kind.eps).flatten(-2)


def product(tensors: Tensors, compute: torch.dtype) -> Linear:
    """The original's linears, float32 in and out."""
    weights = {name: t.to(compute) for name, t in tensors.items() if t.dim() == 2}

    def linear(name: str, x: Tensor) -> Tensor:
        made = torch.nn.functional.linear(x.to(compute), weights[f"{name}.weight"]).float()
        bias = bias_of(tensors, name)
        return made if bias is None else made + bias.float()

    return linear


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """bfloat16 for a model in 16 bits where the hardware multiplies it, else float32.

    What that rounds is 58 dB below what it rounds; 8-bit activations are at 45 dB, 4-bit ones at 20.
    """
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast and dtype.itemsize == 2 else torch.float32


@torch.no_grad()
def forward(
    devices: Devices, decoder: Decoder, tensors: Tensors, chain: Tensor, seen: Capture | None = None,
    compute: torch.dtype = torch.float32, routed: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The chain [samples, T, hidden] after a full-precision layer.

    Args:
        seen: samples what its sites see; compute: dtype of its products, of a layer with experts float32.
        routed: gets what a router says of all tokens, parts of [n, experts].
    """
    if isinstance(decoder.kind.mlp, Experts):
        return _forward_mixture(devices, decoder, decoder.kind.mlp, tensors, chain, seen, routed)
    copies = zip(devices.places, devices.copies(tensors), strict=True)
    layers = [(decoder.on(p), t, product(t, compute)) for p, t in copies]

    def layer(on: int, window: int, h: Tensor) -> Tensor:
        decoder, tensors, linear = layers[on]
        return decoder.layer(tensors, h, seen.watching(linear, window) if seen else linear)

    return devices.map(layer, chain, out=torch.empty_like(chain))


def _forward_mixture(
    devices: Devices, decoder: Decoder, block: Experts, tensors: Tensors, chain: Tensor, seen: Capture | None,
    routed: list[Tensor] | None,
) -> Tensor:  # fmt: skip
    """`forward` of a layer with experts: each is made once, for the tokens of all windows."""
    place = devices.first
    copies = [(decoder.on(p), t) for p, t in zip(devices.places, devices.copies(tensors), strict=True)]

    def attended(on: int, window: int, h: Tensor) -> Tensor:
        decoder, tensors = copies[on]
        linear = decoder.float_linear(tensors)
        return decoder.behind_attention(tensors, h, seen.watching(linear, window) if seen else linear)

    after = devices.map(attended, chain, out=torch.empty_like(chain))
    gain, linear = tensors[f"{block.norm}.weight"], decoder.float_linear(tensors)
    x = devices.map(lambda _, i, h: decoder.norm(h, gain.to(h)), after, out=torch.empty_like(chain))
    rows = x.flatten(0, 1)
    said = [linear(block.router, part.to(place)).cpu() for part in rows.split(ROWS)]
    routing = route(block, torch.cat(said))
    if routed is not None:
        routed += said
    if seen:
        linear = seen.watching_inner(linear)
    out = torch.zeros_like(rows)
    for part, written in zip(rows.split(ROWS), out.split(ROWS), strict=True):
        if (shared := shared_output(block, part.to(place), linear)) is not None:
            written.copy_(shared)
    for index, expert in enumerate(block.routed):
        tokens, shares = routing.of(index)
        for some, weights in zip(tokens.split(ROWS), shares.split(ROWS), strict=True) if len(tokens) else ():
            x4 = inner(expert, rows[some].to(place), linear)
            out.index_add_(0, some, linear(expert.down, x4).cpu() * weights[:, None])
    if seen:
        seen.kept["mlp"] = [window[chosen] for window, chosen in zip(x, seen.chosen, strict=True)]
    return decoder.add(after, out.view(chain.shape))
