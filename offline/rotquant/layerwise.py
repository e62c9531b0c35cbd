"""Quantizing one decoder layer: its linears in order of computation, each from the inputs it will be served.

The calibration chain holds the residual stream of every sample *as the quantized layers so far produce
it*, so the Hessians of GPTQ, and the chain handed to the next layer, are those of the served model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rotquant.decoder import Decoder
from rotquant.fold import READS_ATTENTION, READS_MLP, Online
from rotquant.models import LINEARS
from rotquant.recipe import Recipe
from rotquant.weights import gptq, rtn
from rotquant_kernels import convention, int_linear, prepare_weight, quantize_rows, transform_rows


@dataclass(frozen=True)
class PackedLinear:
    """A quantized linear as the checkpoint stores it: packed codes int32, scale, shape."""

    packed: Tensor
    scale: Tensor
    shape: tuple[int, int]
    bits: int

    @cached_property
    def prepared(self) -> Tensor:
        """The weights as they run; made when they first do, which lm_head, for one, never does."""
        return prepare_weight(self.packed, self.bits, self.shape[1], self.scale.shape[1])

    def tensors(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            f"{name}.weight_packed": self.packed.cpu(),
            f"{name}.weight_scale": self.scale.to(dtype).cpu(),
            f"{name}.weight_shape": torch.tensor(self.shape),
        }


def pack(codes: Tensor, scale: Tensor, bits: int) -> PackedLinear:
    return PackedLinear(convention.pack_int32(codes, bits), scale, (codes.shape[0], codes.shape[1]), bits)


class LayerQuantizer:
    """Quantizes decoder layers one at a time.

    Args:
        recipe, online: what to do; decoder: how a layer computes; dtype: of the checkpoint.
    """

    def __init__(self, recipe: Recipe, online: Online, decoder: Decoder, dtype: torch.dtype, device: str) -> None:
        self.recipe, self.online, self.decoder, self.dtype, self.device = recipe, online, decoder, dtype, device
        self.errors: list[float] = []  # relative rounding error of each weight matrix

    def __call__(self, folded: dict[str, Tensor], chain: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None]:
        """Quantizes a layer and moves the chain through it.

        Args:
            folded: float64 tensors of the layer; chain: [samples, T, hidden] or None without calibration.
        Returns:
            the tensors to store, and the chain after the layer.
        """
        self.errors = []
        others = {n: t.to(self.dtype) for n, t in folded.items() if n.removesuffix(".weight") not in LINEARS}
        self.tensors = {n: t.to(self.device) for n, t in others.items()}
        self.done: dict[str, PackedLinear] = {}
        weights = {n: folded[f"{n}.weight"].float().to(self.device) for n in LINEARS}
        folded.clear()
        if chain is None:
            for name in LINEARS:
                self._quantize(name, weights.pop(name), None)
        else:
            chain = self._calibrate(weights, chain)
        stored = dict(others)
        for name, linear in self.done.items():
            stored |= linear.tensors(name, self.dtype)
        return stored, chain

    def _calibrate(self, weights: dict[str, Tensor], chain: Tensor) -> Tensor:
        """The five steps of `decoder`: Hessians from each step's inputs, then its linears, then the next."""
        norm, gain1, gain2 = (self.decoder.norm, *(self.tensors[f"{n}.weight"] for n in NORMS))
        self._step(weights, READS_ATTENTION, (norm(h, gain1) for h in self._samples(chain)))
        mixed = torch.empty(*chain.shape[:2], weights["self_attn.o_proj"].shape[1], dtype=chain.dtype)
        for i, h in enumerate(self._samples(chain)):
            mixed[i] = self.decoder.attention(self.tensors, norm(h, gain1), self.linear).cpu()
        self._step(weights, ("self_attn.o_proj",), self._samples(mixed))
        after = torch.empty_like(chain)
        for i, (h, x2) in enumerate(zip(self._samples(chain), self._samples(mixed), strict=True)):
            after[i] = (h + self.linear("self_attn.o_proj", x2)).cpu()
        del mixed
        self._step(weights, READS_MLP, (norm(h, gain2) for h in self._samples(after)))
        x4 = (self.decoder.mlp_input(norm(h, gain2), self.linear) for h in self._samples(after))
        self._step(weights, ("mlp.down_proj",), x4)
        for i, h in enumerate(self._samples(after)):
            down = self.linear("mlp.down_proj", self.decoder.mlp_input(norm(h, gain2), self.linear))
            after[i] = (h + down).cpu()
        return after

    def _samples(self, chain: Tensor) -> Iterator[Tensor]:
        return (sample.to(self.device) for sample in chain)

    def _step(self, weights: dict[str, Tensor], names: tuple[str, ...], inputs: Iterator[Tensor]) -> None:
        """Quantizes the linears that share these inputs."""
        if self.recipe.weights.method == "rtn":
            for name in names:
                self._quantize(name, weights.pop(name), None)
            return
        hessian, cross = self._moments(names[0], inputs)
        refit = gptq.refit(hessian, cross, self.recipe.weights.damping) if self.recipe.weights.refit else None
        for name in names:
            weight = weights.pop(name)
            self._quantize(name, weight if refit is None else weight @ refit, hessian)

    def _moments(self, name: str, inputs: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        """Means of x̂ᵀ x̂ and xᵀ x̂ over all tokens; x the inputs of `name`, x̂ the same quantized.

        Returns:
            float32 [K, K] each.
        """
        hessian, cross, count = torch.zeros(()), torch.zeros(()), 0
        act = self.recipe.activations
        for x in inputs:
            exact = transform_rows(x, *self._transform(name))
            q, scale, zero = quantize_rows(x, *self._transform(name), act.bits, act.symmetric, act.clip)
            seen = convention.dequantize(q, scale, zero.float())
            hessian = hessian.to(seen) + seen.T @ seen
            cross = cross.to(seen) + exact.T @ seen
            count += len(x)
        return hessian / count, cross / count

    def _transform(self, name: str) -> tuple[str, int, None]:
        r4 = self.online.r4 if name == "mlp.down_proj" else 0
        return ("hadamard" if r4 else "none"), r4, None

    def _quantize(self, name: str, weight: Tensor, hessian: Tensor | None) -> None:
        options = self.recipe.weights
        scale = rtn.weight_scale(weight, options.bits, options.group_size, options.clip_search, self.dtype)
        if hessian is None:
            codes = rtn.quantize(weight, scale, options.bits)
        else:
            codes = gptq.quantize(weight, scale, hessian, options.bits, options.damping, options.act_order)
        self.errors.append(((rtn.dequantize(codes, scale) - weight).norm() / weight.norm()).item())
        self.done[name] = pack(codes, scale, options.bits)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """The served linear: the same op on the same packed weights."""
        linear, act = self.done[name], self.recipe.activations
        bias = self.tensors.get(f"{name}.bias")
        settings = (*self._transform(name), act.bits, act.symmetric, act.clip)
        return int_linear(x, linear.prepared, linear.scale, bias, linear.bits, *settings)


NORMS = ("input_layernorm", "post_attention_layernorm")
