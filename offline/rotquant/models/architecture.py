"""What rotquant knows about an architecture, as data. A family of models says it in a file of its own beside this one.

A decoder layer is two blocks on the residual stream, attention and MLP. A block reads the output of its norm and writes
to the stream with one linear. In it stand the pairs that scale and rotate into each other (see `fold`):

    attention    values into the output linear, for each KV head; keys against queries, in the channels that RoPE allows
    gated        attention whose output is multiplied by sigmoid(gate x), each channel by its own: values still scale
                 into the output linear, but do not rotate into it, diag(g) R ≠ R diag(g)
    linear       attention by the gated delta rule (`delta`): neither
    gated MLP    up into down, for each channel; the order of the channels, rows of gate and up, columns of down
    experts      the same in each of them: an expert is a gated MLP; the router reads what they read

Linears are named as modules of transformers' model, less the layer's prefix. A checkpoint may hold several in one
tensor (`Layer.fused`): they are split when a layer is read and put together again when it is written, so everything in
between sees single linears. So it is with norms of which files hold the gain less 1 (`Layer.offset`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from rotquant.models.config_rules import Known
from rotquant.models.delta import DeltaNet

Tensors = dict[str, Tensor]
Shape = tuple[int, int]  # outputs, inputs of a linear
BY_OUTPUT = ("weight", "bias", "shift", "lora_B")  # tensors of a linear that have a row for each output (see `fold`)


def head_size(config: PreTrainedConfig) -> int:
    """Channels of an attention head, by config.json."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True)
class PositionScale:
    """Queries at position p are multiplied by 1 + beta log(1 + floor(p / period)), behind RoPE."""

    beta: float
    period: int


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention: softmax(scale q kᵀ) v with RoPE on queries and keys.

    gated: times sigmoid(gate x); the query linear gives of each head its query, then its gate.
    """

    module: str  # that calls attention, as the KV cache's clips name it
    norm: str
    query: str
    key: str
    value: str
    output: str
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int  # channels of a head that RoPE turns, the first ones; 0 for none
    scale: float
    query_norm: str | None = None  # RMSNorm of each head behind the projection
    key_norm: str | None = None
    position_scale: PositionScale | None = None
    gated: bool = False
    window: int | None = None  # positions that a query sees at most, its own and those before it

    @property
    def qk_factors(self) -> int:
        """Factors of S_qk for a head: one for each pair of channels that RoPE turns, one for each other channel."""
        return self.head_dim - self.rotary // 2

    @property
    def reads(self) -> tuple[str, ...]:
        """Linears that read the norm and are quantized."""
        return self.query, self.key, self.value

    @property
    def full_precision(self) -> tuple[str, ...]:
        """Linears that read the norm and are not quantized."""
        return ()

    @property
    def head_norms(self) -> tuple[str, ...]:
        """RMSNorms of queries and keys."""
        return tuple(filter(None, (self.query_norm, self.key_norm)))

    @property
    def kept(self) -> tuple[str, ...]:
        """Tensors that stay as the files have them, bit for bit."""
        return ()

    @property
    def channels_of_head(self) -> int:
        return self.head_dim

    @property
    def channels(self) -> int:
        """Of what the output linear reads."""
        return self.heads * self.head_dim

    @property
    def numbers(self) -> int:
        """Numbers of a token between the linears."""
        return self.channels * (2 if self.gated else 1) + 2 * self.kv_heads * self.head_dim

    def shapes(self, hidden: int) -> dict[str, Shape]:
        """Outputs and inputs of the quantized linears."""
        queries, values = self.channels * (2 if self.gated else 1), self.kv_heads * self.head_dim
        return {
            self.query: (queries, hidden), self.key: (values, hidden), self.value: (values, hidden),
            self.output: (hidden, self.channels),
        }  # fmt: skip


@dataclass(frozen=True)
class GatedMLP:
    """down(act(gate x) up x)."""

    norm: str
    gate: str
    up: str
    down: str
    width: int  # of what is between
    activation: str  # as transformers names it

    @property
    def gated(self) -> tuple[GatedMLP, ...]:
        """The gated MLPs that a block is made of."""
        return (self,)

    @property
    def full_precision(self) -> tuple[str, ...]:
        """Linears of a block that read its norm and are not quantized."""
        return ()


@dataclass(frozen=True)
class Experts:
    """Of the gated MLPs ("experts") the `top_k` that a router chooses for a token, each times its weight, added up.

    p = softmax(router x); the weights are the chosen p, divided by their sum where `normed`. Where there is a `shared`
    expert every token passes through it too, times sigmoid(shared_gate x) where that is there.

    Files hold experts one by one, `<files>.experts.<j>.<gate>.weight`, or all of them in two tensors, as transformers'
    model does: `experts.gate_up_proj` [count, 2 width, hidden] and `experts.down_proj` [count, hidden, width].
    """

    norm: str
    module: str  # of transformers' model
    files: str  # what files call that module
    gate: str  # of an expert, less what stands before it
    up: str
    down: str
    count: int
    top_k: int
    width: int
    activation: str
    normed: bool
    shared: GatedMLP | None = None
    shared_gate: str | None = None

    @property
    def router(self) -> str:
        return f"{self.files}.gate"

    @cached_property
    def routed(self) -> tuple[GatedMLP, ...]:
        """The experts in their order."""
        first = f"{self.files}.experts"
        return tuple(
            GatedMLP(
                self.norm, f"{first}.{j}.{self.gate}", f"{first}.{j}.{self.up}", f"{first}.{j}.{self.down}",
                self.width, self.activation,
            )
            for j in range(self.count)
        )  # fmt: skip

    @property
    def gated(self) -> tuple[GatedMLP, ...]:
        return (*((self.shared,) if self.shared else ()), *self.routed)

    @property
    def full_precision(self) -> tuple[str, ...]:
        return (self.router, *((self.shared_gate,) if self.shared_gate else ()))


@dataclass(frozen=True)
class Layer:
    """One decoder layer: h += residual o(attention(norm h)); h += residual mlp(norm h).

    `fused`: name of a linear in the checkpoint -> the linears that its tensors hold one below the other.
    `offset`: the gain of a norm of the stream, of queries or of keys is this and what files hold for it.
    """

    attention: Attention | DeltaNet
    mlp: GatedMLP | Experts
    hidden: int
    eps: float
    residual: float = 1.0
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    offset: float = 0.0

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
        return tuple(f"{norm}.weight" for norm in (*self.norms.values(), *self.attention.head_norms))

    def rounded(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """What a tensor that is not quantized is where a checkpoint holds it in `dtype`."""
        if self.offset and name in self.gains:
            return ((tensor.double() - self.offset).to(dtype).double() + self.offset).float()
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


@dataclass(frozen=True)
class Names:
    """Tensors outside the layers, and how a layer's names begin."""

    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layers: str = "model.layers."


