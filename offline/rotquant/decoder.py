"""One decoder layer as functions on a dict of tensors, cut where a quantizer needs to look.

The layer is computed in five steps, each a function of the step before, so that the linears of a step can
be quantized from the inputs that they will really see:

    x1 = norm(h);  qkv(x1) -> x2 = attention;  h2 = h + o(x2), x3 = norm(h2);  x4 = silu(gate x3) up x3;
    h' = h2 + down(x4)

`linear(name, x)` is passed in: float weights for the equivalence gate, the served op for calibration.
Shapes: h [T, hidden] of one sequence; x2 [T, heads * d]; x4 [T, intermediate].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rotquant.format import KVFormat
from rotquant.models import Architecture
from rotquant_kernels import convention
from rotquant_kernels.reference import attend, hadamard

Linear = Callable[[str, Tensor], Tensor]


class Decoder:
    """The computation of a layer; holds no weights.

    Args:
        arch: sizes; cos, sin: float32 [positions, d] from `models.rotary`.
        kv: format of the KV cache, None for full precision.
    """

    def __init__(self, arch: Architecture, cos: Tensor, sin: Tensor, kv: KVFormat | None = None) -> None:
        self.arch, self.cos, self.sin, self.kv = arch, cos, sin, kv

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        """RMSNorm in float32, in x's dtype."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.arch.eps)
        return (y * gain.to(y)).to(x.dtype)

    def attention(self, tensors: dict[str, Tensor], x1: Tensor, linear: Linear) -> Tensor:
        """Causal attention of one sequence, x1 [T, hidden] to x2 [T, heads * d]."""
        steps, size = x1.shape[0], self.arch.head_dim
        query, key, value = (linear(f"self_attn.{n}_proj", x1).view(steps, -1, size) for n in "qkv")
        if "self_attn.q_norm.weight" in tensors:
            query = self.norm(query, tensors["self_attn.q_norm.weight"])
            key = self.norm(key, tensors["self_attn.k_norm.weight"])
        query, key = self.rotary(query).float(), self.rotary(key).float()
        value = value.float()
        if self.kv:
            if self.kv.rotate:
                query, key = hadamard(query, self.kv.rotate), hadamard(key, self.kv.rotate)
            key = convention.kv_fake_quantize(key, self.kv.symmetric, self.kv.k_clip)
            value = convention.kv_fake_quantize(value, self.kv.symmetric, self.kv.v_clip)
        ends = torch.tensor([steps])
        mixed = attend(query[None], key.movedim(1, 0)[None], value.movedim(1, 0)[None], ends, size**-0.5)
        return mixed[0].flatten(1).to(x1.dtype)

    def rotary(self, x: Tensor) -> Tensor:
        """Rotary position embedding of x [T, heads, d], halves convention."""
        cos, sin = (t[: x.shape[0], None].to(x) for t in (self.cos, self.sin))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def mlp_input(self, x3: Tensor, linear: Linear) -> Tensor:
        """x4, the input of down_proj."""
        return torch.nn.functional.silu(linear("mlp.gate_proj", x3)) * linear("mlp.up_proj", x3)

    def layer(self, tensors: dict[str, Tensor], h: Tensor, linear: Linear) -> Tensor:
        """The whole layer, h [T, hidden] to h' [T, hidden]."""
        x2 = self.attention(tensors, self.norm(h, tensors["input_layernorm.weight"]), linear)
        h = h + linear("self_attn.o_proj", x2)
        x4 = self.mlp_input(self.norm(h, tensors["post_attention_layernorm.weight"]), linear)
        return h + linear("mlp.down_proj", x4)


def float_linear(tensors: dict[str, Tensor], r4: int) -> Linear:
    """Linears in the precision of the tensors, with the online R4 before down_proj."""

    def linear(name: str, x: Tensor) -> Tensor:
        if r4 and name == "mlp.down_proj":
            x = hadamard(x, r4)
        return torch.nn.functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    return linear
