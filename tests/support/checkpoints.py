"""Checkpoints of tiny random models, written by hand: no code of the quantizer takes part.

`write_checkpoint` makes a random Hugging Face model, quantizes it by rounding and writes it as the quantizer would;
`float_model` computes the same folder in float arithmetic only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from online_extras import Extras, add_extras
from rotquant_kernels import convention

VOCABULARY = 300  # not a multiple of 64, so that vLLM pads lm_head
HEAD, INTERMEDIATE, BLOCK, VOCAB = 16, 96, 32, 128  # of `tiny`
# Architectures that differ in what a linear or a norm holds, and what their configs need beside the sizes.
KINDS: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": None}}


@dataclass
class Spec:
    """What a test checkpoint is made of."""

    architecture: str = "llama"  # one of KINDS
    hidden: int = 256
    intermediate: int = 512
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    layers: int = 2
    vocabulary: int = VOCABULARY
    tied: bool = False  # the model before it is quantized; a checkpoint holds both tables
    std: float = 0.08  # of the weights
    gains: float = 0.0  # spread of the norms' gains
    dtype: torch.dtype = torch.float32
    r4: str = "hadamard"  # "hadamard", "dense" or "" for none
    r4_block: int = 128
    r3: bool = True
    kv: bool = True
    symmetric: bool = True  # of activations and, unless `kv_symmetric` says otherwise, KV
    kv_symmetric: bool | None = None
    act_bits: int = 4
    wide: tuple[str, ...] = ()  # modules whose activations have 8 bits
    wide_weights: tuple[str, ...] = ()  # those of them whose weights have 8 bits, too
    group: int = 0  # weight group size, 0 for one scale per channel
    int8_head: bool = False
    act_clip: float = 0.9
    kv_clip: float = 0.95
    seed: int = 0
    shards: int = 1
    config: dict[str, Any] = field(default_factory=dict)  # more fields of config.json
    extras: Extras = field(default_factory=Extras)  # what only the key `rotquant` can say

    def __post_init__(self) -> None:
        if self.kv_symmetric is None:
            self.kv_symmetric = self.symmetric


def tiny(architecture: str = "llama", **changes: Any) -> Spec:
    """A smaller model, in which biases and norm gains weigh more, without online transforms and KV cache."""
    start: dict[str, Any] = {
        "hidden": 64, "intermediate": INTERMEDIATE, "head_dim": HEAD, "vocabulary": VOCAB, "r4_block": BLOCK,
        "std": 0.2, "gains": 0.3, "seed": 1, "r3": False, "r4": "", "kv": False, "act_clip": 1.0,
        "tied": architecture == "llama", "config": {"max_position_embeddings": 256, "pad_token_id": 0},
    }  # fmt: skip
    return Spec(architecture, **start | changes)


def model_config(spec: Spec) -> Any:
    sizes = {
        "vocab_size": spec.vocabulary, "hidden_size": spec.hidden, "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers, "num_attention_heads": spec.heads, "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim, "max_position_embeddings": 1024, "initializer_range": spec.std,
        "tie_word_embeddings": spec.tied, "bos_token_id": 1, "eos_token_id": 2, "dtype": spec.dtype,
    }  # fmt: skip
    return AutoConfig.for_model(spec.architecture, **sizes | KINDS[spec.architecture] | spec.config)


def random_model(spec: Spec) -> PreTrainedModel:
    """The model that `write_checkpoint` quantizes. Its biases are not zero, which would hide a lost one."""
    torch.manual_seed(spec.seed)
    model = AutoModelForCausalLM.from_config(model_config(spec)).to(spec.dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=spec.gains or 0.05)
            elif "norm" in name and spec.gains:
                parameter += spec.gains * torch.randn_like(parameter)
    return model


def normalized_hadamard(size: int) -> Tensor:
    """H / sqrt(size), float64, by Sylvester's recursion."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / size**0.5


