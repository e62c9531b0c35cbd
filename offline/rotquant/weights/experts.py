"""Quantizing the experts of a layer one after the other: each in full precision while it is its turn, and no longer.

Every expert has a Hessian of its own, from the tokens that the router of the model as quantized so far sends to it. The
block's output is Σ_e w_e y_e, so that a token's squared error counts w_e². Where fewer tokens reach an expert than it
has inputs, they leave its Hessian singular: other tokens, spread evenly over the text, make up the number, as if the
router had sent them there too ("pooled").

The first window passes in full precision beside the quantized chain, through the weights before they are rounded. It
tells how many of the router's choices quantization leaves as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from rotquant.checkpoint.spool import Spool
from rotquant.models import Tensors
from rotquant.models.expert_tensors import ExpertTensors
from rotquant.models.mixture import Routing, agreement, inner, route, shared_output
from rotquant.models.mlp import Experts, GatedMLP
from rotquant.weights.layerwise import LayerQuantizer

ROWS = 2048  # tokens of an expert computed at a time


@dataclass
class Report:
    """What is worth knowing about the experts of one layer; lists have an entry for each expert."""

    tokens: list[int] = field(default_factory=list)  # of the calibration text; empty without calibration
    pooled: list[int] = field(default_factory=list)  # experts whose Hessian other tokens make up for
    errors: list[float] = field(default_factory=list)  # mean relative rounding error of its weights
    agreement: float | None = None  # share of the full-precision router's choices that the quantized model makes too

    def facts(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "pooled": self.pooled, "errors": self.errors, "agreement": self.agreement}

    def note(self) -> str:
        """For the progress line."""
        parts = [f"routing {self.agreement:.1%} as before"] if self.agreement is not None else []
        parts += [f"{len(self.pooled)} of {len(self.errors)} experts have few tokens"] if self.pooled else []
        return "".join(f", {part}" for part in parts)


class ExpertsQuantizer(LayerQuantizer):
    """`LayerQuantizer` of models of which layers may have experts.

    After a call `report` is that of the layer, None where it has no experts. `exact` is the first window in full
    precision [1, T, hidden], to be set before the first layer where its routing shall be compared, and moved on here.
    With a `spool` each expert goes there as soon as its outputs are known, and is not among the layer's tensors.
    """

    report: Report | None = None
    exact: Tensor | None = None
    spool: Spool | None = None

    def __call__(self, index: int, folded: Tensors, chain: Tensor | None) -> tuple[Tensors, Tensor | None]:
        self.folded, self.report = folded, Report() if isinstance(folded, ExpertTensors) else None
        return super().__call__(index, folded, chain)

    def _without_inputs(self, weights: Tensors) -> None:
        super()._without_inputs(weights)
        if isinstance(self.kind.mlp, Experts):
            for index, mlp in enumerate(self.kind.mlp.routed):
                super()._without_inputs(self._expert(index, mlp))
                self._note_error()
                self._leave(mlp)

    def _calibrate(self, weights: Tensors, chain: Tensor) -> Tensor:
        if self.exact is not None:
            self.exact = self._exact(weights, self.exact)
        return super()._calibrate(weights, chain)

    def _exact(self, weights: Tensors, h: Tensor) -> Tensor:
        """The full-precision window after the layer; of a mixture what its experts add is still to come."""
        served = self.served[0]
        tensors = {n: t.float() for n, t in served.tensors.items()} | {f"{n}.weight": w for n, w in weights.items()}
        linear, decoder, h = served.decoder.float_linear(tensors, served.stages), served.decoder, h.to(self.device)
        if not isinstance(self.kind.mlp, Experts):
            return decoder.layer(tensors, h, linear).cpu()
        h = decoder.behind_attention(tensors, h, linear)
        x3 = decoder.norm(h, tensors[f"{self.kind.mlp.norm}.weight"]).flatten(0, 1)
        self.exact_x3, self.exact_routing = x3, route(self.kind.mlp, linear(self.kind.mlp.router, x3))
        shared = shared_output(self.kind.mlp, x3, linear)
        return (h if shared is None else decoder.add(h, shared.view(h.shape))).cpu()

    # ---- one layer's experts ------------------------------------------------------------------------------------

    def _mlp(self, weights: Tensors, chain: Tensor) -> Tensor:
        block, served = self.kind.mlp, self.served[0]
        if not isinstance(block, Experts):
            return super()._mlp(weights, chain)
        assert self.report is not None
        self.hidden = chain.flatten(0, 1)
        self.token_weights = None if self.importance is None else self.importance.flatten()
        routing = self._routing(block)
        if self.exact is not None:
            self.report.agreement = agreement(self.exact_routing.chosen.cpu(), routing.chosen[: chain.shape[1]])
        out = self._shared(block, weights)
        total = None if self.exact is None else torch.zeros_like(self.exact_x3)
        for index, mlp in enumerate(block.routed):
            tokens, share = routing.of(index)
            own = self._expert(index, mlp)
            if total is not None:
                self._add_exact(own, index, mlp, total)
            x4 = self._quantize_expert(index, mlp, own, tokens, share)[: len(tokens)]
            parts = zip(tokens.split(ROWS), share.split(ROWS), x4.split(ROWS), strict=True)
            for some, weight, rows in parts if len(tokens) else ():
                y = served.linear(mlp.down, rows.to(self.device)).float().cpu()
                out.index_add_(0, some, y * weight[:, None])
            self._leave(mlp)
        if self.exact is not None and total is not None:
            self.exact = served.decoder.add(self.exact, total.cpu().view(self.exact.shape))
            del self.exact_x3, self.exact_routing
        for rows, written in zip(self.hidden.split(ROWS), out.split(ROWS), strict=True):
            rows.copy_(served.decoder.add(rows, written.to(rows.dtype)))
        del self.hidden
        return chain

    def _expert(self, index: int, mlp: GatedMLP) -> Tensors:
        """An expert's weights by linear, float32."""
        assert isinstance(self.folded, ExpertTensors)
        own = self.folded.expert(index)
        return {name: own[f"{name}.weight"].float().to(self.device) for name in (mlp.gate, mlp.up, mlp.down)}

    def _routing(self, block: Experts) -> Routing:
        """Of all tokens of the calibration text; on the CPU."""
        every = torch.arange(len(self.hidden))
        parts = [route(block, self.served[0].linear(block.router, rows)) for _, rows in self._inputs(every)]
        return Routing(torch.cat([p.chosen.cpu() for p in parts]), torch.cat([p.weights.cpu() for p in parts]))

    def _inputs(self, tokens: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The block's input of these tokens, some at a time: which, and [n, hidden]."""
        for start in range(0, len(tokens), ROWS):
            part = slice(start, start + ROWS)
            yield part, self.served[0].normed(self.kind.mlp.norm, self.hidden[tokens[part]].to(self.device))

    def _shared(self, block: Experts, weights: Tensors) -> Tensor:
        """What the shared expert adds, quantized here; float32 [N, hidden], zeros where there is none."""
        out = torch.zeros(self.hidden.shape)
        if block.shared is None:
            return out
        every = torch.arange(len(self.hidden))
        self._linears(block.shared, weights, every, self.token_weights)
        for part, rows in self._inputs(every):
            found = shared_output(block, rows, self.served[0].linear)
            assert found is not None
            out[part] = found.float().cpu()
        return out

    def _quantize_expert(self, index: int, mlp: GatedMLP, own: Tensors, tokens: Tensor, share: Tensor) -> Tensor:
        """Quantizes an expert; what its last linear reads, [n, width], of `tokens` first."""
        assert self.report is not None
        weights, inputs = share.square(), self.kind.hidden
        self.report.tokens.append(len(tokens))
        if len(tokens) < inputs:
            self.report.pooled.append(index)
            others = torch.linspace(0, len(self.hidden) - 1, min(2 * inputs, len(self.hidden))).long()
            typical = weights.mean().item() if len(tokens) else 1.0
            made_up = torch.full((len(others),), typical * (inputs - len(tokens)) / len(others))
            tokens, weights = torch.cat((tokens, others)), torch.cat((weights, made_up))
        if self.token_weights is not None:
            weights = weights * self.token_weights[tokens]
        x4 = self._linears(mlp, own, tokens, weights)
        self._note_error()
        return x4

    def _linears(self, mlp: GatedMLP, own: Tensors, tokens: Tensor, weights: Tensor | None) -> Tensor:
        """Quantizes a gated MLP from the inputs that these tokens have there, with a weight for each; empties `own`.

        Returns:
            what its last linear reads, [n, width] on the CPU.
        """
        self._from_rows(own, "mlp", (mlp.gate, mlp.up), (rows for _, rows in self._inputs(tokens)), weights)
        x4 = torch.empty(len(tokens), mlp.width, dtype=self.dtype)
        for part, rows in self._inputs(tokens):
            x4[part] = inner(mlp, rows, self.served[0].linear).cpu()
        self._from_rows(own, "down", (mlp.down,), (rows.to(self.device) for rows in x4.split(ROWS)), weights)
        return x4

    def _from_rows(
        self, own: Tensors, site: str, names: tuple[str, ...], rows: Iterator[Tensor], weights: Tensor | None
    ) -> None:
        """Quantizes linears that share these inputs, ROWS of them at a time, with a weight for each."""
        if not self.recipe.weights.needs_inputs:
            self._without_inputs({name: own.pop(name) for name in names})
            return
        parts = repeat(()) if weights is None else ((part.to(self.device),) for part in weights.split(ROWS))
        share = ((i, (x, *weight)) for i, (x, weight) in enumerate(zip(rows, parts, strict=False)))
        self._round(own, names, *self._means(*self._sums(self.served[0], site, "", share), len(self.hidden)))

    def _leave(self, mlp: GatedMLP) -> None:
        """To be called when nothing reads an expert any more."""
        for name in (mlp.gate, mlp.up, mlp.down) if self.spool else ():
            packed = [served.done.pop(name) for served in self.served]
            assert self.spool
            self.spool.put(packed[0].tensors(name, self.dtype))

    def _note_error(self) -> None:
        assert self.report is not None
        self.report.errors.append(sum(self.errors[-3:]) / 3)

    def _add_exact(self, own: Tensors, index: int, mlp: GatedMLP, total: Tensor) -> None:
        """Adds what the expert does for the tokens of the full-precision window."""
        tokens, share = self.exact_routing.of(index)
        served = self.served[0]
        linear = served.decoder.float_linear({f"{n}.weight": w for n, w in own.items()}, served.stages)
        total.index_add_(0, tokens, linear(mlp.down, inner(mlp, self.exact_x3[tokens], linear)) * share[:, None])
