"""Running statistics of one site: rows in, figures out, memory bounded whatever the number of tokens.

Kept for a site of G heads (1 for a linear's input) of width d: sums of the per-row figures, channel sums [G, d], the
second moments [G, d, d] up to `QSUR_WIDTH`, one peak a token, and |x| of the first tokens for the landscape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotquant.common import metrics
from rotquant_kernels.formats import RowFormat

QSUR_WIDTH = 1024  # wider sites get no QSUR: their second moments would not fit in memory for all layers
LANDSCAPE_TOKENS, LANDSCAPE_BINS = 64, 192
SHOWN = 16  # positions of massive tokens that are listed


@dataclass(frozen=True)
class SiteFormat:
    """How rows of a site are quantized, `rows` None: not at all. `rotate`: Hadamard block of R3; `heads`: of K or V."""

    rows: RowFormat | None = None
    heads: bool = False
    rotate: int = 0

    def facts(self) -> dict[str, Any]:
        """As `inspection` reports it."""
        rows = self.rows or RowFormat()
        bits = self.rows.bits if self.rows else 16
        return {"bits": bits, "symmetric": rows.symmetric, "clip": rows.clip, "rotate": self.rotate}


class SiteStatistics:
    """Figures of one site of one layer.

    Args:
        quantized: the site's format.
    """

    def __init__(self, quantized: SiteFormat) -> None:
        self.format = quantized
        self.sums: dict[str, Tensor] = {}
        self.rows = 0
        self.peaks: list[Tensor] = []
        self.channels: list[Tensor] = []
        self.landscape: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Takes the rows of one window, float [T, G, d]."""
        x = x.detach().float()
        unit = metrics.unit_rows(x)
        figures = {
            "peak_to_rms": metrics.peak_to_rms(x),
            "gsr": metrics.gsr(x, (self.format.rows or RowFormat()).step(x)),
            "kurtosis": metrics.kurtosis(x),
        }
        if self.format.rows:
            figures["error"] = metrics.relative_error(x, self.format.rows.fake_quantize(x))
        shaped = x.amax(-1) > x.amin(-1)  # rows of one value, zero above all, have no shape
        sums = {name: figure.where(shaped, 0).sum(0) for name, figure in figures.items()}
        sums |= {"shaped": shaped.sum(0), "first": unit.sum(0), "second": unit.square().sum(0)}
        if x.shape[2] <= QSUR_WIDTH:
            rows = unit.movedim(1, 0)  # [G, T, d]
            sums["moments"] = rows.mT @ rows
        for name, value in sums.items():
            value = value.cpu() if name == "moments" else value.double().cpu()  # those are large
            self.sums[name] = self.sums[name].add_(value) if name in self.sums else value
        self.rows += len(x)
        magnitude = x.abs().flatten(1)
        peak, channel = magnitude.max(-1)
        self.peaks.append(peak.cpu())
        self.channels.append(channel.int().cpu())
        if self.landscape is None:
            self.landscape = _binned(magnitude[:LANDSCAPE_TOKENS] / metrics.rms(x.flatten(1)).median()).cpu()

    def summary(self, tokens: Tensor) -> dict[str, Any]:
        """The figures as plain numbers; see `rotquant.measure.inspection` for their names.

        Args:
            tokens: int64 [windows, T], the tokens of all rows.
        """
        out: dict[str, Any] = {
            name: _plain(self._mean(name).mean().item()) for name in ("peak_to_rms", "gsr", "kurtosis")
        }
        out["difficulty"] = _plain(metrics.difficulty(self.sums["second"].sqrt()).mean().item())
        out["common"] = _plain((self.sums["first"] / self.sums["shaped"].unsqueeze(-1)).square().mean().item())
        out["qsur"] = self._qsur()
        out["snr"] = out["heads"] = None
        if self.format.rows:
            error = self._mean("error")
            out["snr"] = _plain(metrics.snr_db(error.mean().item()))
            out["heads"] = [_plain(metrics.snr_db(head)) for head in error.tolist()] if self.format.heads else None
        return out | {"massive": self._massive(tokens)}

    def _mean(self, name: str) -> Tensor:
        """Mean over rows of a figure, float64 [G]."""
        return self.sums[name] / self.sums["shaped"]

    def _qsur(self) -> float | None:
        if "moments" not in self.sums or self.rows <= self.sums["first"].shape[1]:
            return None
        mean = self.sums["first"] / self.rows
        covariance = self.sums["moments"].double() / self.rows - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        return _plain(metrics.qsur(mean, covariance).mean().item())

    def _massive(self, tokens: Tensor) -> dict[str, Any]:
        peaks, channels = torch.cat(self.peaks), torch.cat(self.channels)
        found = metrics.massive(peaks)
        length, top = tokens.shape[1], int(peaks.argmax())
        positions, counts = (found % length).unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)[:SHOWN]
        return {
            "count": len(found),
            "positions": [[int(positions[i]), int(counts[i])] for i in order],
            "largest": _plain(peaks[top].item()),
            "median": _plain(peaks.median().item()),
            "position": top % length,
            "token": int(tokens.flatten()[top]),
            "channel": int(channels[top]),
        }


def _plain(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _binned(magnitude: Tensor) -> Tensor:
    """Maxima of neighbouring channels, so that no outlier is lost: [T, K] to at most LANDSCAPE_BINS columns."""
    if magnitude.shape[1] <= LANDSCAPE_BINS:
        return magnitude
    bins = torch.nn.functional.adaptive_max_pool1d(magnitude.unsqueeze(1), LANDSCAPE_BINS)
    return bins.squeeze(1)
