"""Make a small model as hard to quantize as a large one, without changing its function.

Small trained models have no outliers: plain round-to-nearest W4A4 costs them a few percent, so a test on them passes
with a rotation that is missing, transposed or folded into the wrong matrix. Large models have channels tens of times
larger than the others. The same invariances that rotations and scalings use can write such channels into any model.
With row tokens x, a linear computes W x, and s is the factor of one channel (a power of two, so nothing is rounded):

norm        W diag(1/s) (diag(s) g * x_hat) = W (g * x_hat): the gain's channel times s, the column of each linear that
            the norm feeds divided by s. The final norm takes part when lm_head is not tied to the embedding.
up, down    down diag(1/s) (act(gate x) * (diag(s) up x)) = down (act(gate x) * up x): the product is linear in up.
v, o        o diag(1/s) A (diag(s) v) = o A v: attention mixes tokens, not channels. All query heads that share a
            key-value head read the same v channels, hence the same columns of o_proj in each of them. Not where a norm
            of the values would see it.
q, k        (diag(1/s) q) . (diag(s) k) = q . k. RoPE turns channels i and i + head_dim/2 into each other, so both
            share one s, and then the scaling commutes with it. With q_norm and k_norm (Qwen3), whose outputs do not
            depend on the scale of their inputs, the factors go to the norms' gains, which all heads share.

`models` says which linears these are. A layer's tensors are changed in place, as views of the model's parameters.

A fold of the norm gains undoes the first step exactly, whatever its strength. The other three survive a rotation in
part: a Hadamard transform spreads a channel's energy but cannot remove it, so `pair_strength` is much smaller.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rotquant.models import Layer, Tensors, describe
from rotquant.models.attention import Attention
from rotquant.models.mlp import Experts

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


def _scale_rows(tensors: Tensors, linear: str, rows: Tensor, factor: float) -> None:
    """Scale outputs of a linear: weight rows, and the bias that is added to them."""
    for name in (f"{linear}.weight", f"{linear}.bias"):
        if name in tensors:
            tensors[name][rows] *= factor


def _harden_norm(gain: Tensor, fed: list[Tensor], picker: _Picker, factor: float) -> None:
    """`fed`: weights of the linears that the norm feeds."""
    channels = picker.pick(gain.numel())
    gain[channels] *= factor
    for weight in fed:
        weight[:, channels] /= factor


def _harden_up_down(tensors: Tensors, kind: Layer, picker: _Picker, factor: float) -> None:
    for mlp in kind.mlp.gated:
        channels = picker.pick(mlp.width)
        _scale_rows(tensors, mlp.up, channels, factor)
        tensors[f"{mlp.down}.weight"][:, channels] /= factor


def _harden_attention(tensors: Tensors, attention: Attention, picker: _Picker, factor: float) -> None:
    """The v, o and the q, k pairs of one layer."""
    head_dim, pairs = attention.head_dim, attention.qk_factors
    for head in range(attention.kv_heads if not attention.normed_values else 0):
        channels = picker.pick(head_dim)
        _scale_rows(tensors, attention.value, head * head_dim + channels, factor)
        tensors[f"{attention.output}.weight"][:, _of_queries(head, attention, channels)] /= factor
    if attention.key_norm and attention.query_norm:
        both = _paired(picker.pick(pairs), attention)
        tensors[f"{attention.key_norm}.weight"][both] *= factor
        tensors[f"{attention.query_norm}.weight"][both] /= factor
        return
    for head in range(attention.kv_heads):
        both = _paired(picker.pick(pairs), attention)
        _scale_rows(tensors, attention.key, head * head_dim + both, factor)
        _scale_rows(tensors, attention.query, _of_queries(head, attention, both), 1.0 / factor)


def _paired(factors: Tensor, attention: Attention) -> Tensor:
    """Channels of S_qk's factors: channel i turns with i + rotary/2, those that RoPE leaves alone have no other."""
    half = attention.rotary // 2
    turned, single = factors[factors < half], factors[factors >= half]
    return torch.cat([turned, turned + half, single + half])


def _of_queries(kv_head: int, attention: Attention, channels: Tensor) -> Tensor:
    """These head channels in every query head that reads the given key-value head."""
    group, size = attention.heads // attention.kv_heads, attention.head_dim
    return torch.cat([query * size + channels for query in range(kv_head * group, (kv_head + 1) * group)])


def _parts_of_experts(layer: Tensors, kind: Layer) -> Tensors:
    """The weights of each expert and of the router, as views, by the names that files have for them."""
    block = kind.mlp
    if not isinstance(block, Experts):
        return {}
    both, down = (layer[f"{block.module}.experts.{leaf}"] for leaf in ("gate_up_proj", "down_proj"))
    found = {f"{block.router}.weight": layer[f"{block.module}.gate.weight"]}
    for j, mlp in enumerate(block.routed):
        gate, up = both[j].split(block.width)
        found |= {f"{mlp.gate}.weight": gate, f"{mlp.up}.weight": up, f"{mlp.down}.weight": down[j]}
    return found


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
    arch = describe(model.config, class_name=type(model).__name__)
    picker = _Picker(seed, channels)
    factor, pair_factor = _power_of_two(strength), _power_of_two(pair_strength)
    tensors: Tensors = dict(model.named_parameters())
    for index, kind in enumerate(arch.kinds):
        prefix = arch.layer_prefix(index)
        layer = kind.split({n.removeprefix(prefix): p.data for n, p in tensors.items() if n.startswith(prefix)})
        layer |= _parts_of_experts(layer, kind)  # views, but for gains of which the model holds another number
        for site, norm in kind.norms.items():
            fed = [layer[f"{linear}.weight"] for linear in kind.sites[site] + kind.full_precision[site]]
            _harden_norm(layer[f"{norm}.weight"], fed, picker, factor)
        _harden_up_down(layer, kind, picker, pair_factor)
        if kind.attends:
            _harden_attention(layer, kind.attends, picker, pair_factor)
        for name in kind.gains if kind.offset else ():
            tensors[prefix + name].data.copy_(layer[name] - kind.offset)
    if arch.names.head in tensors:  # named_parameters leaves out a head that is the embedding
        gain = tensors[arch.names.norm].double() + arch.offset
        _harden_norm(gain, [tensors[arch.names.head]], picker, factor)
        tensors[arch.names.norm].data.copy_(gain - arch.offset)


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
