"""Factors of keys that a calibration sample gives: scores stay what they are, and a 4-bit cache changes them less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rotquant.checkpoint.layers import read_layer
from rotquant.checkpoint.original import read_original
from rotquant.learn.key_scale import key_scale
from rotquant.models.decoder import decoders, kv4_cache
from rotquant.transforms.fold import fold_layer
from rotquant.transforms.space import LayerTransforms
from rotquant.weights import key_feedback
from rotquant_kernels import reference
from rotquant_kernels.formats import KVFormat
from source_models import source_model

TOKENS = 96


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3"])
def test_scores_of_a_cache_in_4_bits_are_nearer(tmp_path: Path, name: str) -> None:
    """Where a pair of channels holds large keys: by their bias, by the norm behind them, which all heads share, or by
    the weights, with RoPE on a part of the channels."""
    arch, source = read_original(source_model(tmp_path / name, name))
    index = next(i for i, kind in enumerate(arch.kinds) if kind.attends)
    kind, attention = arch.kinds[index], arch.kinds[index].attends
    assert attention
    tensors = {n: t.double() for n, t in read_layer(source, arch, index).items()}
    for channel in (1, 1 + attention.rotary // 2):
        if attention.key_norm:
            tensors[f"{attention.key_norm}.weight"][channel] = 20
        elif f"{attention.key}.bias" in tensors:
            tensors[f"{attention.key}.bias"][channel] = 20
        else:
            tensors[f"{attention.key}.weight"][channel] *= 20
    x = torch.randn(TOKENS, kind.hidden, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = key_scale(kind, attention, tensors, x)
    assert s.shape == (1 if attention.key_norm else attention.kv_heads, attention.qk_factors)
    assert s.log().mean(-1).abs().max() < 1e-12
    decoder = decoders(arch, TOKENS)[index]
    form = kv4_cache(KVFormat(False, 0.95, 0.95, attention.head_dim))

    def scores(held: dict[str, Tensor], cached: bool) -> Tensor:
        linear = decoder.float_linear(held)
        query, _ = decoder.query_and_gate(linear(attention.query, x), attention)
        q, k = decoder.behind_rope(held, query, linear(attention.key, x), attention)
        if cached:
            q, k, _ = form(q, k, k)
        return torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(attention.heads // attention.kv_heads, dim=1))

    exact, folded = scores(tensors, False), fold_layer(tensors, LayerTransforms(s_qk=s), kind)
    assert (scores(folded, False) - exact).norm() < 1e-5 * exact.norm()
    plain, smooth = ((scores(held, True) - exact).norm() for held in (tensors, folded))
    assert smooth < 0.7 * plain


def test_keys_of_one_energy_have_the_nearest_scores_with_feedback(tmp_path: Path) -> None:
    arch, source = read_original(source_model(tmp_path / "llama", "llama"))
    kind, attention = arch.kinds[0], arch.kinds[0].attends
    assert attention
    tensors = {n: t.double() for n, t in read_layer(source, arch, 0).items()}
    wide = torch.logspace(0, 1, attention.head_dim // 2, dtype=torch.float64).repeat(2 * attention.kv_heads)
    tensors[f"{attention.key}.weight"] *= wide[:, None]
    x = torch.randn(TOKENS, kind.hidden, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    decoder = decoders(arch, TOKENS)[0]
    form = KVFormat(False, 0.95, 0.95, attention.head_dim, feedback=True)

    def error(s: Tensor | None) -> Tensor:
        """Of scores, and energies of the channels of keys."""
        held = fold_layer(tensors, LayerTransforms(s_qk=s), kind)
        linear = decoder.float_linear(held)
        query, _ = decoder.query_and_gate(linear(attention.query, x), attention)
        q, k = decoder.behind_rope(held, query, linear(attention.key, x), attention)
        moments = key_feedback.turned(key_feedback.moments(decoder, attention, held, x, linear), decoder, attention)
        _, cached, _ = kv4_cache(form, key_feedback=key_feedback.factor(moments, form.rotate))(q, k, k)
        difference = reference.hadamard(cached, form.rotate) - k
        group = attention.heads // attention.kv_heads
        return torch.einsum("qhd,khd->hqk", q, difference.repeat_interleave(group, dim=1)).square().mean()

    flat = key_scale(kind, attention, tensors, x, flat=True)
    keys = torch.nn.functional.linear(
        x, fold_layer(tensors, LayerTransforms(s_qk=flat), kind)[f"{attention.key}.weight"]
    )
    energies = keys.square().mean(0).view(attention.kv_heads, 2, -1).mean(1)
    assert torch.allclose(energies, energies.mean(1, keepdim=True).expand_as(energies), rtol=1e-4)
    assert error(flat) < 0.7 * error(None)
