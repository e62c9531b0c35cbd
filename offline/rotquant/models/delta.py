"""Linear attention by the gated delta rule: what a layer of it is, and how it computes.

With x the rows behind the layer's norm, heads h of key size d_k and value size d_v, and a state S_h [d_k, d_v] that a
token finds as the one before it left it:

    (q, k, v) = silu(conv(in_qkv x))         conv: causal over the last few tokens, each channel by itself
    z = in_z x;   β = sigmoid(in_b x);   g = -exp(A) softplus(in_a x + dt)           β and g: one number a value head
    q, k of length 1 in each head, q times d_k^-½; a key head serves value heads that are neighbours
    S ← exp(g) S;   S ← S + kᵀ β (v - k S);   y = q S
    out = out_proj (norm(y) silu(z))         norm: RMSNorm over d_v, its gain shared by the heads

What folds into it: the gain before it and R1 into in_qkv, in_z, in_b and in_a, R1 into out_proj. Nothing goes from v to
out_proj as from an attention's values: each channel of y meets a factor of its own, silu(z), behind a norm, and on the
way in each channel of v a convolution and silu. So there is no R2 and no S_ov, and no S_qk where q and k are normed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotquant.errors import RotQuantError
from rotquant.models.attention import Shape

Linear = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class DeltaNet:
    """A layer of linear attention; modules of transformers' model, less the layer's prefix."""

    module: str
    norm: str
    mixed: str  # q, k and v of all heads, one below the other
    gate: str
    beta: str
    decay: str
    output: str
    key_heads: int
    value_heads: int
    key_dim: int  # of a head
    value_dim: int
    width: int  # tokens that the convolution sees

    @property
    def reads(self) -> tuple[str, ...]:
        """Linears that read the norm and are quantized."""
        return self.mixed, self.gate

    @property
    def full_precision(self) -> tuple[str, ...]:
        """Linears that read the norm and are not quantized: small, and what they say is exponentiated."""
        return self.beta, self.decay

    @property
    def head_norms(self) -> tuple[str, ...]:
        """RMSNorms of queries and keys that take factors; none here."""
        return ()

    @property
    def kept(self) -> tuple[str, ...]:
        """Tensors that stay as the files have them, bit for bit."""
        return tuple(f"{self.module}.{leaf}" for leaf in ("A_log", "dt_bias", "conv1d.weight", "norm.weight"))

    @property
    def window(self) -> int | None:
        """Positions that a query sees at most; all, through its state."""
        return None

    @property
    def channels_of_head(self) -> int:
        return self.value_dim

    @property
    def channels(self) -> int:
        """Of what the output linear reads."""
        return self.value_heads * self.value_dim

    @property
    def numbers(self) -> int:
        """Numbers of a token between the linears."""
        return 2 * self.key_heads * self.key_dim + 2 * self.channels

    def shapes(self, hidden: int) -> dict[str, Shape]:
        """Outputs and inputs of the quantized linears."""
        mixed = 2 * self.key_heads * self.key_dim + self.channels
        return {
            self.mixed: (mixed, hidden), self.gate: (self.channels, hidden), self.output: (hidden, self.channels),
        }  # fmt: skip

    def small_shapes(self, hidden: int) -> dict[str, Shape]:
        """Outputs and inputs of the linears in full precision."""
        return dict.fromkeys(self.full_precision, (self.value_heads, hidden))


def delta_attention(block: DeltaNet, tensors: dict[str, Tensor], x: Tensor, linear: Linear, eps: float) -> Tensor:
    """What the output linear reads, x [..., T, hidden] to [..., T, value_heads * value_dim] in x's dtype.

    The recurrence is transformers' own, in float32 and in chunks of tokens.
    """
    read = (linear(name, x) for name in (block.mixed, block.gate, block.beta, block.decay))
    mixed, z, beta, decay = (y.reshape(-1, *y.shape[-2:]) for y in read)
    mixed = convolved(mixed, tensors[f"{block.module}.conv1d.weight"])
    keys = block.key_heads * block.key_dim
    q, k, v = mixed.split((keys, keys, block.channels), dim=-1)
    q, k = (part.unflatten(-1, (block.key_heads, -1)) for part in (q, k))
    served = block.value_heads // block.key_heads
    q, k = (part.repeat_interleave(served, dim=2) for part in (q, k))
    slope, offset = (tensors[f"{block.module}.{leaf}"].float() for leaf in ("A_log", "dt_bias"))
    decay = -slope.exp() * torch.nn.functional.softplus(decay.float() + offset)
    v, z = (part.unflatten(-1, (block.value_heads, -1)) for part in (v, z))
    y, _ = chunked_rule()(q, k, v, g=decay, beta=beta.sigmoid(), use_qk_l2norm_in_kernel=True)
    out = gated_norm(y, z, tensors[f"{block.module}.norm.weight"], eps)
    return out.reshape(*x.shape[:-1], block.channels)


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """silu of a causal convolution over time of each channel of x [B, T, C]; weight [C, 1, tokens], now the last."""
    channels, _, width = weight.shape
    y = torch.nn.functional.conv1d(x.mT.to(weight.dtype), weight, padding=width - 1, groups=channels)
    return torch.nn.functional.silu(y[..., : x.shape[1]]).mT.to(x.dtype)


def gated_norm(y: Tensor, z: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension times silu(z), in float32; y's dtype."""
    rows = y.float()
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    normed = gain * rows.to(y.dtype)
    return (normed * torch.nn.functional.silu(z.float())).to(y.dtype)


def chunked_rule() -> Callable[..., Any]:
    """transformers' gated delta rule.

    Raises:
        RotQuantError: this transformers has none.
    """
    try:
        from transformers.models.qwen3_5 import modeling_qwen3_5 as models
    except ImportError as error:
        raise RotQuantError("this transformers has no Qwen3.5, whose linear attention is computed by it") from error
    rule: Callable[..., Any] = models.torch_chunk_gated_delta_rule
    return rule
