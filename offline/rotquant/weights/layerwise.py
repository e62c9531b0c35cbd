"""Quantizing one decoder layer: its linears in order of computation, each from the inputs it will be served.

The calibration chain holds the residual stream of every sample *as the quantized layers so far produce
it*, so the Hessians of GPTQ, and the chain handed to the next layer, are those of the served model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce

import torch
from torch import Tensor

from rotquant.checkpoint.packed import pack
from rotquant.checkpoint.stored import stored_stage
from rotquant.common.devices import Devices, Share
from rotquant.models.decoder import Decoder, kv4_cache
from rotquant.recipe import Recipe
from rotquant.transforms.space import Transforms
from rotquant.weights import gptq, key_feedback, low_rank, rtn
from rotquant.weights.served import ServedLayer
from rotquant_kernels import Stage, calls
from rotquant_kernels.formats import RowFormat, WeightFormat

TRIANGLE = 256  # rows of a Hessian that are summed at a time


class LayerQuantizer:
    """Quantizes decoder layers one at a time.

    Args:
        recipe, transforms: what to do; decoders: how each layer computes; dtype: of the checkpoint.
        devices: the calibration samples are spread over all; weights are rounded on the first.
    """

    def __init__(
        self, recipe: Recipe, transforms: Transforms, decoders: list[Decoder], dtype: torch.dtype, devices: Devices
    ) -> None:
        self.recipe, self.transforms, self.decoders = recipe, transforms, decoders
        self.dtype, self.devices, self.device = dtype, devices, devices.first
        self.errors: list[float] = []  # relative rounding error of each weight matrix
        self.key_feedback: Tensor | None = None  # of the layer's keys, [kv_heads, d, d]

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
        self.errors, self.key_feedback = [], None
        self.layer, decoder = self.transforms.layers[index], self.decoders[index]
        self.kind = decoder.kind
        held = {n: t for n, t in folded.items() if n.removesuffix(".weight") not in self.kind.linears}
        others = {n: self.kind.rounded(n, t, self.dtype) for n, t in held.items()}
        cache = self.recipe.kv.form(self.transforms.r3, self.layer.clips)
        self.served = [
            ServedLayer(
                decoder.on(place), tensors, self._stages(place), self._rows, kv4_cache(cache) if cache else None
            )
            for place, tensors in zip(self.devices.places, self.devices.copies(others), strict=True)
        ]
        there = [n for n in self.kind.linears if f"{n}.weight" in folded]
        weights = {n: folded[f"{n}.weight"].float().to(self.device) for n in there}
        folded.clear()
        if chain is None:
            assert not self.recipe.kv.key_feedback, "keys with error feedback need a chain"
            self._without_inputs(weights)
        else:
            chain = self._calibrate(weights, chain)
        for name, packed in self.served[0].done.items():
            others |= packed.tensors(name, self.dtype)
        if self.key_feedback is not None and self.kind.attends:
            others[f"{self.kind.holder(self.kind.attends.key)}.key_feedback"] = self.key_feedback.flatten(0, 1)
        return others, chain

    def _without_inputs(self, weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            self._quantize(name, weights.pop(name), None, self._rounding(None, self._weights(name)))

    def passed(self, chain: Tensor) -> Tensor:
        """Other windows [n, T, hidden], on the CPU, behind the layer that was quantized last, as it is served."""
        return self.devices.map(lambda on, _, h: self.served[on].layer(h), chain, out=torch.empty_like(chain))

    def _stages(self, place: torch.device) -> dict[str, list[Stage]]:
        """The online stages of each site as they will be served: tensors as the checkpoint stores them."""

        def placed(stage: Stage) -> Stage:
            return stage._replace(tensor=None if stage.tensor is None else stored_stage(stage).to(place))

        return {site: [placed(stage) for stage in found] for site, found in self.layer.inputs.items()}

    def _calibrate(self, weights: dict[str, Tensor], chain: Tensor) -> Tensor:
        """The five steps of `decoder`: Hessians from each step's inputs, then its linears, then the next.

        Each step is computed once a sample. The chain is changed in place; beside it lie what o and then down read.
        """
        served, attention = self.served, self.kind.attention
        self.importance = self._importance(weights, chain)
        self._step(weights, "attn", chain, attention.norm)
        served = self._feed_back(chain)
        mixed = torch.empty(*chain.shape[:2], weights[attention.output].shape[1], dtype=chain.dtype)
        self.devices.map(lambda on, _, h: served[on].attention(h), chain, out=mixed)
        self._step(weights, "o", mixed)
        self._write(chain, mixed, attention.output)
        del mixed
        return self._mlp(weights, chain)

    def _feed_back(self, chain: Tensor) -> list[ServedLayer]:
        """The served layers with F of their keys, where these are rounded with error feedback: from the queries as the
        quantized linears make them."""
        attention, form = self.kind.attends, self.recipe.kv.form(self.transforms.r3, self.layer.clips)
        if attention is None or form is None or not form.feedback:
            return self.served

        def sums(on: int, share: Share) -> Tensor:
            served = self.served[on]
            parts = (served.normed(attention.norm, h) for _, (h,) in share)
            given = served.decoder, attention, served.tensors
            return reduce(torch.add, (key_feedback.moments(*given, x, served.linear) for x in parts))

        total = self._total(self.devices.each(sums, chain))
        queries = key_feedback.turned(total, self.served[0].decoder, attention)
        self.key_feedback = key_feedback.factor(queries, form.rotate)
        self.served = [
            replace(served, cache=kv4_cache(form, key_feedback=self.key_feedback.to(place)))
            for served, place in zip(self.served, self.devices.places, strict=True)
        ]
        return self.served

    def _mlp(self, weights: dict[str, Tensor], chain: Tensor) -> Tensor:
        """The last two of these steps, of a gated MLP; the chain is that behind attention."""
        served, (mlp,) = self.served, self.kind.mlp.gated
        self._step(weights, "mlp", chain, mlp.norm)
        inner = torch.empty(*chain.shape[:2], weights[mlp.down].shape[1], dtype=chain.dtype)
        self.devices.map(lambda on, _, h: served[on].mlp_input(h), chain, out=inner)
        self._step(weights, "down", inner)
        self._write(chain, inner, mlp.down)
        return chain

    def _write(self, chain: Tensor, inputs: Tensor, linear: str) -> None:
        """Adds what a linear makes of its inputs to the residual stream."""
        self.devices.map(lambda on, _, h, x: self.served[on].write(linear, h, x), chain, inputs, out=chain)

    def _importance(self, weights: dict[str, Tensor], chain: Tensor) -> Tensor | None:
        """Weight of each token's error, float32 [samples, T], mean 1; None where all count the same.

        (1 - a) + a * attention received: what is wrong with a sink's keys and values is added to every token's output.
        """
        share = self.recipe.weights.attention_weight
        if not share:
            return None
        known = self.served[0].tensors | {f"{name}.weight": weights[name] for name in self.kind.sites["attn"]}
        copies = self.devices.copies({name: tensor.float() for name, tensor in known.items()})

        def received(on: int, _: int, h: Tensor) -> Tensor:
            served, tensors = self.served[on], copies[on]
            x = served.normed(self.kind.attention.norm, h).float()
            exact = served.decoder.float_linear(tensors, served.stages)
            return (1 - share) + share * served.decoder.attention_received(tensors, x, exact)

        return self.devices.map(received, chain, out=torch.empty(chain.shape[:2]))

    def _step(self, weights: dict[str, Tensor], site: str, store: Tensor, norm: str = "") -> None:
        """Quantizes the linears of a site, which read the store [samples, T, channels], behind a norm if named."""
        if not self.recipe.weights.needs_inputs:
            self._without_inputs({name: weights.pop(name) for name in self.kind.sites[site]})
            return
        if self.recipe.weights.subtracts and site in self.kind.branch_sites:
            self._find_directions(site, store, norm)
        self._round(weights, self.kind.sites[site], *self._moments(site, store, norm))

    def _find_directions(self, site: str, store: Tensor, norm: str) -> None:
        """Those that the low-rank branch takes off the inputs; no rank of o or down holds all of a direction."""

        def moment(on: int, share: Share) -> Tensor:
            total: Tensor | None = None
            for _, (x,) in share:
                total = products(x := self.served[on].inputs(site, x, norm), x, total)
            assert total is not None
            return total

        total = self._total(self.devices.each(moment, store))
        shards = self.transforms.tp_max if site in ("o", "down") else 1
        found = low_rank.directions(
            total.triu() + total.triu(1).mT, self.recipe.weights.rank, shards, torch.Generator().manual_seed(0)
        )
        for served, place in zip(self.served, self.devices.places, strict=True):
            served.directions[site] = found.to(place, self.dtype)

    def _round(self, weights: dict[str, Tensor], names: tuple[str, ...], hessian: Tensor, drift: Tensor | None) -> None:
        """Quantizes linears that read inputs of these moments."""
        refit = drift is not None and partial(
            gptq.refit, drift=drift, lower=gptq.factor(hessian, self.recipe.weights.damping)
        )
        rounded = self._rounding(hessian, self._weights(names[0]))
        for name in names:
            weight, beside = weights.pop(name), None
            if self.kind.site_of[name] in self.served[0].directions:
                beside, weight = self._beside(name, weight)
            if refit:
                weight = refit(weight)
            self._quantize(name, weight, hessian, rounded, beside)

    def _rounding(self, hessian: Tensor | None, form: WeightFormat) -> Callable[[Tensor, Tensor], Tensor]:
        """Weight and scale -> codes, for the linears of one site."""
        options = self.recipe.weights
        if hessian is None or options.method == "rtn":
            return form.quantize
        prepared = gptq.columns(hessian, options.damping, options.act_order)
        return partial(gptq.quantize, prepared=prepared, form=form)

    def _moments(self, site: str, store: Tensor, norm: str) -> tuple[Tensor, Tensor | None]:
        """Means of w x̂ᵀ x̂ and w (x - x̂)ᵀ x̂ over all tokens; x the transformed inputs of a site, x̂ the same quantized.

        Returns:
            float32 [K, K] each; the second for `gptq.refit`, None where the recipe has none.
        """
        stores = (store,) if self.importance is None else (store, self.importance)
        sums = self.devices.each(lambda on, share: self._sums(self.served[on], site, norm, share), *stores)
        tokens = store.shape[0] * store.shape[1]
        drifts = [part for _, part in sums if part is not None]
        return self._means(self._total([part for part, _ in sums]), self._total(drifts) if drifts else None, tokens)

    def _means(self, hessian: Tensor, drift: Tensor | None, tokens: int) -> tuple[Tensor, Tensor | None]:
        """The means of `_moments` from the sums of `_sums`."""
        return (hessian.triu() + hessian.triu(1).mT).div_(tokens), None if drift is None else drift.div_(tokens)

    def _total(self, parts: list[Tensor]) -> Tensor:
        """The sum of the devices' sums, on the first."""
        return reduce(Tensor.add_, (part.to(self.device) for part in parts))

    def _sums(self, served: ServedLayer, site: str, norm: str, share: Share) -> tuple[Tensor, Tensor | None]:
        """The sums of `_moments` over a device's samples; of the first, symmetric one what is above the diagonal."""
        hessian: Tensor | None = None
        drift: Tensor | None = None
        form = served.rows(site)
        for _, (x, *importance) in share:
            exact = served.inputs(site, x, norm)
            q, scale, zero = calls.quantize(exact, form)
            seen = form.dequantize(q, scale, zero.float())
            weighted = seen * importance[0][:, None] if importance else seen
            hessian = products(weighted, seen, hessian)
            if self.recipe.weights.refit:
                drift = torch.zeros_like(hessian) if drift is None else drift
                drift.addmm_((exact - seen).T, weighted)
        assert hessian is not None
        return hessian, drift

    def _rows(self, site: str) -> RowFormat:
        """What the rows of a site are rounded to."""
        return self.layer.rows(site, self.recipe.activations.rows)

    def _weights(self, name: str) -> WeightFormat:
        """How a linear's weights are stored."""
        return self.layer.weights(self.kind.site_of[name], self.recipe.weights)

    def _quantize(
        self, name: str, weight: Tensor, hessian: Tensor | None, rounded: Callable[[Tensor, Tensor], Tensor],
        beside: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Rounds a weight; `beside` are D and U of a branch that is there already."""
        options, form = self.recipe.weights, self._weights(name)
        down, up = beside or (None, None)
        if options.rank and not options.subtracts:
            down, up, weight = self._branch(weight, hessian, form)
        learned = self.layer.weight_clips.get(name) if form == options.form else None  # learned at those bits
        scale = rtn.weight_scale(weight, form, self.dtype, clip_search=options.clip_search, clip=learned)
        codes = rounded(weight, scale)
        self.errors.append(((form.dequantize(codes, scale) - weight).norm() / weight.norm()).item())
        packed = pack(codes, scale, form, down, up)
        for served, place in zip(self.served, self.devices.places, strict=True):
            served.done[name] = packed.on(place)

    def _beside(self, name: str, weight: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """D and U, in the checkpoint's dtype, of the branch of the inputs, and the weight for what they leave."""
        down = self.served[0].directions[self.kind.site_of[name]].clone()  # files hold no tensor twice
        up, rest = low_rank.beside(weight, down)
        return (down, up.to(self.dtype)), rest

    def _branch(self, weight: Tensor, hessian: Tensor | None, form: WeightFormat) -> tuple[Tensor, Tensor, Tensor]:
        """D, U in the checkpoint's dtype and what is left of the weight."""
        options = self.recipe.weights

        def rounded(rest: Tensor) -> Tensor:
            scale = rtn.weight_scale(rest, form, self.dtype)
            return form.dequantize(form.quantize(rest, scale), scale)

        split = low_rank.low_rank(
            weight, options.rank, rounded, torch.Generator().manual_seed(0), hessian,
            row_maxima=options.branch == "tsvd", dtype=self.dtype,
        )  # fmt: skip
        return split.down.to(self.dtype), split.up.to(self.dtype), split.residual


def products(x: Tensor, y: Tensor, total: Tensor | None) -> Tensor:
    """total + xᵀ y, symmetric float32 [K, K] of rows [n, K], as far as it lies above the diagonal; None is 0."""
    total = x.new_zeros(x.shape[1], x.shape[1]) if total is None else total
    for start in range(0, len(total), TRIANGLE):
        rows = slice(start, start + TRIANGLE)
        total[rows, start:].addmm_(x[:, rows].T, y[:, start:])
    return total
