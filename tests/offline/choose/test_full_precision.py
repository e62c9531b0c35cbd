"""KL to the full-precision model from two numbers and a row of each of its tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rotquant.checkpoint.original import read_original
from rotquant.choose import full_precision
from rotquant.choose.full_precision import FullPrecision
from rotquant.common.devices import Devices
from rotquant.measure.evaluate import load_any
from source_models import source_model


@pytest.mark.parametrize("slices", [7, 10_000])
def test_kl_is_that_of_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slices: int) -> None:
    """In any slices of rows and vocabulary, against the model's own logits; 0 to itself, however near."""
    monkeypatch.setattr(full_precision, "LOGIT_ROWS", slices)
    monkeypatch.setattr(full_precision, "VOCABULARY_ROWS", 3 * slices)
    folder = source_model(tmp_path / "model", "llama", initializer_range=0.3)
    arch, source = read_original(folder)
    full, windows = FullPrecision(source, arch, Devices("cpu"), 20), torch.arange(40).view(2, 20)
    chain = full.embedded(windows)
    for index in range(arch.layers):
        chain = full.layer(index, chain)
    other = chain + chain.std() * torch.randn(chain.shape, generator=torch.Generator().manual_seed(0))
    model = load_any(folder)
    with torch.no_grad():
        p = model(windows).logits[:, :-1].log_softmax(-1)
        q = model.lm_head(model.model.norm(other))[:, :-1].log_softmax(-1)
    wanted = full.wanted(chain)
    expected = (p.exp() * (p - q)).sum(-1).flatten()
    assert expected.mean() > 1e-3
    torch.testing.assert_close(full.kl(wanted, other), expected, rtol=1e-3, atol=2e-5)
    assert full.kl(wanted, chain).abs().max() < 2e-5