def r4_matrix(spec: Spec) -> Tensor:
    """R4's block, float64: a Hadamard, or a random orthogonal matrix as the checkpoint's dtype holds it."""
    if spec.r4 == "hadamard":
        return normalized_hadamard(spec.r4_block)
    drawn = torch.randn(spec.r4_block, spec.r4_block, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.to(spec.dtype).double()


def quantization_config(spec: Spec) -> dict[str, Any]:
    """The dict of that name in config.json, in compressed-tensors' schema."""
    weights: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    if spec.group:
        weights |= {"strategy": "group", "group_size": spec.group}
    inputs = {"type": "int", "strategy": "token", "dynamic": True}
    groups: dict[str, Any] = {
        "group_0": {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": inputs | {"num_bits": spec.act_bits, "symmetric": spec.symmetric},
            "format": "pack-quantized",
        }
    }
    if spec.int8_head:
        groups["group_1"] = {
            "targets": ["lm_head"],
            "weights": weights | {"num_bits": 8, "strategy": "channel", "group_size": None},
            "input_activations": inputs | {"num_bits": 8, "symmetric": True},
            "format": "pack-quantized",
        }
    wide = {"input_activations": inputs | {"num_bits": 8, "symmetric": spec.symmetric}}
    if spec.wide:
        targets = [name for name in spec.wide if name not in spec.wide_weights]
        groups["group_2"] = groups["group_0"] | wide | {"targets": targets}
    if spec.wide_weights:
        own = {"targets": list(spec.wide_weights), "weights": weights | {"num_bits": 8}}
        groups["group_3"] = groups["group_0"] | wide | own
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
            "symmetric": spec.kv_symmetric,
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
    model = random_model(spec)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        head = module == "lm_head"
        if leaf == "weight" and tensor.dim() == 2 and "embed" not in name and (spec.int8_head or not head):
            tensors |= quantized(module, tensor, spec, bits=8 if head or module in spec.wide_weights else 4)
        else:
            tensors[name] = tensor.clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_shards(folder, tensors, 1)
    written = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "tie_word_embeddings": False,
        "quantization_config": quantization_config(spec),
        "rotquant": {
            "format_version": 1,
            "profile": "full",
            "activation_clip": {"default": spec.act_clip},
            "kv_clip": {"key": spec.kv_clip, "value": spec.kv_clip},
        },
    }
    (folder / "config.json").write_text(json.dumps(written, indent=1, default=str))
    add_extras(folder, spec.extras, spec.dtype)
    if spec.shards > 1:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        save_shards(folder, tensors, spec.shards)
    return folder


def quantized(module: str, weight: Tensor, spec: Spec, bits: int) -> dict[str, Tensor]:
    """The checkpoint's tensors for one linear layer, R4 folded into down_proj."""
    out: dict[str, Tensor] = {}
    weight = weight.double()
    if module.endswith("down_proj") and spec.r4:
        matrix = r4_matrix(spec)
        # y = W x = (W T)(Tᵀ x): the engine computes x (I ⊗ T) with rows x, so T is folded from the right.
        weight = (weight.unflatten(1, (-1, spec.r4_block)) @ matrix).flatten(1)
        if spec.r4 == "dense" or module.startswith("model.layers.0."):  # the file may hold a Hadamard, and need not
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


def write_plain(folder: Path, spec: Spec) -> Path:
    """The model that `write_checkpoint` quantizes, as it was."""
    random_model(spec).save_pretrained(folder)
    return folder


def save_shards(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """model.safetensors, or shards with an index."""
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: t for name, t in tensors.items() if weight_map[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


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
    index, file = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        content = json.loads(index.read_text())
        file = folder / content["weight_map"].pop(name)
        index.write_text(json.dumps(content))
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, *keys: str, value: Any) -> None:
    """Sets one field of config.json, named by the keys that lead to it."""
    config = json.loads((folder / "config.json").read_text())
    place = config
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes the tensors of model.safetensors in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
