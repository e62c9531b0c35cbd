"""Quantizing one decoder layer: its linears in order of computation, each from the inputs it will be served.

The calibration chain holds the residual stream of every sample *as the quantized layers so far produce
it*, so the Hessians of GPTQ, and the chain handed to the next layer, are those of the served model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from rotquant.checkpoint.format import KVFormat
from rotquant.models import Tensors
from rotquant.models.decoder import Cache, Decoder, bias_of, kv4_cache
from rotquant.recipe import Recipe
from rotquant.transforms.space import LayerTransforms, Transforms
from rotquant.weights import gptq, low_rank, rtn
from rotquant_kernels import Stage, convention, linear, prepare_weight, quantize_rows, transform

TRIANGLE = 256  # rows of a Hessian that are summed at a time


@dataclass(frozen=True)
class PackedLinear:
    """A quantized linear as the checkpoint stores it: packed codes int32, scale, shape; low-rank factors D, U."""

    packed: Tensor
    scale: Tensor
    shape: tuple[int, int]
    bits: int
    down: Tensor | None = None  # [K, r], in the checkpoint's dtype
    up: Tensor | None = None  # [r, N]

    @cached_property
    def prepared(self) -> Tensor:
        """The weights as they run; made when they first do, which lm_head, for one, never does."""
        return prepare_weight(self.packed, self.bits, self.shape[1], self.scale.shape[1])

    def tensors(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        stored = {
            f"{name}.weight_packed": self.packed.cpu(),
            f"{name}.weight_scale": self.scale.to(dtype).cpu(),
            f"{name}.weight_shape": torch.tensor(self.shape),
        }
        if self.down is not None and self.up is not None:
            stored |= {f"{name}.low_rank_down": self.down.cpu(), f"{name}.low_rank_up": self.up.cpu()}
        return stored

    @classmethod
    def stacked(cls, parts: list[PackedLinear]) -> PackedLinear:
        """Linears of one input as one, their outputs one below the other; of low rank [D_1 ...], diag(U_1, ...)."""
        first, rows = parts[0], sum(part.shape[0] for part in parts)
        downs = [part.down for part in parts if part.down is not None]
        ups = [part.up for part in parts if part.up is not None]
        return cls(
            torch.cat([part.packed for part in parts]), torch.cat([part.scale for part in parts]),
            (rows, first.shape[1]), first.bits,
            torch.cat(downs, dim=1) if downs else None, torch.block_diag(*ups) if ups else None,
        )  # fmt: skip


def pack(codes: Tensor, scale: Tensor, bits: int, down: Tensor | None = None, up: Tensor | None = None) -> PackedLinear:
    packed = convention.pack_int32(codes, bits)
    return PackedLinear(packed, scale, (codes.shape[0], codes.shape[1]), bits, down, up)


class LayerQuantizer:
    """Quantizes decoder layers one at a time.

    Args:
        recipe, transforms: what to do; decoders: how each layer computes; dtype: of the checkpoint.
    """

    def __init__(
        self, recipe: Recipe, transforms: Transforms, decoders: list[Decoder], dtype: torch.dtype, device: str
    ) -> None:
        self.recipe, self.transforms, self.decoders = recipe, transforms, decoders
        self.dtype, self.device = dtype, device
        self.errors: list[float] = []  # relative rounding error of each weight matrix

    def __call__(
        self, index: int, folded: dict[str, Tensor], chain: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Quantizes a layer and moves the chain through it.

        Args:
            folded: float64 tensors of layer `index`; chain: [samples, T, hidden], moved in place, or None without
                calibration.
        Returns:
            the tensors to store, and the chain after the layer.
        """
        self.errors = []
        self.layer, self.decoder = self.transforms.layers[index], self.decoders[index]
        self.kind = self.decoder.kind
        others = {n: t.to(self.dtype) for n, t in folded.items() if n.removesuffix(".weight") not in self.kind.linears}
        self.tensors = {n: t.to(self.device) for n, t in others.items()}
        self.stages = {site: [self._placed(stage) for stage in found] for site, found in self.layer.inputs.items()}
        self.done: dict[str, PackedLinear] = {}
        there = [n for n in self.kind.linears if f"{n}.weight" in folded]
        weights = {n: folded[f"{n}.weight"].float().to(self.device) for n in there}
        folded.clear()
        if chain is None:
            self._without_inputs(weights)
        else:
            chain = self._calibrate(weights, chain)
        return self._stored(others), chain

    def _without_inputs(self, weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            self._quantize(name, weights.pop(name), None, self._rounding(None))

    def _stored(self, others: Tensors) -> Tensors:
        """The layer's tensors as the checkpoint names them: those of fused linears one below the other."""
        stored = self.kind.join(others)
        for name, parts in self.kind.stored.items():
            stored |= PackedLinear.stacked([self.done[part] for part in parts]).tensors(name, self.dtype)
        return stored

    def _placed(self, stage: Stage) -> Stage:
        """The stage as it will be served: its tensor as the checkpoint stores it."""
        return stage._replace(tensor=None if stage.tensor is None else stored_stage(stage).to(self.device))

    def _cache(self) -> Cache | None:
        found = kv_format(self.recipe, self.transforms, self.layer)
        return kv4_cache(found) if found else None

    def _calibrate(self, weights: dict[str, Tensor], chain: Tensor) -> Tensor:
        """The five steps of `decoder`: Hessians from each step's inputs, then its linears, then the next.

        Each step is computed once a sample. The chain is changed in place; beside it lie what o and then down read.
        """
        norm, attention = self.decoder.norm, self.kind.attention
        gain1 = self.tensors[f"{attention.norm}.weight"]
        self.importance = self._importance(weights, chain)
        self._step(weights, "attn", (norm(h, gain1) for h in self._samples(chain)))
        mixed = torch.empty(*chain.shape[:2], weights[attention.output].shape[1], dtype=chain.dtype)
        cache = self._cache()
        for i, h in enumerate(self._samples(chain)):
            mixed[i] = self.decoder.attention(self.tensors, norm(h, gain1), self.linear, cache).cpu()
        self._step(weights, "o", self._samples(mixed))
        self._write(chain, mixed, attention.output)
        del mixed
        return self._mlp(weights, chain)

    def _mlp(self, weights: dict[str, Tensor], chain: Tensor) -> Tensor:
        """The last two of these steps, of a gated MLP; the chain is that behind attention."""
        norm, (mlp,) = self.decoder.norm, self.kind.mlp.gated
        gain2 = self.tensors[f"{mlp.norm}.weight"]
        self._step(weights, "mlp", (norm(h, gain2) for h in self._samples(chain)))
        inner = torch.empty(*chain.shape[:2], weights[mlp.down].shape[1], dtype=chain.dtype)
        for i, h in enumerate(self._samples(chain)):
            inner[i] = self.decoder.mlp_input(norm(h, gain2), self.linear).cpu()
        self._step(weights, "down", self._samples(inner))
        self._write(chain, inner, mlp.down)
        return chain

    def _write(self, chain: Tensor, inputs: Tensor, linear: str) -> None:
        """Adds what a linear makes of its inputs to the residual stream."""
        for i, (h, x) in enumerate(zip(self._samples(chain), self._samples(inputs), strict=True)):
            chain[i] = self.decoder.add(h, self.linear(linear, x)).cpu()

    def _importance(self, weights: dict[str, Tensor], chain: Tensor) -> list[Tensor] | None:
        """Weight of each token's error, float32 [T] for each sample, mean 1; None where all count the same.

        (1 - a) + a * attention received: what is wrong with a sink's keys and values is added to every token's output.
        """
        share = self.recipe.weights.attention_weight
        if not share:
            return None
        known = self.tensors | {f"{name}.weight": weights[name] for name in self.kind.sites["attn"]}
        tensors = {name: tensor.float() for name, tensor in known.items()}
        exact = self.decoder.float_linear(tensors, self.layer)
        gain = self.tensors[f"{self.kind.attention.norm}.weight"]
        inputs = (self.decoder.norm(h, gain).float() for h in self._samples(chain))
        return [(1 - share) + share * self.decoder.attention_received(tensors, x, exact) for x in inputs]

    def _samples(self, chain: Tensor) -> Iterator[Tensor]:
        return (sample.to(self.device) for sample in chain)

    def _step(
        self, weights: dict[str, Tensor], site: str, inputs: Iterator[Tensor], names: tuple[str, ...] = (),
        importance: list[Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Quantizes linears of a site that share these inputs: all, or those named, with weights of their own."""
        names, importance = (names, importance) if names else (self.kind.sites[site], self.importance)
        if not self.recipe.weights.needs_inputs:
            for name in names:
                self._quantize(name, weights.pop(name), None, self._rounding(None))
            return
        hessian, drift = self._moments(site, inputs, importance)
        refit = drift is not None and partial(
            gptq.refit, drift=drift, lower=gptq.factor(hessian, self.recipe.weights.damping)
        )
        rounded = self._rounding(hessian)
        for name in names:
            weight = weights.pop(name)
            if refit:
                weight = refit(weight)
            self._quantize(name, weight, hessian, rounded)

    def _rounding(self, hessian: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """Weight and scale -> codes, for the linears of one site."""
        options = self.recipe.weights
        if hessian is None or options.method == "rtn":
            return partial(rtn.quantize, bits=options.bits)
        prepared = gptq.columns(hessian, options.damping, options.act_order)
        return partial(gptq.quantize, prepared=prepared, bits=options.bits)

    def _moments(
        self, site: str, inputs: Iterator[Tensor], importance: list[Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Means of w x̂ᵀ x̂ and w (x - x̂)ᵀ x̂ over all tokens; x the transformed inputs of a site, x̂ the same quantized.

        Returns:
            float32 [K, K] each; the second for `gptq.refit`, None where the recipe has none.
        """
        hessian: Tensor | None = None
        drift: Tensor | None = None
        count = 0
        for i, x in enumerate(inputs):
            exact = transform(x, self.stages.get(site, [])).float()
            q, scale, zero = quantize_rows(exact, "none", 0, None, *self._activations(site))
            seen = convention.dequantize(q, scale, zero.float())
            weighted = seen if importance is None else seen * importance[i][:, None]
            if hessian is None:
                hessian = exact.new_zeros(exact.shape[1], exact.shape[1])
                drift = torch.zeros_like(hessian) if self.recipe.weights.refit else None
            for start in range(0, len(hessian), TRIANGLE):  # it is symmetric: what is above the diagonal
                rows = slice(start, start + TRIANGLE)
                hessian[rows, start:].addmm_(weighted[:, rows].T, seen[:, start:])
            if drift is not None:
                drift.addmm_((exact - seen).T, weighted)
            count += len(x)
        assert hessian is not None
        hessian = hessian.triu() + hessian.triu(1).mT
        return hessian.div_(count), None if drift is None else drift.div_(count)

    def _activations(self, site: str) -> tuple[int, bool, float]:
        act = self.recipe.activations
        return act.bits, act.symmetric, self.layer.clips.get(site, act.clip)

    def _quantize(
        self, name: str, weight: Tensor, hessian: Tensor | None, rounded: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        options, down, up = self.recipe.weights, None, None
        if options.rank:
            down, up, weight = self._branch(weight, hessian)
        learned = self.layer.weight_clips.get(name)
        scale = rtn.weight_scale(weight, options.bits, options.group_size, options.clip_search, self.dtype, learned)
        codes = rounded(weight, scale)
        self.errors.append(((rtn.dequantize(codes, scale) - weight).norm() / weight.norm()).item())
        self.done[name] = pack(codes, scale, options.bits, down, up)

    def _branch(self, weight: Tensor, hessian: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """D, U in the checkpoint's dtype and what is left of the weight."""
        options = self.recipe.weights

        def rounded(rest: Tensor) -> Tensor:
            scale = rtn.weight_scale(rest, options.bits, options.group_size, False, self.dtype)
            return rtn.dequantize(rtn.quantize(rest, scale, options.bits), scale)

        split = low_rank.low_rank(
            weight, options.rank, rounded, torch.Generator().manual_seed(0), hessian,
            row_maxima=options.branch == "tsvd", dtype=self.dtype,
        )  # fmt: skip
        return split.down.to(self.dtype), split.up.to(self.dtype), split.residual

    def linear(self, name: str, x: Tensor) -> Tensor:
        """The served linear: the same op on the same packed weights."""
        if name not in self.kind.site_of:  # a router
            return torch.nn.functional.linear(x, self.tensors[f"{name}.weight"])
        packed, site = self.done[name], self.kind.site_of[name]
        return linear(
            x, packed.prepared, packed.scale, bias_of(self.tensors, name), packed.bits, self.stages.get(site, []),
            *self._activations(site), packed.down, packed.up,
        )  # fmt: skip


def stored_stage(stage: Stage) -> Tensor:
    """A stage's tensor as the checkpoint stores it: indices int32, a transform in full float32 precision."""
    assert stage.tensor is not None
    return stage.tensor.to(torch.int32 if stage.kind == "permutation" else torch.float32).contiguous()


def kv_format(recipe: Recipe, transforms: Transforms, layer: LayerTransforms) -> KVFormat | None:
    """The 4-bit cache of one layer, None where the cache is not quantized."""
    kv = recipe.kv
    if kv.bits == 16:
        return None
    clips = (layer.clips.get("key", kv.key_clip), layer.clips.get("value", kv.value_clip))
    return KVFormat(kv.symmetric, *clips, transforms.r3)
