"""Tiny checkpoints for the serving tests, and an independent model of what they must compute.

`write_checkpoint` makes a random Hugging Face model, quantizes it by rounding and writes it as the
quantizer would. `expected_logprobs` runs the same folder in transformers with float arithmetic only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from online_extras import Extras, add_extras, affine, extras_of, layer_of
from rotquant_kernels import convention

VOCABULARY = 300  # not a multiple of 64, so that vLLM pads lm_head


@dataclass
class Spec:
    """What a test checkpoint is made of."""

    architecture: str = "llama"  # "llama", "qwen2" (biases) or "qwen3" (q and k norms)
    hidden: int = 256
    intermediate: int = 512
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    layers: int = 2
    dtype: torch.dtype = torch.float32
    r4: str = "hadamard"  # "hadamard", "dense" or "" for none
    r4_block: int = 128
    r3: bool = True
    kv: bool = True
    symmetric: bool = True  # of activations and KV
    group: int = 0  # weight group size, 0 for one scale per channel
    int8_head: bool = False
    act_clip: float = 0.9
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)  # more fields of config.json
    extras: Extras = field(default_factory=Extras)  # what only the key `rotquant` can say


def normalized_hadamard(size: int) -> Tensor:
    """H / sqrt(size), float64, by Sylvester's recursion."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / size**0.5


def model_config(spec: Spec) -> Any:
    return AutoConfig.for_model(
        spec.architecture,
        vocab_size=VOCABULARY,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=1024,
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype=spec.dtype,
        **spec.config,
    )


def quantization_config(spec: Spec) -> dict[str, Any]:
    """The dict of that name in config.json, in compressed-tensors' schema."""
    weights: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    if spec.group:
        weights |= {"strategy": "group", "group_size": spec.group}
    inputs = {"num_bits": 4, "type": "int", "symmetric": spec.symmetric, "strategy": "token", "dynamic": True}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": "pack-quantized"}
    groups: dict[str, Any] = {"group_0": scheme}
    if spec.int8_head:
        groups["group_1"] = {
            "targets": ["lm_head"],
            "weights": weights | {"num_bits": 8, "strategy": "channel", "group_size": None},
            "input_activations": inputs | {"num_bits": 8, "symmetric": True},
            "format": "pack-quantized",
        }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [] if spec.int8_head else ["lm_head"],
    }
    if spec.kv:
        config["kv_cache_scheme"] = {
            "num_bits": 4,
            "type": "int",
            "symmetric": spec.symmetric,
            "strategy": "group",
            "group_size": spec.head_dim,
            "dynamic": True,
        }
    transforms: dict[str, Any] = {}
    if spec.r4:
        kind = "hadamard" if spec.r4 == "hadamard" else "random-matrix"
        apply = [{"location": "input", "targets": ["re:.*down_proj$"]}]
        transforms["R4"] = {"type": kind, "head_dim": spec.r4_block, "apply": apply}
    if spec.r3:
        apply = [{"location": where, "targets": ["re:.*self_attn$"]} for where in ("q_attn", "k_cache")]
        transforms["R3"] = {"type": "hadamard", "head_dim": spec.head_dim, "apply": apply}
    return config | ({"transform_config": {"config_groups": transforms}} if transforms else {})


