"""The design space: every transform that a recipe may choose or learn for a model.

A method is a point in this space: which of these are there, and how their values are found (`learn`).
`fold` puts them into the weights; what cannot be folded runs online, as stages (`rotquant_kernels.stages`).

    R1             residual stream; orthogonal [hidden, hidden], one for the model
    R2             values, one for each KV head; orthogonal [kv_heads, d, d], folded into the value and output linears
    R3             queries and keys after RoPE; a Hadamard, online
    s_attn, s_mlp  S_n: factors of the norms' outputs (after R1); the norm's gain takes them
    s_ov, s_ud     factors of the values (before R2) and of up's output; their producers take them
    s_qk           factors of keys, divided out of queries; one for the two channels that RoPE turns into each other
    order          permutation of the intermediate channels: rows of gate and up, columns of down
    inputs         for each site (`models.Layer.sites`) the chain of online stages before its linears; R4 is the one
                   before down
    clips          activation clip of each site, clips of keys and values
    bits           of the activations of each site that has others than the recipe says
    weight_clips   by linear: for each weight scale the share of the range that it covers
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from rotquant_kernels import Stage
from rotquant_kernels.formats import RowFormat, WeightFormat

if TYPE_CHECKING:
    from rotquant.recipe import Weights


class Rotation(Protocol):
    """An orthogonal matrix R by what it does."""

    def rows(self, x: Tensor) -> Tensor:
        """x R for x [..., n]."""

    def columns(self, w: Tensor) -> Tensor:
        """Rᵀ w for w [n, ...]."""


@dataclass
class LayerTransforms:
    """The transforms of one decoder layer; None where there is none. Factors multiply what the linear reads."""

    r2: Tensor | None = None
    s_attn: Tensor | None = None  # [hidden]
    s_mlp: Tensor | None = None  # [hidden]
    s_ov: Tensor | None = None  # [kv_heads * d]
    s_ud: Tensor | None = None  # [intermediate]
    s_qk: Tensor | None = None  # [kv_heads or 1, models.Attention.qk_factors]; one row where norms of q and k take it
    order: Tensor | None = None  # int64 [intermediate]
    inputs: dict[str, list[Stage]] = field(default_factory=dict)
    clips: dict[str, float] = field(default_factory=dict)  # by site, and "key", "value"
    bits: dict[str, int] = field(default_factory=dict)  # by site
    weight_clips: dict[str, Tensor] = field(default_factory=dict)  # [N, groups] each

    def norm_scale(self, site: str) -> Tensor | None:
        """S_n of a site that reads a norm."""
        found: Tensor | None = {"attn": self.s_attn, "mlp": self.s_mlp}[site]
        return found

    def rows(self, site: str, usual: RowFormat) -> RowFormat:
        """What the activations of a site are rounded to, `usual` where nothing is said of it."""
        return replace(usual, bits=self.bits.get(site, usual.bits)).clipped(self.clips.get(site))

    def weights(self, site: str, options: Weights) -> WeightFormat:
        """How the weights of a site are stored."""
        return options.wide if site in self.bits else options.form

    def widened(self, sites: Iterable[str]) -> LayerTransforms:
        """The same with 8-bit activations at some sites: their ranges are whole, since clips pay at few bits alone."""
        wide = list(sites)
        return replace(self, bits=self.bits | dict.fromkeys(wide, 8), clips=self.clips | dict.fromkeys(wide, 1.0))

    def tensors(self) -> dict[str, Tensor]:
        """Everything in it as a flat dict, for a file; `from_tensors` is the inverse."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        for site, stages in self.inputs.items():
            for i, stage in enumerate(stages):
                tensor = torch.empty(0) if stage.tensor is None else stage.tensor
                found[f"inputs.{site}.{i}.{stage.kind}.{stage.block}"] = tensor
        for name, clip in self.clips.items():
            found[f"clips.{name}"] = torch.tensor(clip, dtype=torch.float64)
        found |= {f"bits.{site}": torch.tensor(bits) for site, bits in self.bits.items()}
        found |= {f"weight_clips.{name}": ratio for name, ratio in self.weight_clips.items()}
        return {name: tensor.detach().contiguous() for name, tensor in found.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LayerTransforms:
        made = cls()
        for name in sorted(tensors):  # the stages of a site in their order
            part, _, rest = name.partition(".")
            if part == "clips":
                made.clips[rest] = tensors[name].item()
            elif part == "bits":
                made.bits[rest] = int(tensors[name])
            elif part == "weight_clips":
                made.weight_clips[rest] = tensors[name]
            elif part == "inputs":
                site, _, kind, block = rest.split(".")
                tensor = tensors[name] if tensors[name].numel() else None
                made.inputs.setdefault(site, []).append(Stage(kind, int(block), tensor))
            else:
                setattr(made, part, tensors[name])
        return made


@dataclass
class Transforms:
    """The transforms of a model.

    `r3` is the Hadamard block on queries and keys, 0 for none; `tp_max` the tensor-parallel size whose ranks nothing
    crosses.
    """

    r1: Rotation | None
    r3: int
    layers: list[LayerTransforms]
    tp_max: int = 1

    @property
    def r4_block(self) -> int:
        """Block of R4, 0 for none."""
        return self.hadamard("down")

    def hadamard(self, site: str) -> int:
        """Block of the Hadamard that comes first at a site, 0 for none."""
        chain = self.shared_chain(site)
        return chain[0].block if chain and chain[0].kind == "hadamard" else 0

    def shared_chain(self, site: str) -> list[Stage]:
        """The online stages of a site, whose kinds and blocks are those of every layer."""
        return self.layers[0].inputs.get(site, [])
