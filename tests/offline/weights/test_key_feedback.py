"""Keys with error feedback: F is what least squares says, for queries wherever they stand, and scores come nearer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rotquant
from rotquant.checkpoint.source import Source
from rotquant.errors import RotQuantError
from rotquant.models import read_architecture
from rotquant.models.decoder import decoders
from rotquant.pipeline import quantize
from rotquant.run import Settings, prepare
from rotquant.weights import key_feedback
from rotquant_kernels import reference
from rotquant_kernels.formats import RowFormat, feedback
from source_models import source_model

KEYS = RowFormat(4, False, 0.95, torch.float16)
ROTARY = [("llama", 32), ("phi3", 24), ("smollm3", 0)]  # channels that turn: all, some, none
WINDOWS = {"samples": 4, "seq_len": 32}


def queries(heads: int, size: int, seed: int) -> Tensor:
    """Correlated, as queries are: float64 [heads, 4 size, size]."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(heads, size, size, generator=generator, dtype=torch.float64)
    strengths = torch.logspace(0, -1.5, size, dtype=torch.float64)
    return torch.randn(heads, 4 * size, size, generator=generator, dtype=torch.float64) * strengths @ mixed


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.sampled_from([(16, 0), (16, 16), (24, 8)]))
def test_what_is_passed_on_leaves_the_least_error_of_scores(seed: int, size: tuple[int, int]) -> None:
    """Of errors (e_j, v) over the channels from j on, e_j = 1, v = F_j is where the gradient of e H eᵀ is 0."""
    dim, r3 = size
    q = queries(2, dim, seed)
    found = key_feedback.factor(q.mT @ q, r3).double()
    h = reference.hadamard(q, r3) if r3 else q
    h = h.mT @ h
    damping = key_feedback.DAMPING * h.diagonal(dim1=1, dim2=2).mean(1)
    h += damping[:, None, None] * torch.eye(dim, dtype=h.dtype)
    assert torch.equal(found.tril(), torch.eye(dim).double().expand(2, -1, -1))
    for j in range(dim - 1):
        gradient = h[:, j + 1 :, j:] @ found[:, j, j:, None]
        assert gradient.abs().max() < 1e-4 * h.abs().max()


def test_scores_come_nearer_and_nothing_changes_where_channels_are_alike() -> None:
    q = queries(2, 32, seed=1)
    x = torch.randn(200, 2, 32, generator=torch.Generator().manual_seed(2))
    passed = key_feedback.factor(q.mT @ q, 0)
    errors = [
        ((back - x).double().movedim(1, 0) @ q.mT).square().mean()
        for back in (KEYS.fake_quantize(x), feedback.fake_quantize(x, KEYS, passed))
    ]
    assert errors[1] < 0.4 * errors[0]
    alike = key_feedback.factor(torch.eye(32).expand(2, -1, -1).double(), 0)
    assert torch.equal(feedback.fake_quantize(x, KEYS, alike), KEYS.fake_quantize(x))


@pytest.mark.parametrize(("kind", "rotary"), ROTARY)
def test_moments_are_those_of_queries_at_all_positions(
    kind: str, rotary: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over positions of E yᵀ y, y turned by the model's own RoPE, is `turned` of E xᵀ x."""
    monkeypatch.setattr(key_feedback, "POSITIONS", 50)
    arch = read_architecture(source_model(tmp_path / "model", kind))
    index = next(i for i, layer in enumerate(arch.kinds) if layer.attends and layer.attends.rotary == rotary)
    decoder = replace(decoders(arch, 41)[index], longest=40)
    attention = decoder.kind.attends
    assert attention
    x = queries(attention.kv_heads, attention.head_dim, seed=3)  # [kv_heads, n, d]
    moments = []
    for place in (40 ** torch.linspace(0, 1, 50, dtype=torch.float64)).floor().long().tolist():
        tokens = x.movedim(1, 0)[:, None].expand(-1, place + 1, -1, -1)  # [n, T, kv_heads, d]
        y = decoder.rotary(tokens, attention)[:, place]
        moments.append(torch.einsum("nhi,nhj->hij", y, y))
    expected = torch.stack(moments).mean(0)
    found = key_feedback.turned(x.mT @ x, decoder, attention)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "kind", ["qwen3", "phi3", "qwen3_5"]
)  # norms of queries; one tensor for q, k, v; gates, hybrid
def test_a_model_is_served_as_it_was_calibrated(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F is stored beside what makes keys, each layer that attends has one of its own, and without it nothing loads."""
    seen: list[Tensor] = []
    factor = key_feedback.factor
    monkeypatch.setattr(key_feedback, "factor", lambda *given: seen.append(factor(*given)) or seen[-1])
    source = source_model(tmp_path / "model", kind)
    out = quantize(str(source), tmp_path / "out", recipe="quarot", settings=["kv.key_feedback=true"], **WINDOWS)
    model = rotquant.load(out)
    arch = read_architecture(source)
    for (name, maker), made in zip(arch.key_makers.items(), seen, strict=True):
        assert torch.equal(model.get_submodule(name).rotquant_feedback, made)
        assert torch.equal(Source(out).get(f"{maker}.key_feedback"), made.flatten(0, 1))
        assert made.triu(1).abs().max() > 0.01
    for other in seen[1:]:
        assert not torch.equal(other, seen[0])


def test_keys_that_are_not_rounded_have_no_feedback(tmp_path: Path) -> None:
    source = str(source_model(tmp_path / "model", "llama"))
    with pytest.raises(RotQuantError, match=r"kv.key_feedback is of keys that are rounded .* set kv.bits=4, or"):
        prepare(source, Settings("quarot", ("kv.bits=16", "kv.key_feedback=true"), **WINDOWS))
    for changes, tried in ((("kv.bits=16",), False), ((), True)):
        recipe = prepare(source, Settings("best", changes, **WINDOWS)).recipe
        assert ("kv.key_feedback" in str(recipe.choose)) is tried


def test_weights_rounded_to_nearest_have_it_too(tmp_path: Path) -> None:
    """These need no inputs, F does."""
    source = source_model(tmp_path / "model", "llama")
    out = quantize(str(source), tmp_path / "out", recipe="rtn", settings=["kv.key_feedback=true"], **WINDOWS)
    model = rotquant.load(out)
    assert model.model.layers[1].self_attn.rotquant_feedback.triu(1).abs().max() > 0.01
