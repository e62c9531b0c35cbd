"""What a checkpoint of `checkpoints.write_checkpoint` must compute, in float arithmetic and transformers' own model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from checkpoints import Spec, model_config, normalized_hadamard, r4_matrix
from online_extras import affine, extras_of, layer_of


class FloatLinear(torch.nn.Module):
    """A quantized linear layer in float64: unpacked weights, fake-quantized inputs."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor], spec: Spec, name: str, bias: Tensor | None) -> None:
        super().__init__()
        self.spec, self.name, self.bias = spec, name, bias
        self.extras = extras_of(folder)
        self.bits = 8 if name == "lm_head" or name in spec.wide_weights else 4
        inputs = tensors[f"{name}.weight_shape"][1].item()
        words = tensors[f"{name}.weight_packed"]
        shifts = torch.arange(0, 32, self.bits)
        codes = (words.unsqueeze(-1) >> shifts & (1 << self.bits) - 1).flatten(1)[:, :inputs] - (1 << self.bits - 1)
        scale = tensors[f"{name}.weight_scale"].double()
        self.weight = codes.double() * scale.repeat_interleave(inputs // scale.shape[1], dim=1)
        self.matrix, self.offset, self.correction = affine(self.extras, tensors, name, inputs)
        self.subtracts = any(
            e.get("subtracts") and re.match(e["targets"][0][3:], name) for e in self.extras.get("low_rank", [])
        )
        self.factors = [
            tensors[key].double() for key in (f"{name}.low_rank_down", f"{name}.low_rank_up") if key in tensors
        ]

    def forward(self, x: Tensor) -> Tensor:
        y = x.double()
        if self.name.endswith("down_proj") and self.spec.r4:
            y = (y.unflatten(-1, (-1, self.spec.r4_block)) @ r4_matrix(self.spec)).flatten(-2)
        y = y @ self.matrix + self.offset
        clip = self.extras["activation_clip"].get(self.name, self.spec.act_clip)
        head = self.name == "lm_head"
        bits = 8 if head or self.name in self.spec.wide else self.spec.act_bits
        left = y - y @ self.factors[0] @ self.factors[0].T if self.subtracts else y
        rounded = fake_quantize(left, bits, self.spec.symmetric or head, clip)
        out = rounded @ self.weight.T + self.correction + (0 if self.bias is None else self.bias.double())
        out = out + y @ self.factors[0] @ self.factors[1] if self.factors else out
        return out.to(x.dtype)


def fake_quantize(x: Tensor, bits: int, symmetric: bool, clip: float, half_scale: bool = False) -> Tensor:
    """Per-row quantization and back, spelled out in float64; `half_scale` rounds scales to float16 (KV)."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        scale = x.abs().amax(-1, keepdim=True) * clip / ((2**bits - 1) / 2)
    else:
        scale = (x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)) * clip / (2**bits - 1)
    scale = scale.half().double() if half_scale else scale
    zero = 0 if symmetric else (low - x.amin(-1, keepdim=True).clamp(max=0) * clip / scale).clamp(low, high).round()
    return ((x / scale + zero).round().clamp(low, high) - zero) * scale


def fed_back(x: Tensor, symmetric: bool, clip: float, feedback: Tensor) -> Tensor:
    """Keys [B, heads, T, d] likewise, where what a channel loses is taken from all that are still to come.

    Args:
        feedback: [heads * d, d].
    """
    size = x.shape[-1]
    passed = feedback.double().view(-1, size, size)
    scale = (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)) * clip / 15
    scale = (x.abs().amax(-1) * clip / 7.5 if symmetric else scale).half().double()
    zero = 0 if symmetric else (-8 - x.amin(-1).clamp(max=0) * clip / scale).clamp(-8, 7).round()
    left, back = x.clone(), torch.empty_like(x)
    for j in range(size):
        back[..., j] = ((left[..., j] / scale + zero).round().clamp(-8, 7) - zero) * scale
        error = (left[..., j] - back[..., j]).clamp(-8 * scale, 8 * scale)
        left[..., j + 1 :] -= error[..., None] * passed[:, None, j, j + 1 :]
    return back


def expected_logprobs(folder: Path, spec: Spec, prompts: list[list[int]]) -> Iterator[Tensor]:
    """For each prompt the log-probabilities of every next token, float64 [T, vocabulary]."""

    def kv4_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any) -> Any:
        q, k, v = query.double(), key.double(), value.double()
        if spec.r3:
            q, k = q @ normalized_hadamard(spec.head_dim), k @ normalized_hadamard(spec.head_dim)
        if spec.kv:
            clip = extras_of(folder)["kv_clip"]
            clip = {"key": clip["key"], "value": clip["value"]} | layer_of(clip.get("layers", {}), module.layer_idx)
            exact_k = k
            k, v = (
                fake_quantize(x, 4, bool(spec.kv_symmetric), clip[name], half_scale=True)
                for name, x in (("key", k), ("value", v))
            )
            if extras_of(folder).get("key_feedback"):
                own = tensors[f"model.layers.{module.layer_idx}.self_attn.k_proj.key_feedback"]
                k = fed_back(exact_k, bool(spec.kv_symmetric), clip["key"], own)
        k, v = (x.repeat_interleave(spec.heads // spec.kv_heads, dim=1) for x in (k, v))
        scores = q @ k.mT * settings["scaling"]
        seen = torch.ones_like(scores, dtype=torch.bool).tril()
        if settings.get("sliding_window"):
            seen = seen.triu(1 - settings["sliding_window"])
        scores = scores.masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).to(query.dtype), None

    ALL_ATTENTION_FUNCTIONS.register("kv4_test", kv4_attention)
    model = AutoModelForCausalLM.from_config(model_config(spec), attn_implementation="kv4_test").to(spec.dtype)
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({k: v for k, v in tensors.items() if k in model.state_dict()}, strict=False)
    for name, module in list(model.named_modules()):
        if f"{name}.weight_packed" in tensors:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, FloatLinear(folder, tensors, spec, name, module.bias))
    for prompt in prompts:
        with torch.inference_mode():
            logprobs = model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
        yield logprobs  # outside: two of these generators in step would leave each other's mode on
