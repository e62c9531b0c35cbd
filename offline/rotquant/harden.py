"""Make a small model as hard to quantize as a large one, without changing its function.

Small trained models have no outliers: plain round-to-nearest W4A4 costs them a few percent, so a test on them passes
with a rotation that is missing, transposed or folded into the wrong matrix. Large models have channels tens of times
larger than the others. The same invariances that rotations and scalings use can write such channels into any model.
With row tokens x, a linear computes W x, and s is the factor of one channel (a power of two, so nothing is rounded):

norm        W diag(1/s) (diag(s) g * x_hat) = W (g * x_hat): the gain's channel times s, the column of each linear that
            the norm feeds divided by s. The final norm takes part when lm_head is not tied to the embedding.
up, down    down diag(1/s) (act(gate x) * (diag(s) up x)) = down (act(gate x) * up x): the product is linear in up.
v, o        o diag(1/s) A (diag(s) v) = o A v: attention mixes tokens, not channels. All query heads that share a
            key-value head read the same v channels, hence the same columns of o_proj in each of them.
q, k        (diag(1/s) q) . (diag(s) k) = q . k. RoPE turns channels i and i + head_dim/2 into each other, so both
            share one s, and then the scaling commutes with it. With q_norm and k_norm (Qwen3), whose outputs do not
            depend on the scale of their inputs, the factors go to the norms' gains, which all heads share.

A fold of the norm gains undoes the first step exactly, whatever its strength. The other three survive a rotation in
part: a Hadamard transform spreads a channel's energy but cannot remove it, so `pair_strength` is much smaller.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


class _Picker:
    """Draws the channels to scale, in one reproducible sequence."""

    def __init__(self, seed: int, share: float) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.share = share

    def pick(self, width: int) -> torch.Tensor:
        """A random subset of range(width): the share, but at least one channel."""
        count = max(1, round(self.share * width))
        return torch.randperm(width, generator=self.generator)[:count]


def _power_of_two(strength: float) -> float:
    if not strength > 0:
        raise ValueError(f"a strength must be positive, got {strength}")
    return 2.0 ** round(math.log2(strength))


def _scale_rows(linear: nn.Linear, rows: torch.Tensor, factor: float) -> None:
    """Scale outputs of a linear: weight rows, and the bias that is added to them."""
    linear.weight[rows] *= factor
    if linear.bias is not None:
        linear.bias[rows] *= factor


def _harden_norm(norm: nn.Module, fed: list[nn.Linear], picker: _Picker, factor: float) -> None:
    gain = norm.weight
    assert isinstance(gain, torch.Tensor)
    channels = picker.pick(gain.numel())
    gain[channels] *= factor
    for linear in fed:
        linear.weight[:, channels] /= factor


def _harden_up_down(mlp: Any, picker: _Picker, factor: float) -> None:
    channels = picker.pick(mlp.up_proj.weight.shape[0])
    _scale_rows(mlp.up_proj, channels, factor)
    mlp.down_proj.weight[:, channels] /= factor


def _harden_attention(attention: Any, picker: _Picker, factor: float, kv_heads: int, group: int) -> None:
    """The v, o and the q, k pairs of one layer; `group` query heads share each key-value head."""
    head_dim = attention.head_dim
    for head in range(kv_heads):
        channels = picker.pick(head_dim)
        _scale_rows(attention.v_proj, head * head_dim + channels, factor)
        attention.o_proj.weight[:, _of_queries(head, group, head_dim, channels)] /= factor
    if hasattr(attention, "k_norm"):
        pairs = _paired(picker.pick(head_dim // 2), head_dim)
        attention.k_norm.weight[pairs] *= factor
        attention.q_norm.weight[pairs] /= factor
        return
    for head in range(kv_heads):
        pairs = _paired(picker.pick(head_dim // 2), head_dim)
        _scale_rows(attention.k_proj, head * head_dim + pairs, factor)
        _scale_rows(attention.q_proj, _of_queries(head, group, head_dim, pairs), 1.0 / factor)


def _paired(channels: torch.Tensor, head_dim: int) -> torch.Tensor:
    """RoPE's pairs: channel i turns with channel i + head_dim/2."""
    return torch.cat([channels, channels + head_dim // 2])


def _of_queries(kv_head: int, group: int, head_dim: int, channels: torch.Tensor) -> torch.Tensor:
    """These head channels in every query head that reads the given key-value head."""
    return torch.cat([query * head_dim + channels for query in range(kv_head * group, (kv_head + 1) * group)])


@torch.no_grad()
def harden(
    model: PreTrainedModel,
    *,
    seed: int = 0,
    strength: float = 30.0,
    channels: float = 0.02,
    pair_strength: float = 4.0,
) -> None:
    """Write outlier channels into the model, in place; its function stays the same.

    strength: factor of the norm channels; pair_strength: factor of the up/down, v/o and q/k channels (both are rounded
    to a power of two); channels: share of the channels of each site that is scaled, drawn anew for every site.
    """
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"cannot harden a {config.model_type!r} model; supported: {', '.join(ARCHITECTURES)}")
    picker = _Picker(seed, channels)
    factor, pair_factor = _power_of_two(strength), _power_of_two(pair_strength)
    decoder = model.get_decoder()
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _harden_norm(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], picker, factor)
        _harden_norm(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], picker, factor)
        _harden_up_down(mlp, picker, pair_factor)
        _harden_attention(attention, picker, pair_factor, config.num_key_value_heads, group)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, nn.Linear) and head.weight is not embedding.weight:
        _harden_norm(decoder.norm, [head], picker, factor)


def harden_folder(src: Path | str, dst: Path | str, **options: Any) -> None:
    """Harden a local Hugging Face folder into another one: safetensors in the same dtype, tokenizer files copied."""
    src, dst = Path(src), Path(dst)
    if src.resolve() == dst.resolve():
        raise ValueError(f"the hardened model needs a folder of its own, got {dst} twice")
    model = AutoModelForCausalLM.from_pretrained(src, dtype="auto")
    harden(model, **options)
    dst.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(dst)
    for path in src.iterdir():
        weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not weights and not (dst / path.name).exists():
            shutil.copyfile(path, dst / path.name)
