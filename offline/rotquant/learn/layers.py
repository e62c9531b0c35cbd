"""The transforms of one layer after another: scales, R2, the order of channels, online stages; then blockwise learning.

Smoothing takes its scales from the tokens and the weights of a site (`transforms.scaling`); what is folded is 1 / λ.
alpha is given, or searched: at the norms and at up_proj the one of least output error, at the values always 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rotquant.checkpoint.journal import Slot
from rotquant.learn.blockwise import learn_blockwise
from rotquant.learn.initial import generator
from rotquant.learn.key_scale import key_scale
from rotquant.learn.rotations import learn_r2
from rotquant.learn.scale_search import search_scale
from rotquant.learn.starts import STARTS, Seen
from rotquant.learn.stream import SAMPLED, Capture, Job, forward, product_dtype
from rotquant.models import Tensors
from rotquant.models.attention import Attention
from rotquant.models.mlp import GatedMLP
from rotquant.transforms.fold import per_query_head
from rotquant.transforms.permutation import zigzag
from rotquant.transforms.scaling import smooth_scale
from rotquant.transforms.space import LayerTransforms
from rotquant_kernels import reference
from rotquant_kernels.formats import WeightFormat

ROWS = 4096  # tokens of a site that are kept,
SHARE, WINDOWS = 2, 8  # one of so many that are computed, in so many windows at least
VALUES_ALPHA = 0.5


class LayerLearner:
    """Learns the layers from the first to the last.

    The full-precision chain is kept here.

    Args:
        entering: the chain float32 [samples, T, hidden], in R1's basis, that enters the first layer asked for; None:
            that is layer 0.
    """

    def __init__(self, job: Job, entering: Tensor | None = None) -> None:
        self.job, self.decoders = job, job.decoders()
        self.block = job.recipe.learn.blockwise
        samples, longest = (self.block.samples, None) if self.block else (windows_of_rows(job.tokens.shape[1]), SAMPLED)
        self.chain = job.embedded(samples, longest) if entering is None else entering[:samples]

    def __call__(
        self, index: int, known: LayerTransforms | None, slot: Slot, report: Callable[[float, str], object]
    ) -> LayerTransforms:
        """The transforms of layer `index`, in turn; `known` ones, of an interrupted run, are only passed through.

        slot and report: as in `learn_blockwise`.
        """
        job, tensors, decoder = self.job, self.job.layer(index), self.decoders[index]
        seen = Capture(decoder.kind, ROWS, len(self.chain), self.chain.shape[1], generator(job.seed, f"layer.{index}"))
        exactly = torch.float32 if self.block else product_dtype(job.dtype, job.device)  # gradients want the difference
        after = forward(job.devices, decoder, tensors, self.chain, seen, exactly)
        layer = known or SampleLearner(job, index, tensors, seen).layer
        if self.block and known is None:
            layer = learn_blockwise(job, decoder, tensors, layer, self.chain, after, index, slot, report)
        self.chain = after
        return layer


def windows_of_rows(length: int) -> int:
    """How many windows of so many tokens samples of rows are drawn from, where nothing else learns from them."""
    return max(WINDOWS, math.ceil(SHARE * ROWS / min(length, SAMPLED)))


class SampleLearner:
    """What needs no gradients through the layer: everything from samples of what its sites see.

    Args:
        tensors: of the layer, R1 folded.
    """

    def __init__(self, job: Job, index: int, tensors: Tensors, seen: Capture) -> None:
        self.job, self.index, self.recipe, self.tensors = job, index, job.recipe, tensors
        self.kind = job.arch.kinds[index]
        self.x = {site: seen.rows(site) for site in (*self.kind.sites, "v")}
        self.inner = [seen.reads(mlp.down) for mlp in self.kind.mlp.gated]
        self.layer = replace(job.transforms.layers[index])
        self.layer.inputs = {site: list(stages) for site, stages in self.layer.inputs.items()}
        self.smooth()
        if self.layer.r2 is not None and (attention := self.kind.attends):
            self.layer.r2 = learn_r2(job, index, self.x["v"], tensors[f"{attention.output}.weight"])
            self.x["o"] = self.heads_rotated(self.x["o"], self.layer.r2, attention)
        if self.recipe.scales.order:
            self.layer.order = zigzag(self.x["down"].abs().amax(0), self.job.transforms.r4_block or 1, job.tp_max)
            self.x["down"] = self.x["down"][:, self.layer.order]
        for site in self.kind.sites:
            self.add_stages(site)

    def smooth(self) -> None:
        """The scales that the recipe asks for, into the layer, and what the sites see behind them."""
        scales, layer, x = self.recipe.scales, self.layer, self.x
        if scales.keys == "smooth" and (attention := self.kind.attends):
            layer.s_qk = key_scale(self.kind, attention, self.tensors, x["attn"])
        if scales.norms == "smooth":
            layer.s_attn, layer.s_mlp = 1 / self.scale("attn"), 1 / self.scale("mlp")
        for site in ("attn", "mlp"):
            if (factors := layer.norm_scale(site)) is not None:
                x[site] = x[site] * factors.float()
        if scales.values == "smooth" and (attention := self.kind.attends) and not attention.normed_values:
            layer.s_ov = 1 / self.values_scale(attention)
            per_head = per_query_head(layer.s_ov.view(attention.kv_heads, -1), attention).flatten()
            x["v"], x["o"] = x["v"] * layer.s_ov.float(), x["o"] * per_head.float()
        if scales.up == "smooth":
            pairs = zip(self.kind.mlp.gated, self.inner, strict=True)
            layer.s_ud = 1 / torch.cat([self.inner_scale(mlp, rows) for mlp, rows in pairs])
            if len(self.inner) == 1:
                x["down"] = x["down"] * layer.s_ud.float()

    def scale(self, site: str) -> Tensor:
        """λ float64 [K] of a site behind a norm."""
        one = {
            "attn": self.kind.attention.reads[:1],
            "mlp": tuple(mlp.up for mlp in self.kind.mlp.gated),
        }  # what OmniQuant's code looks at
        every = self.kind.sites[site]
        linears = every if self.recipe.scales.weights == "all" else one.get(site, every)
        return self.between(self.x[site], linears)

    def inner_scale(self, mlp: GatedMLP, x: Tensor) -> Tensor:
        """λ float64 [width] between up and down of a gated MLP; 1 of an expert that no token went to."""
        if not len(x):
            return torch.ones(mlp.width, dtype=torch.float64)
        return self.between(x, (mlp.down,), self.job.transforms.r4_block)

    def between(self, x: Tensor, linears: tuple[str, ...], block: int = 0) -> Tensor:
        """λ float64 [K] of linears that read x [n, K], in front of a block Hadamard where `block` is not 0."""
        alpha = self.recipe.scales.alpha
        read = (self.tensors[f"{linear}.weight"] for linear in linears)
        if alpha != "search":  # of experts one is in memory at a time
            largest = torch.stack([weight.abs().amax(0).cpu() for weight in read]).amax(0)
            return smooth_scale(x.abs().amax(0), largest, float(alpha))
        weight = torch.cat([one.cpu() for one in read])

        def rotate(rows: Tensor) -> Tensor:
            return reference.hadamard(rows, block) if block else rows

        weights = WeightFormat(self.recipe.weights.bits)  # a scale an output channel, whatever the groups
        return search_scale(x, weight, rotate, self.recipe.activations.rows, weights)[1]

    def values_scale(self, attention: Attention) -> Tensor:
        """λ float64 [kv_heads * d]: the query heads of a group share the channels of their KV head."""
        alpha = self.recipe.scales.alpha
        x, weight = (
            t.abs().amax(0).view(attention.kv_heads, -1, attention.head_dim).amax(1).flatten()
            for t in (self.x["o"], self.tensors[f"{attention.output}.weight"].cpu())
        )
        return smooth_scale(x, weight, VALUES_ALPHA if alpha == "search" else float(alpha))

    def heads_rotated(self, x: Tensor, r2: Tensor, attention: Attention) -> Tensor:
        rotation = per_query_head(r2, attention).float()
        return torch.einsum("nhd,hde->nhe", x.unflatten(1, (-1, rotation.shape[-1])), rotation).flatten(1)

    def add_stages(self, site: str) -> None:
        """The site's own online stages, behind a Hadamard where there is one; learning may move their tensors."""
        wanted = self.recipe.online.learned(site)
        if not wanted:
            return
        chain, x = self.layer.inputs.setdefault(site, []), self.x[site]
        for stage in chain:
            x = reference.online_stage(x, *stage)
        for word in wanted:
            random = generator(self.job.seed, f"{word}.{site}.{self.index}")
            rows, head_dim = self.recipe.activations.rows, self.kind.attention.channels_of_head
            for stage in STARTS[word](Seen(x, random, self.recipe.online, head_dim, self.job.tp_max, rows)):
                chain.append(stage)
                x = reference.online_stage(x, *stage)
