"""One decoder layer: two blocks on the residual stream, attention and MLP.

Linears are named as modules of transformers' model, less the layer's prefix. A checkpoint may hold several in one
tensor (`Layer.fused`): they are split when a layer is read and put together again when it is written, so everything in
between sees single linears. So it is with norms of which files hold the gain less 1 (`Layer.offset`).

What a block writes may pass a norm of its own (`Layer.output_norms`). Then the residual stream does not rotate: an RMS
survives R1, rms(u R) = rms(u), and the gain behind it does not, diag(g) R ≠ R diag(g).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from rotquant.models.attention import Attention, Shape
from rotquant.models.delta import DeltaNet
from rotquant.models.mlp import Experts, GatedMLP

Tensors = dict[str, Tensor]
BY_OUTPUT = ("weight", "bias", "shift", "lora_B")  # tensors of a linear that have a row for each output (see `fold`)


@dataclass(frozen=True)
class Layer:
    """One decoder layer: h += residual o(attention(norm h)); h += residual mlp(norm h).

    `output_norms`: of a linear that writes to the stream, the norm behind it: h += residual norm(o(...)).

    `fused`: name of a linear in the checkpoint -> the linears that its tensors hold one below the other.
    `copies`: a linear that files need not hold -> the one whose tensors it then has.
    `offset`: the gain of a norm is this and what files hold for it.
    `factor`: a tensor of one number that multiplies the residual stream behind the layer.
    """

    attention: Attention | DeltaNet
    mlp: GatedMLP | Experts
    hidden: int
    eps: float
    residual: float = 1.0
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    offset: float = 0.0
    factor: str | None = None
    output_norms: Mapping[str, str] = field(default_factory=dict)

    @property
    def attends(self) -> Attention | None:
        """Its attention over keys and values; None where it has none."""
        return self.attention if isinstance(self.attention, Attention) else None

    @cached_property
    def sites(self) -> dict[str, tuple[str, ...]]:
        """Where the linears' inputs are quantized, in order of computation.

        The linears of a site read one input and share its transforms; those before which only the kind of input is one,
        each expert's own activations at "down", share the transforms.
        """
        a, gated = self.attention, self.mlp.gated
        reading = tuple(name for m in gated for name in (m.gate, m.up))
        return {
            "attn": a.reads,
            "o": (a.output,),
            "mlp": reading,
            "down": tuple(m.down for m in gated),
        }

    @property
    def branch_sites(self) -> tuple[str, ...]:
        """Where a low-rank branch of the inputs may be: not at experts, which have one op for all."""
        return ("attn", "o") if isinstance(self.mlp, Experts) else tuple(self.sites)

    @cached_property
    def site_of(self) -> dict[str, str]:
        return {linear: site for site, linears in self.sites.items() for linear in linears}

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """All that are quantized."""
        return tuple(self.site_of)

    @property
    def full_precision(self) -> dict[str, tuple[str, ...]]:
        """Linears that read the norm of a site as well and are not quantized, such as a router."""
        return {"attn": self.attention.full_precision, "mlp": self.mlp.full_precision}

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels between up and down of each gated MLP."""
        return tuple(m.width for m in self.mlp.gated)

    @property
    def norms(self) -> dict[str, str]:
        """The norm whose output a site reads, for the sites that read the residual stream."""
        return {"attn": self.attention.norm, "mlp": self.mlp.norm}

    @property
    def gains(self) -> tuple[str, ...]:
        """Tensors of the norms whose gain is `offset` and what files hold."""
        return tuple(f"{norm}.weight" for norm in self.every_norm)

    @property
    def every_norm(self) -> tuple[str, ...]:
        """Of the stream, of what blocks write to it, of queries and keys."""
        return (*self.norms.values(), *self.output_norms.values(), *self.attention.head_norms)

    @property
    def kept(self) -> tuple[str, ...]:
        """Tensors that stay as the files have them, bit for bit."""
        return (*self.attention.kept, *filter(None, (self.factor,)))

    def rounded(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """What a tensor that is not quantized is where a checkpoint holds it in `dtype`."""
        if self.offset and name in self.gains:
            return gain_as_stored(tensor, self.offset, dtype)
        return tensor.float() if name in self.attention.kept and name.endswith("A_log") else tensor.to(dtype)

    @cached_property
    def shares(self) -> dict[str, Fraction]:
        """The share of tokens that pass through a linear, on average: 1 but for the experts that a router chooses."""
        mlp = self.mlp
        chosen = Fraction(mlp.top_k, mlp.count) if isinstance(mlp, Experts) else Fraction(1)
        routed = mlp.routed if isinstance(mlp, Experts) else ()
        own = {name: chosen for m in routed for name in (m.gate, m.up, m.down)}
        return dict.fromkeys(self.linears, Fraction(1)) | own

    def width_field(self, width: int) -> str:
        """What config.json calls such a width of this layer."""
        mlp = self.mlp
        if isinstance(mlp, Experts) and mlp.shared and width == mlp.shared.width != mlp.width:
            return "shared_expert_intermediate_size"
        return "moe_intermediate_size" if isinstance(mlp, Experts) else "intermediate_size"

    @property
    def writes(self) -> tuple[str, ...]:
        """The linears that write to the residual stream."""
        return (self.attention.output, *self.sites["down"])

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Outputs and inputs of every linear."""
        hidden = self.hidden
        return self.attention.shapes(hidden) | {
            name: shape
            for m in self.mlp.gated
            for name, shape in ((m.gate, (m.width, hidden)), (m.up, (m.width, hidden)), (m.down, (hidden, m.width)))
        }

    @cached_property
    def stored(self) -> dict[str, tuple[str, ...]]:
        """The linears as a checkpoint names them, in order: each with the linears of this layer that it holds."""
        holder = {part: name for name, parts in self.fused.items() for part in parts}
        return {
            holder.get(linear, linear): self.fused.get(holder.get(linear, ""), (linear,)) for linear in self.linears
        }

    def holder(self, linear: str) -> str:
        """The linear of a checkpoint that holds one of these."""
        return next(name for name, parts in self.stored.items() if linear in parts)

    def stored_shape(self, name: str) -> Shape:
        parts = self.stored[name]
        return sum(self.shapes[part][0] for part in parts), self.shapes[parts[0]][1]

    def stored_at(self, site: str) -> tuple[str, ...]:
        """The linears of a site as a checkpoint names them."""
        return tuple(name for name, parts in self.stored.items() if self.site_of[parts[0]] == site)

    def split(self, tensors: Tensors) -> Tensors:
        """A layer's tensors as a checkpoint holds them, those of fused linears as views of their parts."""
        out = self._shifted(tensors, self.offset)
        for name, parts in self.fused.items():
            sizes = [self.shapes[part][0] for part in parts]
            for leaf in BY_OUTPUT:
                if (whole := out.pop(f"{name}.{leaf}", None)) is not None:
                    out |= {f"{part}.{leaf}": rows for part, rows in zip(parts, whole.split(sizes), strict=True)}
            if (read := out.pop(f"{name}.lora_A", None)) is not None:
                out |= {f"{part}.lora_A": read for part in parts}
        for name, original in self.copies.items():
            for leaf in (*BY_OUTPUT, "lora_A"):
                if f"{original}.{leaf}" in out and f"{name}.{leaf}" not in out:
                    out[f"{name}.{leaf}"] = out[f"{original}.{leaf}"].clone()
        return out

    def _shifted(self, tensors: Tensors, by: float) -> Tensors:
        """A copy, with `by` added to the gains, float64 then."""
        moved = {name: tensors[name].double() + by for name in self.gains if name in tensors} if by else {}
        return dict(tensors) | moved

    def join(self, tensors: Tensors) -> Tensors:
        """The inverse of `split`."""
        out = self._shifted(tensors, -self.offset)
        for name, parts in self.fused.items():
            for leaf in (*BY_OUTPUT, "lora_A"):
                found = [out.pop(f"{part}.{leaf}") for part in parts if f"{part}.{leaf}" in out]
                if found:
                    out[f"{name}.{leaf}"] = found[0] if leaf == "lora_A" else torch.cat(found)
        return out


def gain_as_stored(gain: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """A norm's gain, float32, behind a file that holds it less `offset` in `dtype`."""
    return ((gain.double() - offset).to(dtype).double() + offset).float()
