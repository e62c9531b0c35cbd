"""Quantizing one decoder layer: its linears in order of computation, each from the inputs it will be served.

The calibration chain holds the residual stream of every sample *as the quantized layers so far produce
it*, so the Hessians of GPTQ, and the chain handed to the next layer, are those of the served model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from rotquant.checkpoint.packed import PackedLinear, pack
from rotquant.checkpoint.stored import stored_stage
from rotquant.models.decoder import Cache, Decoder, bias_of, kv4_cache
from rotquant.recipe import Recipe
from rotquant.transforms.space import Transforms
from rotquant.weights import gptq, low_rank, rtn
from rotquant_kernels import Stage, calls, linear, transform
from rotquant_kernels.formats import RowFormat

TRIANGLE = 256  # rows of a Hessian that are summed at a time


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
            the layer's tensors by the names of its kind (`packed.joined` stores them), and the chain after the layer.
        """
        self.errors = []
        self.layer, self.decoder = self.transforms.layers[index], self.decoders[index]
        self.kind = self.decoder.kind
        others = {n: t.to(self.dtype) for n, t in folded.items() if n.removesuffix(".weight") not in self.kind.linears}
        self.tensors = {n: t.to(self.device) for n, t in others.items()}
        self.stages = {site: [self._placed(stage) for stage in found] for site, found in self.layer.inputs.items()}
        self.done: dict[str, PackedLinear] = {}
        weights = {n: folded[f"{n}.weight"].float().to(self.device) for n in self.kind.linears}
        folded.clear()
        if chain is None:
            for name in self.kind.linears:
                self._quantize(name, weights.pop(name), None, self._rounding(None))
        else:
            chain = self._calibrate(weights, chain)
        for name, packed in self.done.items():
            others |= packed.tensors(name, self.dtype)
        return others, chain

    def _placed(self, stage: Stage) -> Stage:
        """The stage as it will be served: its tensor as the checkpoint stores it."""
        return stage._replace(tensor=None if stage.tensor is None else stored_stage(stage).to(self.device))

    def _cache(self) -> Cache | None:
        found = self.recipe.kv.form(self.transforms.r3, self.layer.clips)
        return kv4_cache(found) if found else None

    def _calibrate(self, weights: dict[str, Tensor], chain: Tensor) -> Tensor:
        """The five steps of `decoder`: Hessians from each step's inputs, then its linears, then the next.

        Each step is computed once a sample. The chain is changed in place; beside it lie what o and then down read.
        """
        norm, attention, mlp = self.decoder.norm, self.kind.attention, self.kind.mlp
        gain1, gain2 = (self.tensors[f"{block.norm}.weight"] for block in (attention, mlp))
        self.importance = self._importance(weights, chain)
        self._step(weights, "attn", (norm(h, gain1) for h in self._samples(chain)))
        mixed = torch.empty(*chain.shape[:2], weights[attention.output].shape[1], dtype=chain.dtype)
        cache = self._cache()
        for i, h in enumerate(self._samples(chain)):
            mixed[i] = self.decoder.attention(self.tensors, norm(h, gain1), self.linear, cache).cpu()
        self._step(weights, "o", self._samples(mixed))
        self._write(chain, mixed, attention.output)
        del mixed
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

    def _step(self, weights: dict[str, Tensor], site: str, inputs: Iterator[Tensor]) -> None:
        """Quantizes the linears of a site, which share these inputs."""
        if not self.recipe.weights.needs_inputs:
            for name in self.kind.sites[site]:
                self._quantize(name, weights.pop(name), None, self._rounding(None))
            return
        hessian, drift = self._moments(site, inputs)
        refit = drift is not None and partial(
            gptq.refit, drift=drift, lower=gptq.factor(hessian, self.recipe.weights.damping)
        )
        rounded = self._rounding(hessian)
        for name in self.kind.sites[site]:
            weight = weights.pop(name)
            if refit:
                weight = refit(weight)
            self._quantize(name, weight, hessian, rounded)

    def _rounding(self, hessian: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """Weight and scale -> codes, for the linears of one site."""
        options = self.recipe.weights
        if hessian is None or options.method == "rtn":
            return options.form.quantize
        prepared = gptq.columns(hessian, options.damping, options.act_order)
        return partial(gptq.quantize, prepared=prepared, form=options.form)

    def _moments(self, site: str, inputs: Iterator[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Means of w x̂ᵀ x̂ and w (x - x̂)ᵀ x̂ over all tokens; x the transformed inputs of a site, x̂ the same quantized.

        Returns:
            float32 [K, K] each; the second for `gptq.refit`, None where the recipe has none.
        """
        hessian: Tensor | None = None
        drift: Tensor | None = None
        count, form = 0, self._rows(site)
        for i, x in enumerate(inputs):
            exact = transform(x, self.stages.get(site, [])).float()
            q, scale, zero = calls.quantize(exact, form)
            seen = form.dequantize(q, scale, zero.float())
            weighted = seen if self.importance is None else seen * self.importance[i][:, None]
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

    def _rows(self, site: str) -> RowFormat:
        """What the rows of a site are rounded to."""
        return self.recipe.activations.rows.clipped(self.layer.clips.get(site))

    def _quantize(
        self, name: str, weight: Tensor, hessian: Tensor | None, rounded: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        options, form, down, up = self.recipe.weights, self.recipe.weights.form, None, None
        if options.rank:
            down, up, weight = self._branch(weight, hessian)
        learned = self.layer.weight_clips.get(name)
        scale = rtn.weight_scale(weight, form, self.dtype, clip_search=options.clip_search, clip=learned)
        codes = rounded(weight, scale)
        self.errors.append(((form.dequantize(codes, scale) - weight).norm() / weight.norm()).item())
        self.done[name] = pack(codes, scale, form, down, up)

    def _branch(self, weight: Tensor, hessian: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """D, U in the checkpoint's dtype and what is left of the weight."""
        options, form = self.recipe.weights, self.recipe.weights.form

        def rounded(rest: Tensor) -> Tensor:
            scale = rtn.weight_scale(rest, form, self.dtype)
            return form.dequantize(form.quantize(rest, scale), scale)

        split = low_rank.low_rank(
            weight, options.rank, rounded, torch.Generator().manual_seed(0), hessian,
            row_maxima=options.branch == "tsvd", dtype=self.dtype,
        )  # fmt: skip
        return split.down.to(self.dtype), split.up.to(self.dtype), split.residual

    def linear(self, name: str, x: Tensor) -> Tensor:
        """The served linear: the same op on the same packed weights."""
        packed, site = self.done[name], self.kind.site_of[name]
        return linear(
            x, packed.prepared, packed.scale, bias_of(self.tensors, name), packed.form, self.stages.get(site, []),
            self._rows(site), packed.down, packed.up,
        )  # fmt: skip
