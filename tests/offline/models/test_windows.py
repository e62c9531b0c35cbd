"""Sliding windows offline: which layers have one, what they compute, what a checkpoint says about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rotquant
from real_configs import CONFIGS
from rotquant.checkpoint.source import Source
from rotquant.errors import RotQuantError
from rotquant.gate import check_equivalence
from rotquant.models import Architecture, read_architecture
from rotquant.models.decoder import QUERIES, decoders
from rotquant.pipeline import quantize
from rotquant.transforms.fold import Fold
from rotquant.transforms.space import LayerTransforms, Transforms
from rotquant_kernels import ops, reference
from source_models import VOCABULARY, source_model

TOKENS = torch.arange(3, 83)
SECOND = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}  # only layers from 1 on
MODELS: dict[str, tuple[str, dict[str, Any], list[int | None]]] = {
    "Mistral": ("mistral", {"sliding_window": 20}, [20, 20]),
    "Ministral": ("ministral", {}, [24, None]),
    "Ministral 3": ("ministral3", {"sliding_window": 20}, [20, 20]),
    "Phi-3": ("phi3", {"sliding_window": 20}, [20, 20]),
    "Qwen2": ("qwen2", SECOND, [None, 20]),
    "Qwen2, all layers": ("qwen2", SECOND | {"max_window_layers": 0}, [20, 20]),
    "Qwen2, switched off": ("qwen2", SECOND | {"use_sliding_window": False}, [None, None]),
    "Qwen3": ("qwen3", SECOND, [None, 20]),
    "SmolLM3": ("smollm3", SECOND, [None, 20]),
    "Qwen2-MoE": ("qwen2_moe", SECOND, [20, None]),
    "Qwen3-MoE": ("qwen3_moe", SECOND, [20, 20]),
    "Mixtral": ("mixtral", {"sliding_window": 20}, [20, 20]),
}


def without_windows(arch: Architecture) -> Architecture:
    return replace(
        arch, kinds=tuple(replace(kind, attention=replace(kind.attention, window=None)) for kind in arch.kinds)
    )


def gate(folder: Path, arch: Architecture) -> float:
    transforms = Transforms(None, 0, [LayerTransforms() for _ in arch.kinds])
    return check_equivalence(Source(folder), arch, Fold(arch, transforms), TOKENS, lambda _: None)


@pytest.mark.parametrize("name", MODELS)
def test_layers_have_the_windows_that_transformers_gives_them(tmp_path: Path, name: str) -> None:
    """The gate lets them pass, and nothing without them."""
    kind, config, expected = MODELS[name]
    folder = source_model(tmp_path / "model", kind, **config)
    arch = read_architecture(folder)
    assert [layer.attention.window for layer in arch.kinds] == expected
    assert gate(folder, arch) < 1e-5
    if any(expected):
        with pytest.raises(RotQuantError, match=f"layer {expected.index(next(filter(None, expected)))} of the folded"):
            gate(folder, without_windows(arch))


@pytest.mark.parametrize(
    "name", ["Ministral-8B-Instruct-2410, windows by layer", "Ministral-8B, saved by transformers 5"]
)
def test_interleaved_windows_of_a_published_model(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    arch = read_architecture(tmp_path)
    assert [kind.attention.window for kind in arch.kinds] == [None, *[32768] * 3] * 9
    assert arch.kinds[1] is arch.kinds[2]


def said_by(tmp_path: Path, kind: str, **config: Any) -> dict[str, Any]:
    return dict(read_architecture(source_model(tmp_path / "model", kind, **config)).served)


def test_a_checkpoint_says_what_both_engines_read(tmp_path: Path) -> None:
    """By layers where they differ: vLLM's Qwen2 asks for max_window_layers beyond the last of them."""
    assert said_by(tmp_path, "qwen2", **SECOND) == {
        "layer_types": ["full_attention", "sliding_attention"], "max_window_layers": 2,
    }  # fmt: skip
    assert said_by(tmp_path, "mistral", sliding_window=20) == {}
    assert said_by(tmp_path, "ministral")["architectures"] == ["MistralForCausalLM"]


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    assert said_by(tmp_path, "phi3", sliding_window=512) == {"sliding_window": None}
    assert said_by(tmp_path, "phi3", sliding_window=511) == {}
    for kind, config in (("qwen2", SECOND), ("ministral", {})):
        said = said_by(tmp_path, kind, **config | {"sliding_window": 512})
        assert said["layer_types"] == ["full_attention"] * 2
        assert "sliding_window" not in said


