"""One decoder layer as functions on a dict of tensors, cut where a quantizer needs to look.

The layer is computed in five steps, each a function of the step before, so that the linears of a step can
be quantized from the inputs that they will really see:

    x1 = norm(h);  qkv(x1) -> x2 = attention;  h2 = h + o(x2), x3 = norm(h2);  x4 = act(gate x3) up x3;
    h' = h2 + down(x4)

Linear attention has other linears in the place of qkv and o (`delta`); gated attention multiplies x2 by sigmoid(gate).
A mixture of experts has the last two steps for each expert, on the tokens that go there (`mixture`).
`linear(name, x)` is passed in: float weights for the equivalence gate, the served op for calibration, fake-quantized
weights for learning; `cache(q, k, v)` gives queries, keys and values back as the KV cache would.
Shapes: h [..., T, hidden], the last T tokens of each sequence; x2 [..., T, heads * d]; x4 [..., T, intermediate].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rotquant.models.architecture import Architecture
from rotquant.models.attention import Attention, PositionScale
from rotquant.models.delta import DeltaNet, delta_attention
from rotquant.models.layer import Layer, Tensors
from rotquant.models.mixture import inner, mixture
from rotquant.models.mlp import Experts
from rotquant.models.reading import rotary
from rotquant_kernels import Stage, reference
from rotquant_kernels.formats import KVFormat, feedback

Linear = Callable[[str, Tensor], Tensor]
Cache = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # all [..., T, heads, d]
Rounding = Callable[[Tensor], Tensor]

QUERIES = 128  # whose attention is computed at a time, where all of it is looked at


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm in float32, in x's dtype."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * gain.to(y)).to(x.dtype)


@dataclass(frozen=True)
class Decoder:
    """The computation of one layer; holds no weights.

    Args:
        kind: the layer; cos, sin: float32 [positions, channels that RoPE turns], from `models.rotary`.
        longest: positions that the model is made for.
    """

    kind: Layer
    cos: Tensor
    sin: Tensor
    longest: int

    def on(self, device: torch.device) -> Decoder:
        """The same on another device."""
        return replace(self, cos=self.cos.to(device), sin=self.sin.to(device))

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return rms_norm(x, gain, self.kind.eps)

    def attention(self, tensors: Tensors, x1: Tensor, linear: Linear, cache: Cache | None = None) -> Tensor:
        """Causal attention of each sequence, x1 [..., T, hidden] to x2 [..., T, heads * d]."""
        attention = self.kind.attention
        if isinstance(attention, DeltaNet):
            return delta_attention(attention, tensors, x1, linear, self.kind.eps)
        query, gate = self.query_and_gate(linear(attention.query, x1), attention)
        query, key = self.behind_rope(tensors, query, linear(attention.key, x1), attention)
        value = linear(attention.value, x1).unflatten(-1, (-1, attention.head_dim))
        value = (self.norm(value, value.new_ones(attention.head_dim)) if attention.normed_values else value).float()
        if cache:
            query, key, value = cache(query, key, value)
        mixed = causal(query, key, value, attention.scale, attention.window, attention.cap).flatten(-2).to(x1.dtype)
        return mixed if gate is None else mixed * gate.sigmoid()

    def query_and_gate(self, y: Tensor, attention: Attention) -> tuple[Tensor, Tensor | None]:
        """Queries [..., T, heads, d], and the gate [..., T, heads * d] where there is one, of the query linear's y."""
        if not attention.gated:
            return y.unflatten(-1, (-1, attention.head_dim)), None
        query, gate = y.unflatten(-1, (-1, 2 * attention.head_dim)).chunk(2, dim=-1)
        return query, gate.flatten(-2)

    def behind_rope(self, tensors: Tensors, query: Tensor, key: Tensor, attention: Attention) -> tuple[Tensor, Tensor]:
        """Queries [..., T, heads, d] and keys [..., T, kv_heads, d] behind norms and RoPE, float32.

        Args:
            query: [..., T, heads, d]; key: [..., T, kv_heads * d].
        """
        key = key.unflatten(-1, (-1, attention.head_dim))
        if attention.query_norm:
            query = self.norm(query, tensors[f"{attention.query_norm}.weight"])
        if attention.key_norm:
            key = self.norm(key, tensors[f"{attention.key_norm}.weight"])
        query, key = self.rotary(query, attention), self.rotary(key, attention)
        if attention.position_scale:
            query = query * position_scale(attention.position_scale, query.shape[-3]).to(query)[:, None, None]
        return query.float(), key.float()

    def attention_received(self, tensors: Tensors, x1: Tensor, linear: Linear) -> Tensor:
        """Attention that each token gets from all queries of one sequence, mean over the heads.

        Σ_q a_qt for token t: 1 on average, T/2 for a sink that holds half of all attention.

        Args:
            x1: [T, hidden].
        Returns:
            float32 [T]; all 1 of linear attention, which has no such numbers.
        """
        attention = self.kind.attention
        if isinstance(attention, DeltaNet):
            return torch.ones(len(x1), device=x1.device)
        query, _ = self.query_and_gate(linear(attention.query, x1), attention)
        query, key = self.behind_rope(tensors, query, linear(attention.key, x1), attention)
        steps, heads = query.shape[:2]
        query, key = (query * attention.scale).transpose(0, 1).contiguous(), key.transpose(0, 1).contiguous()
        hidden, shared = ~visible(steps, attention.window, x1.device), heads // len(key)
        total, each = torch.zeros(steps, device=x1.device), torch.ones(QUERIES, device=x1.device)
        for start in range(0, steps, QUERIES):  # which later tokens get nothing from
            some, end = slice(start, start + QUERIES), min(start + QUERIES, steps)
            first = 0 if attention.window else start  # that one of these queries may not see
            for head in range(heads):
                scores = capped(query[head, some] @ key[head // shared, :end].mT, attention.cap)
                scores[:, first:].masked_fill_(hidden[some, first:end], float("-inf"))
                total[:end] += each[: len(scores)] @ scores.softmax(-1)
        return total / heads

    def rotary(self, x: Tensor, attention: Attention) -> Tensor:
        """Rotary position embedding of x [..., T, heads, d], halves convention, on the channels that it turns."""
        turned = attention.rotary
        if not turned:
            return x
        cos, sin = (t[: x.shape[-3], None].to(x) for t in (self.cos, self.sin))
        first, second = x[..., :turned].chunk(2, dim=-1)
        y = x[..., :turned] * cos + torch.cat((-second, first), dim=-1) * sin
        return y if turned == x.shape[-1] else torch.cat((y, x[..., turned:]), dim=-1)

    def mlp_input(self, x3: Tensor, linear: Linear) -> Tensor:
        """x4, the input of a gated MLP's last linear."""
        (mlp,) = self.kind.mlp.gated
        return inner(mlp, x3, linear)

    def mlp(self, x3: Tensor, linear: Linear, chosen: Tensor | None = None) -> Tensor:
        """What the MLP writes; `chosen`: the experts of each token, where it is a mixture and they are given."""
        mlp = self.kind.mlp
        if isinstance(mlp, Experts):
            return mixture(mlp, x3, linear, chosen)
        return linear(mlp.down, self.mlp_input(x3, linear))

    def add(self, h: Tensor, written: Tensor) -> Tensor:
        """The residual stream after a block has written to it."""
        return h + written * self.kind.residual

    def write(self, tensors: Tensors, h: Tensor, name: str, written: Tensor) -> Tensor:
        """The residual stream after a linear has written to it, through the norm behind it where there is one; times
        the layer's factor after the last of them."""
        norm, factor = self.kind.output_norms.get(name), self.kind.factor
        h = self.add(h, self.norm(written, tensors[f"{norm}.weight"]) if norm else written)
        return h * tensors[factor].to(h) if factor and name == self.kind.writes[-1] else h

    def behind_attention(self, tensors: Tensors, h: Tensor, linear: Linear, cache: Cache | None = None) -> Tensor:
        """The residual stream in front of the MLP's norm."""
        attention = self.kind.attention
        x2 = self.attention(tensors, self.norm(h, tensors[f"{attention.norm}.weight"]), linear, cache)
        return self.write(tensors, h, attention.output, linear(attention.output, x2))

    def layer(
        self, tensors: Tensors, h: Tensor, linear: Linear, cache: Cache | None = None, chosen: Tensor | None = None
    ) -> Tensor:
        """The whole layer, h to h'; chosen: as in `mlp`."""
        h = self.behind_attention(tensors, h, linear, cache)
        written = self.mlp(self.norm(h, tensors[f"{self.kind.mlp.norm}.weight"]), linear, chosen)
        return self.write(tensors, h, self.kind.writes[-1], written)

    def float_linear(self, tensors: Tensors, stages: Mapping[str, list[Stage]] | None = None) -> Linear:
        """Linears in the precision of the tensors, behind the online stages of each site."""

        def linear(name: str, x: Tensor) -> Tensor:
            for stage in stages.get(self.kind.site_of.get(name, ""), []) if stages else ():
                x = reference.online_stage(x, *stage)
            return torch.nn.functional.linear(x, tensors[f"{name}.weight"], bias_of(tensors, name))

        return linear


def visible(steps: int, window: int | None, device: torch.device) -> Tensor:
    """Which positions each query sees, bool [T, T]: its own and those before it, `window` at most."""
    ones = torch.ones(steps, steps, dtype=torch.bool, device=device).tril()
    return ones if window is None else ones.triu(1 - window)


def capped(scores: Tensor, cap: float | None) -> Tensor:
    """cap tanh(scores / cap); the scores where there is no cap."""
    return scores if cap is None else (scores / cap).tanh() * cap


def causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None, cap: float | None = None
) -> Tensor:
    """Causal attention of query [..., T, heads, d] over key and value [..., T, kv_heads, d]; [..., T, heads, d].

    torch's fast kernels want exactly one dimension of batches: without one its plain product takes six times as long.
    """
    q, k, v = (x.reshape(-1, *x.shape[-3:]).transpose(1, 2) for x in (query, key, value))
    steps = query.shape[-3]
    if cap is not None:  # which torch's kernels do not have
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = capped(q @ k.mT * scale, cap).masked_fill(~visible(steps, window, q.device), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(query.shape)
    mask = visible(steps, window, query.device) if window and window < steps else None
    mixed = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return mixed.transpose(1, 2).reshape(query.shape)


def decoders(arch: Architecture, positions: int, device: torch.device | str = "cpu") -> list[Decoder]:
    """The decoder of each layer, for sequences of at most `positions` tokens."""
    none = (torch.zeros(1, positions, 0),) * 2
    entries = [kind.attends.rope if kind.attends else None for kind in arch.kinds]
    tables = {
        entry: tuple(table[0].to(device) for table in rotary(arch.config, positions, entry) or none)
        for entry in set(entries)
    }
    longest = arch.config.max_position_embeddings
    pairs = zip(arch.kinds, entries, strict=True)
    return [Decoder(kind, tables[entry][0], tables[entry][1], longest) for kind, entry in pairs]


def position_scale(scale: PositionScale, steps: int) -> Tensor:
    """Factors of the queries of positions 0 to `steps` - 1, float32 [steps]."""
    return 1 + scale.beta * torch.log(1 + torch.floor(torch.arange(steps) / scale.period))


def bias_of(tensors: Tensors, linear: str) -> Tensor | None:
    """The bias and what a shift adds to the output (see `fold`); None where there is neither."""
    found = [tensors[name] for name in (f"{linear}.bias", f"{linear}.shift") if name in tensors]
    return sum(found[1:], found[0]) if found else None


def kv4_cache(
    kv: KVFormat, key: Rounding | None = None, value: Rounding | None = None,
    turned: Callable[[Tensor, int], Tensor] = reference.hadamard, key_feedback: Tensor | None = None,
) -> Cache:  # fmt: skip
    """A 4-bit cache by its format; key, value, turned: rounding and Hadamards with gradients, where they are wanted.

    key_feedback: F float32 [kv_heads, d, d], where keys are rounded with error feedback.
    """
    fed_back = key_feedback is not None and partial(feedback.fake_quantize, rows=kv.key, feedback=key_feedback)
    of_key, of_value = key or fed_back or kv.key.fake_quantize, value or kv.value.fake_quantize

    def cache(query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if kv.rotate:
            query, k = turned(query, kv.rotate), turned(k, kv.rotate)
        return query, of_key(k), of_value(v)

    return cache
