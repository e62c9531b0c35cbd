"""Quantizing a layer: how often it is computed, what its attention is, what a branch of its inputs spares."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from rotquant.measure.evaluate import load_any
from rotquant.models import decoder
from rotquant.models.decoder import Decoder, causal
from rotquant.pipeline import quantize
from source_models import source_model


def test_each_step_of_a_layer_is_computed_once_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    for name in ("attention", "mlp_input"):
        original = getattr(Decoder, name)

        def counted(*args: Any, original: Any = original, name: str = name, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(decoder.Decoder, name, counted)
    monkeypatch.setattr("rotquant.pipeline.check_equivalence", lambda *_: 0.0)  # it computes the layers as well
    source = source_model(tmp_path / "model", "phi3")
    quantize(str(source), tmp_path / "out", recipe="quarot", samples=3, seq_len=16)
    assert calls == {"attention": 2 * 3, "mlp_input": 2 * 3}


@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
def test_attention_is_its_definition_whatever_comes_before_the_tokens(lead: tuple[int, ...]) -> None:
    query, key, value = (torch.randn(*lead, 5, heads, 8) for heads in (4, 2, 2))
    found = causal(query, key, value, 0.3)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for head in range(4):
        q, k, v = query[..., head, :], key[..., head // 2, :], value[..., head // 2, :]
        weights = (0.3 * q @ k.mT).masked_fill(later, float("-inf")).softmax(-1)
        assert torch.allclose(found[..., head, :], weights @ v, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "gemma4", "qwen3_5"])
def test_a_branch_of_the_inputs_spares_their_rounding(tmp_path: Path, kind: str) -> None:
    """With GPTQ and its refit, which moves weights along directions that hardly any rounded input has; also where
    layers differ in size, and in front of linear attention."""
    source = source_model(tmp_path / "model", kind)
    ids, found = torch.arange(256).view(2, -1) % 200 + 20, []
    with torch.no_grad():
        exact = load_any(source)(ids).logits
        for name, more in (("plain", ()), ("branch", ("weights.rank=16", "weights.branch=pca"))):
            settings = ("weights.method=gptq", "kv.bits=16", *more)
            out = quantize(str(source), tmp_path / name, recipe="quarot", settings=settings, samples=8, seq_len=128)
            found.append((load_any(out)(ids).logits - exact).norm().item())
    assert found[1] < 0.95 * found[0]  # 1.8 where refit comes first