@dataclass(frozen=True)
class Architecture:
    """A whole model: h = embedding_scale E[token], its layers, logits = W norm(h) / logits_divisor.

    tied: lm_head is the embedding: config.json says so, and the files hold no lm_head of their own (see `original`).
    """

    config: PreTrainedConfig
    kinds: tuple[Layer, ...]  # the layers in their order
    vocab_size: int
    tied: bool
    embedding_scale: float = 1.0
    logits_divisor: float = 1.0
    names: Names = Names()
    beside: tuple[str, ...] = ()  # how tensors begin that are no part of what is quantized, and are copied
    left: tuple[str, ...] = ()  # and that are left out
    served: Mapping[str, Any] = field(default_factory=dict)  # what a checkpoint's config.json says for vLLM besides

    @property
    def layers(self) -> int:
        return len(self.kinds)

    @property
    def hidden_size(self) -> int:
        return self.kinds[0].hidden

    @property
    def head_dim(self) -> int:
        return head_size(self.config)

    @property
    def attentions(self) -> dict[str, Attention]:
        """By their full names the modules of the layers that attend over keys and values."""
        own = ((self.layer_prefix(index), kind.attends) for index, kind in enumerate(self.kinds))
        return {prefix + attention.module: attention for prefix, attention in own if attention}

    @property
    def offset(self) -> float:
        """The final norm's gain is this and what files hold for it, as those of the layers."""
        return self.kinds[0].offset

    @property
    def eps(self) -> float:
        """Of the final norm."""
        return self.kinds[0].eps

    def layer_prefix(self, index: int) -> str:
        return f"{self.names.layers}{index}."

    def linears(self) -> Iterator[tuple[str, Shape]]:
        """Full name and shape of every linear in the layers, as a checkpoint holds them."""
        for index, layer in enumerate(self.kinds):
            for linear in layer.stored:
                yield self.layer_prefix(index) + linear, layer.stored_shape(linear)

    @property
    def mixtures(self) -> dict[int, Experts]:
        """The layers that have experts."""
        return {index: kind.mlp for index, kind in enumerate(self.kinds) if isinstance(kind.mlp, Experts)}


@dataclass(frozen=True)
class Family:
    """Models that one file describes.

    Args:
        classes: names of transformers' classes, as `architectures` of config.json gives them, with what their configs
            have.
        describe: reads a config of theirs.
    """

    classes: Mapping[str, Known]
    describe: Callable[[PreTrainedConfig], Architecture]
