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
