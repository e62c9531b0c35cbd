"""What others are compared to: the full-precision model over windows, a layer at a time, and the KL to it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rotquant.checkpoint.layers import read_gain, read_layer
from rotquant.checkpoint.source import Source
from rotquant.common.devices import Devices
from rotquant.learn.stream import forward
from rotquant.models import Architecture
from rotquant.models.decoder import decoders, rms_norm
from rotquant.models.expert_tensors import each
from rotquant.transforms.fold import VOCABULARY_ROWS

LOGIT_ROWS = 512


class FullPrecision:
    """Chains are float32 [n, T, hidden] on the CPU, in the model's own basis.

    Args:
        positions: tokens of the longest window; devices: over which the windows are spread.
    """

    def __init__(self, source: Source, arch: Architecture, devices: Devices, positions: int) -> None:
        self.source, self.arch, self.devices = source, arch, devices
        self.decoders, self.device = decoders(arch, positions), devices.first

    def embedded(self, windows: Tensor) -> Tensor:
        """What enters layer 0 of windows int64 [n, T]."""
        rows = self.source.get(self.arch.names.embedding)[windows]
        return rows.float() * self.arch.embedding_factor(rows.dtype)

    def layer(self, index: int, chain: Tensor) -> Tensor:
        """The chain after a layer."""
        read = read_layer(self.source, self.arch, index)
        tensors = each(read, lambda tensor: tensor.float().to(self.device))
        return forward(self.devices, self.decoders[index].on(self.device), tensors, chain)

    def kl(self, full: Tensor, quantized: Tensor) -> Tensor:
        """KL float32 [n (T - 1)] of each predicted token, from the chains behind the last layer."""
        return torch.cat([self._kl(p, q) for p, q in zip(full, quantized, strict=True)])

    def _kl(self, full: Tensor, quantized: Tensor) -> Tensor:
        """KL [T - 1] of one window [T, hidden] each."""
        pairs = zip(*(h[:-1].split(LOGIT_ROWS) for h in (full, quantized)), strict=True)
        rows = []
        for p, q in pairs:
            p, q = (torch.cat(list(self._logits(h)), -1).log_softmax(-1) for h in (p, q))
            rows.append((p.exp() * (p - q)).sum(-1))
        return torch.cat(rows).cpu()

    def _logits(self, h: Tensor) -> Iterator[Tensor]:
        """float32 logits of rows h [n, hidden], the vocabulary in slices."""
        names, source, device = self.arch.names, self.source, self.device
        normed = rms_norm(h.to(device), read_gain(source, self.arch).float().to(device), self.arch.eps)
        head = source.get(names.embedding if self.arch.tied else names.head)
        for rows in head.split(VOCABULARY_ROWS):
            yield (normed / self.arch.logits_divisor) @ rows.float().to(device).T