def write_checkpoint(folder: Path, spec: Spec) -> Path:
    """Writes config.json and model.safetensors; needs no tokenizer (`skip_tokenizer_init`)."""
    torch.manual_seed(spec.seed)
    config = model_config(spec)
    model = AutoModelForCausalLM.from_config(config).to(spec.dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts biases at zero, which would hide a lost one
            torch.nn.init.normal_(parameter, std=0.05)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        head = module == "lm_head"
        if leaf == "weight" and tensor.dim() == 2 and "embed" not in name and (spec.int8_head or not head):
            tensors |= quantized(module, tensor, spec, bits=8 if head else 4)
        else:
            tensors[name] = tensor.contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = config.to_dict() | {
        "architectures": [type(model).__name__],
        "quantization_config": quantization_config(spec),
        "rotquant": {
            "format_version": 1,
            "profile": "full",
            "activation_clip": {"default": spec.act_clip},
            "kv_clip": {"key": 0.95, "value": 0.95},
        },
    }
    (folder / "config.json").write_text(json.dumps(written, indent=1, default=str))
    add_extras(folder, spec.extras, spec.dtype)
    return folder


def write_plain(folder: Path, spec: Spec) -> Path:
    """The model that `write_checkpoint` quantizes, as it was."""
    torch.manual_seed(spec.seed)
    AutoModelForCausalLM.from_config(model_config(spec)).to(spec.dtype).save_pretrained(folder)
    return folder


def edited(source: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the checkpoint `source` with its config.json changed in place by `change`."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without(source: Path, folder: Path, name: str) -> Path:
    """A copy of the checkpoint `source` without the tensor `name`."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantized(module: str, weight: Tensor, spec: Spec, bits: int) -> dict[str, Tensor]:
    """The checkpoint's tensors for one linear layer, R4 folded into down_proj."""
    out: dict[str, Tensor] = {}
    weight = weight.double()
    if module.endswith("down_proj") and spec.r4:
        matrix = normalized_hadamard(spec.r4_block)
        # y = W x = (W T)(Tᵀ x): the engine computes x (I ⊗ T) with rows x, so T is folded from the right.
        weight = (weight.unflatten(1, (-1, spec.r4_block)) @ matrix).flatten(1)
        if spec.r4 == "dense" or module.startswith("model.layers.0."):
            out[f"{module}.R4_input.weight"] = matrix.to(spec.dtype)
    group = spec.group if bits == 4 and spec.group else weight.shape[1]
    rows = weight.unflatten(1, (-1, group))
    scale, zero = convention.qparams(rows, bits, symmetric=True)
    scale = scale.to(spec.dtype).float()
    codes = convention.quantize(rows, scale, zero, bits).flatten(1)
    out[f"{module}.weight_packed"] = convention.pack_int32(codes, bits)
    out[f"{module}.weight_scale"] = scale.squeeze(-1).to(spec.dtype)
    out[f"{module}.weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
    return out


class FloatLinear(torch.nn.Module):
    """A quantized linear layer in float64: unpacked weights, fake-quantized inputs."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor], spec: Spec, name: str, bias: Tensor | None) -> None:
        super().__init__()
        self.spec, self.name, self.bias = spec, name, bias
        self.extras = extras_of(folder)
        self.bits = 8 if name == "lm_head" else 4
        inputs = tensors[f"{name}.weight_shape"][1].item()
        words = tensors[f"{name}.weight_packed"]
        shifts = torch.arange(0, 32, self.bits)
        codes = (words.unsqueeze(-1) >> shifts & (1 << self.bits) - 1).flatten(1)[:, :inputs] - (1 << self.bits - 1)
        scale = tensors[f"{name}.weight_scale"].double()
        self.weight = codes.double() * scale.repeat_interleave(inputs // scale.shape[1], dim=1)
        self.matrix, self.offset, self.correction = affine(self.extras, tensors, name, inputs)
        self.factors = [
            tensors[key].double() for key in (f"{name}.low_rank_down", f"{name}.low_rank_up") if key in tensors
        ]

    def forward(self, x: Tensor) -> Tensor:
        y = x.double()
        if self.name.endswith("down_proj") and self.spec.r4:
            size = self.spec.r4_block
            y = (y.unflatten(-1, (-1, size)) @ normalized_hadamard(size)).flatten(-2)
        y = y @ self.matrix + self.offset
        clip = self.extras["activation_clip"].get(self.name, self.spec.act_clip)
        rounded = fake_quantize(y, self.bits, self.spec.symmetric or self.bits == 8, clip)
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


def expected_logprobs(folder: Path, spec: Spec, prompts: list[list[int]]) -> Iterator[Tensor]:
    """For each prompt the log-probabilities of every next token, float64 [T, vocabulary]."""

    def kv4_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any) -> Any:
        q, k, v = query.double(), key.double(), value.double()
        if spec.r3:
            q, k = q @ normalized_hadamard(spec.head_dim), k @ normalized_hadamard(spec.head_dim)
        if spec.kv:
            clip = extras_of(folder)["kv_clip"]
            clip = {"key": clip["key"], "value": clip["value"]} | layer_of(clip.get("layers", {}), module.layer_idx)
            k, v = (
                fake_quantize(x, 4, spec.symmetric, clip[name], half_scale=True)
                for name, x in (("key", k), ("value", v))
            )
        k, v = (x.repeat_interleave(spec.heads // spec.kv_heads, dim=1) for x in (k, v))
        scores = q @ k.mT * settings["scaling"]
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
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
            yield model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)


def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
