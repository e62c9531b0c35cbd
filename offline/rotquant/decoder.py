"""One decoder layer as functions on a dict of tensors, cut where a quantizer needs to look.

The layer is computed in five steps, each a function of the step before, so that the linears of a step can
be quantized from the inputs that they will really see:

    x1 = norm(h);  qkv(x1) -> x2 = attention;  h2 = h + o(x2), x3 = norm(h2);  x4 = silu(gate x3) up x3;
    h' = h2 + down(x4)

`linear(name, x)` is passed in: float weights for the equivalence gate, the served op for calibration, fake-quantized
weights for learning; `cache(q, k, v)` gives queries, keys and values back as the KV cache would.
Shapes: h [..., T, hidden], the last T tokens of each sequence; x2 [..., T, heads * d]; x4 [..., T, intermediate].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from rotquant.format import KVFormat
from rotquant.models import Architecture
from rotquant.space import LayerTransforms
from rotquant_kernels import convention, reference

Linear = Callable[[str, Tensor], Tensor]
Cache = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # all [..., T, heads, d]


class Decoder:
    """The computation of a layer; holds no weights.

    Args:
        arch: sizes; cos, sin: float32 [positions, d] from `models.rotary`.
    """

    def __init__(self, arch: Architecture, cos: Tensor, sin: Tensor) -> None:
        self.arch, self.cos, self.sin = arch, cos, sin

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        """RMSNorm in float32, in x's dtype."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.arch.eps)
        return (y * gain.to(y)).to(x.dtype)

    def attention(self, tensors: dict[str, Tensor], x1: Tensor, linear: Linear, cache: Cache | None = None) -> Tensor:
        """Causal attention of each sequence, x1 [..., T, hidden] to x2 [..., T, heads * d]."""
        query, key, value = (linear(f"self_attn.{n}_proj", x1).unflatten(-1, (-1, self.arch.head_dim)) for n in "qkv")
        if "self_attn.q_norm.weight" in tensors:
            query = self.norm(query, tensors["self_attn.q_norm.weight"])
            key = self.norm(key, tensors["self_attn.k_norm.weight"])
        query, key, value = self.rotary(query).float(), self.rotary(key).float(), value.float()
        if cache:
            query, key, value = cache(query, key, value)
        query, key, value = (x.transpose(-3, -2) for x in (query, key, value))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return mixed.transpose(-3, -2).flatten(-2).to(x1.dtype)

    def queries_and_keys(self, tensors: dict[str, Tensor], x1: Tensor, linear: Linear) -> tuple[Tensor, Tensor]:
        """Queries [..., T, heads, d] and keys [..., T, kv_heads, d] behind RoPE, float32."""
        query, key = (linear(f"self_attn.{n}_proj", x1).unflatten(-1, (-1, self.arch.head_dim)) for n in "qk")
        if "self_attn.q_norm.weight" in tensors:
            query = self.norm(query, tensors["self_attn.q_norm.weight"])
            key = self.norm(key, tensors["self_attn.k_norm.weight"])
        return self.rotary(query).float(), self.rotary(key).float()

    def attention_received(self, tensors: dict[str, Tensor], x1: Tensor, linear: Linear) -> Tensor:
        """Attention that each token gets from all queries of one sequence, mean over the heads.

        Σ_q a_qt for token t: 1 on average, T/2 for a sink that holds half of all attention.

        Args:
            x1: [T, hidden].
        Returns:
            float32 [T].
        """
        query, key = self.queries_and_keys(tensors, x1, linear)
        steps, heads = query.shape[:2]
        hidden = torch.ones(steps, steps, dtype=torch.bool, device=x1.device).triu(1)
        total = torch.zeros(steps, device=x1.device)
        for head in range(heads):  # one at a time: T x T numbers
            scores = query[:, head] @ key[:, head // (heads // key.shape[1])].mT * self.arch.head_dim**-0.5
            total += scores.masked_fill(hidden, float("-inf")).softmax(-1).sum(0)
        return total / heads

    def rotary(self, x: Tensor) -> Tensor:
        """Rotary position embedding of x [..., T, heads, d], halves convention."""
        cos, sin = (t[: x.shape[-3], None].to(x) for t in (self.cos, self.sin))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def mlp_input(self, x3: Tensor, linear: Linear) -> Tensor:
        """x4, the input of down_proj."""
        return silu(linear("mlp.gate_proj", x3)) * linear("mlp.up_proj", x3)

    def layer(self, tensors: dict[str, Tensor], h: Tensor, linear: Linear, cache: Cache | None = None) -> Tensor:
        """The whole layer, h to h'."""
        x2 = self.attention(tensors, self.norm(h, tensors["input_layernorm.weight"]), linear, cache)
        h = h + linear("self_attn.o_proj", x2)
        x4 = self.mlp_input(self.norm(h, tensors["post_attention_layernorm.weight"]), linear)
        return h + linear("mlp.down_proj", x4)


def float_linear(tensors: dict[str, Tensor], transforms: LayerTransforms | None = None) -> Linear:
    """Linears in the precision of the tensors, behind the online stages of the layer."""

    def linear(name: str, x: Tensor) -> Tensor:
        for stage in transforms.chain(name) if transforms else ():
            x = reference.online_stage(x, *stage)
        return torch.nn.functional.linear(x, tensors[f"{name}.weight"], bias_of(tensors, name))

    return linear


def bias_of(tensors: dict[str, Tensor], linear: str) -> Tensor | None:
    """The bias and what a shift adds to the output (see `fold`); None where there is neither."""
    found = [tensors[name] for name in (f"{linear}.bias", f"{linear}.shift") if name in tensors]
    return sum(found[1:], found[0]) if found else None


def kv4_cache(kv: KVFormat) -> Cache:
    """A 4-bit cache by the numeric convention."""

    def cache(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if kv.rotate:
            query, key = reference.hadamard(query, kv.rotate), reference.hadamard(key, kv.rotate)
        key = convention.kv_fake_quantize(key, kv.symmetric, kv.k_clip)
        return query, key, convention.kv_fake_quantize(value, kv.symmetric, kv.v_clip)

    return cache