def test_attention_that_tokens_get_ends_with_the_window(tmp_path: Path) -> None:
    """Over a window of one token every token gets what it gives itself."""
    arch = read_architecture(source_model(tmp_path / "model", "mistral", sliding_window=1))
    tensors = Source(tmp_path / "model").layer("model.layers.0.")
    decoder = decoders(arch, 9)[0]
    received = decoder.attention_received(tensors, torch.randn(9, 96), decoder.float_linear(tensors))
    assert torch.allclose(received, torch.ones(9))


@pytest.mark.parametrize("window", [4096, 70])
def test_attention_that_tokens_get_is_that_of_all_queries(tmp_path: Path, window: int) -> None:
    """Of more tokens than are looked at together; each row of the matrix of attention sums to 1."""
    steps = 2 * QUERIES + 9
    arch = read_architecture(source_model(tmp_path / "model", "mistral", sliding_window=window))
    tensors, decoder = Source(tmp_path / "model").layer("model.layers.0."), decoders(arch, steps)[0]
    attention, linear, x = decoder.kind.attends, decoder.float_linear(tensors), torch.randn(steps, 96)
    assert attention
    query, key = (linear(name, x) for name in (attention.query, attention.key))
    query, key = decoder.behind_rope(tensors, query.unflatten(-1, (-1, attention.head_dim)), key, attention)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    distance = torch.arange(steps)[:, None] - torch.arange(steps)
    seen = (distance >= 0) & (distance < window)
    scores = torch.einsum("qhd,khd->hqk", query, key) * attention.scale
    expected = scores.masked_fill(~seen, float("-inf")).softmax(-1).mean(0).sum(0)
    received = decoder.attention_received(tensors, x, linear)
    torch.testing.assert_close(received, expected, rtol=1e-4, atol=1e-5)
    assert abs(received.sum().item() / steps - 1) < 1e-4


@pytest.mark.parametrize("name", ["Qwen2", "Ministral", "Qwen2-MoE"])
def test_a_loaded_checkpoint_attends_and_generates_within_its_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In one pass, and token by token over transformers' cache, which keeps no more than a window."""
    monkeypatch.setattr(
        ops, "kv4_attention", reference.kv4_attention
    )  # whose numbers do not depend on where pages begin
    kind, config, _ = MODELS[name]
    out = quantize(str(source_model(tmp_path / "model", kind, **config)), tmp_path / "out", recipe="rtn")
    model, tokens = rotquant.load(out), torch.randint(VOCABULARY, (1, 70), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = model(tokens).logits[0]
        step = model(tokens[:, :40], use_cache=True)
        found, cache = [step.logits[0]], step.past_key_values
        for token in tokens[0, 40:]:
            step = model(token[None, None], past_key_values=cache, use_cache=True)
            found.append(step.logits[0])
    close = (torch.cat(found) - whole).norm(dim=1) / whole.norm(dim=1)
    assert close.median() < 1e-4  # a window that is off by one moves half of the tokens
    assert close.max() < 0.5  # a rounding that falls otherwise moves a token, and those behind it, by a third
    edit = json.loads((out / "config.json").read_text())
    edit["layer_types"] = ["full_attention"] * 2
    (out / "config.json").write_text(json.dumps(edit))
    with torch.inference_mode():
        apart = (rotquant.load(out)(tokens).logits[0] - whole).norm(dim=1) / whole.norm(dim=1)
    assert apart[:20].max() < 1e-4
    assert apart[30:].min() > 1e-2
