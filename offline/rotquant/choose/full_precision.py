"""What others are compared to: the full-precision model over windows, a layer at a time, and the KL to it.

With logits x Wᵀ of what the head reads, x, and the full-precision distribution p

    KL = Σ p log p - Σ p x Wᵀ + log Σ exp(x Wᵀ),    Σ p x Wᵀ = x m,   m = Σ p_i W_i

so that of p two numbers and a row of each token are kept, and p is computed once for all that are compared to it.
With a soft cap on logits the middle identity does not hold: then the chain itself is kept, and p computed each time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rotquant.checkpoint.layers import read_gain, read_layer
from rotquant.checkpoint.source import DTYPES, Source
from rotquant.common.devices import Devices
from rotquant.learn.stream import forward, product_dtype
from rotquant.models import Architecture
from rotquant.models.decoder import capped, decoders, rms_norm
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

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of what `wanted` finds."""
        return ("entropy", "mean") if self.arch.logits_cap is None else ("chain",)

    def embedded(self, windows: Tensor) -> Tensor:
        """What enters layer 0 of windows int64 [n, T]."""
        rows = self.source.get(self.arch.names.embedding)[windows]
        return rows.float() * self.arch.embedding_factor(rows.dtype)

    def layer(self, index: int, chain: Tensor) -> Tensor:
        """The chain after a layer."""
        read = read_layer(self.source, self.arch, index)
        tensors = each(read, lambda tensor: tensor.float().to(self.device))
        compute = product_dtype(DTYPES[self.source.dtypes[self.arch.names.embedding]], self.device)
        return forward(self.devices, self.decoders[index].on(self.device), tensors, chain, compute=compute)

    def wanted(self, chain: Tensor) -> dict[str, Tensor]:
        """Σ p log p [n, T - 1] and m [n, T - 1, hidden], float32, of the chain behind the last layer."""
        if self.arch.logits_cap is not None:
            return {"chain": chain}
        entropy, mean = zip(*map(self._wanted, chain), strict=True)
        return {"entropy": torch.stack(entropy), "mean": torch.stack(mean)}

    def _wanted(self, h: Tensor) -> tuple[Tensor, Tensor]:
        entropies, means = [], []
        for x in self._read(h):
            log_p = torch.cat([x @ rows.T for rows in self._head()], -1).log_softmax(-1)
            p = log_p.exp()
            entropies.append((p * log_p).sum(-1).cpu())
            parts = zip(p.split(VOCABULARY_ROWS, dim=-1), self._head(), strict=True)
            means.append(torch.stack([part @ rows for part, rows in parts]).sum(0).cpu())
        return torch.cat(entropies), torch.cat(means)

    def kl(self, wanted: dict[str, Tensor], chain: Tensor) -> Tensor:
        """KL float32 [n (T - 1)] of each predicted token: `wanted` to what another chain behind the last layer says."""
        if self.arch.logits_cap is not None:
            return torch.cat([self._capped_kl(p, q) for p, q in zip(wanted["chain"], chain, strict=True)])
        found = []
        for entropy, mean, h in zip(wanted["entropy"], wanted["mean"], chain, strict=True):
            parts = zip(entropy.split(LOGIT_ROWS), mean.split(LOGIT_ROWS), self._read(h), strict=True)
            for e, m, x in parts:
                total = torch.stack([(x @ rows.T).logsumexp(-1) for rows in self._head()]).logsumexp(0).cpu()
                found.append(e - (m.double() * x.cpu()).sum(-1) + total)
        return torch.cat(found).clamp(min=0).float()

    def _capped_kl(self, full: Tensor, other: Tensor) -> Tensor:
        """KL [T - 1] of one window from both streams [T, hidden] behind the last layer."""
        found = []
        for pair in zip(self._read(full), self._read(other), strict=True):
            logits = (capped(torch.cat([x @ rows.T for rows in self._head()], -1), self.arch.logits_cap) for x in pair)
            log_p, log_q = (z.log_softmax(-1) for z in logits)
            found.append((log_p.exp() * (log_p - log_q)).sum(-1).cpu())
        return torch.cat(found).clamp(min=0)

    def _read(self, h: Tensor) -> Iterator[Tensor]:
        """What the head reads of one window [T, hidden] for the tokens that it predicts, some rows at a time."""
        gain = read_gain(self.source, self.arch).float().to(self.device)
        for rows in h[:-1].split(LOGIT_ROWS):
            yield rms_norm(rows.to(self.device), gain, self.arch.eps) / self.arch.logits_divisor

    def _head(self) -> Iterator[Tensor]:
        """W float32 [vocabulary, hidden], in slices."""
        names = self.arch.names
        head = self.source.get(names.embedding if self.arch.tied else names.head)
        return (rows.float().to(self.device) for rows in head.split(VOCABULARY_ROWS))
