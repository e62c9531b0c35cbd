"""One decoder layer as it will be served, on one device: the ops, formats and weights of the server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rotquant.checkpoint.packed import PackedLinear
from rotquant.models import Tensors
from rotquant.models.decoder import Cache, Decoder, bias_of
from rotquant.weights.low_rank import without
from rotquant_kernels import Stage, linear, transform
from rotquant_kernels.formats import RowFormat


@dataclass(frozen=True)
class ServedLayer:
    """The layer as far as its linears are quantized.

    Args:
        decoder: how it computes; tensors: norms and biases; stages: of each site; all on the device.
        rows: what the rows of a site are rounded to; cache: the KV cache, None for one that is not quantized.
        done: the quantized linears; directions: D [K, r] of the sites whose low-rank branch takes them off the inputs.
    """

    decoder: Decoder
    tensors: Tensors
    stages: dict[str, list[Stage]]
    rows: Callable[[str], RowFormat]
    cache: Cache | None
    done: dict[str, PackedLinear] = field(default_factory=dict)
    directions: Tensors = field(default_factory=dict)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """The served op on the packed weights; a router in full precision."""
        if name not in self.decoder.kind.site_of:
            return torch.nn.functional.linear(x, self.tensors[f"{name}.weight"])
        packed, site = self.done[name], self.decoder.kind.site_of[name]
        return linear(
            x, packed.prepared, packed.scale, bias_of(self.tensors, name), packed.form, self.stages.get(site, []),
            self.rows(site), packed.down, packed.up, low_rank_subtracts=site in self.directions,
        )  # fmt: skip

    def inputs(self, site: str, x: Tensor, norm: str = "") -> Tensor:
        """What the linears of a site round, float32: x, behind a norm if named, behind its stages and directions."""
        y = transform(self.normed(norm, x) if norm else x, self.stages.get(site, [])).float()
        return without(y, self.directions[site]) if site in self.directions else y

    def normed(self, norm: str, h: Tensor) -> Tensor:
        """What the linears behind a norm read."""
        return self.decoder.norm(h, self.tensors[f"{norm}.weight"])

    def attention(self, h: Tensor) -> Tensor:
        """What o reads."""
        x = self.normed(self.decoder.kind.attention.norm, h)
        return self.decoder.attention(self.tensors, x, self.linear, self.cache)

    def mlp_input(self, h: Tensor) -> Tensor:
        """What down reads, from the residual stream behind attention."""
        return self.decoder.mlp_input(self.normed(self.decoder.kind.mlp.norm, h), self.linear)

    def layer(self, h: Tensor) -> Tensor:
        """The whole layer, h to h', once all its linears are quantized."""
        return self.decoder.layer(self.tensors, h, self.linear, self.cache)

    def write(self, name: str, h: Tensor, x: Tensor) -> Tensor:
        """The residual stream after a linear has written what it makes of x."""
        return self.decoder.write(self.tensors, h, name, self.linear(name, x))
