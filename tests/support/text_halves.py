"""A model of text and images beside its text half: both come out as the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from rotquant.checkpoint.source import Source
from rotquant.pipeline import quantize


def quantized_alike(source: Path, whole: Path, work: Path) -> Path:
    """Quantizes the text model `source` and the `whole` that holds it; returns the latter's checkpoint."""
    alone, half = (
        quantize(str(folder), work / f"{folder.name}-out", recipe="quarot", settings=["weights.method=rtn"])
        for folder in (source, whole)
    )
    one, two = Source(alone), Source(half)
    assert one.files.keys() == two.files.keys()
    assert [name for name in one.files if not torch.equal(one.get(name), two.get(name))] == []
    return half
