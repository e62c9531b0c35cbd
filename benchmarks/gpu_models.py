"""Checkpoints with random weights for `gpu_serve.py`: any shape of `serve_models`, and Llama-3-8B's.

They are written without the quantizer: kernels do not care where the codes come from.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from rotquant.checkpoint import writer
from rotquant.checkpoint.companions import copy_companions
from rotquant.checkpoint.schemes import linear_scheme
from rotquant.checkpoint.source import INDEX, save_tensors, save_text
from rotquant.data import DATA
from rotquant.learn.initial import initial_transforms
from rotquant.models import Names, expected_shapes, read_architecture, read_config
from rotquant.recipe import Recipe
from rotquant.recipes import load_recipe
from rotquant_kernels.formats import WeightFormat
from serve_models import CHEAP, COMMON, LAYER, SHAPES

LLAMA_3_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 32768, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
ALL_SHAPES = SHAPES | {"llama-3-8b": LLAMA_3_8B}


def recipe() -> Recipe:
    return load_recipe("quarot", CHEAP)


def write_config(shape: str, checkpoint: str, folder: Path) -> None:
    """Everything but the weights: config.json and the demo model's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    copy_companions(DATA / "demo", folder)
    AutoConfig.for_model(**(COMMON | ALL_SHAPES[shape])).save_pretrained(folder)
    if checkpoint == "dummy":
        return
    arch, chosen = read_architecture(folder), recipe()
    if checkpoint == "rotquant":
        transforms = initial_transforms(chosen, arch, 1, seed=0)
        quantization = writer.quantization_config(chosen, arch, transforms)
        writer.write_config(
            folder, folder, arch, quantization, writer.extension(chosen, arch, transforms, "full", None, {})
        )
        return
    config = json.loads((folder / "config.json").read_text())
    weights = linear_scheme(["Linear"], WeightFormat(4), chosen.activations.rows) | {"input_activations": None}
    config["tie_word_embeddings"] = False
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": weights}, "ignore": ["lm_head"],
    }  # fmt: skip
    save_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def random_tensors(name: str, shape: tuple[int, ...], checkpoint: str) -> dict[str, Tensor]:
    """What the checkpoint holds for one tensor of the model."""
    head_bits = recipe().lm_head.bits if checkpoint == "rotquant" else 16
    bits = 4 if name.endswith("_proj.weight") else head_bits if name == Names().head else 16
    if name.endswith("norm.weight"):
        return {name: torch.ones(shape, dtype=torch.bfloat16)}
    if bits == 16:
        return {name: torch.randn(shape, dtype=torch.bfloat16) / 50}
    words = torch.randint(-(2**31), 2**31, (shape[0], shape[1] * bits // 32), dtype=torch.int64).to(torch.int32)
    scale = torch.full((shape[0], 1), 0.02 / 2 ** (bits - 2), dtype=torch.bfloat16)
    return {f"{name}_packed": words, f"{name}_scale": scale, f"{name}_shape": torch.tensor(shape)}


def write_model(shape: str, checkpoint: str, folder: Path) -> Path:
    """A checkpoint with random weights, one file a layer; kept where it is complete."""
    if (folder / (INDEX if checkpoint != "dummy" else "config.json")).exists():
        return folder
    write_config(shape, checkpoint, folder)
    if checkpoint == "dummy":
        return folder
    torch.manual_seed(0)
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in expected_shapes(read_config(folder)).items():
        found = LAYER.match(name)
        groups.setdefault(found[0] if found else "rest", {})[name] = size
    written: dict[str, str] = {}
    for number, sizes in enumerate(groups.values(), 1):
        tensors = {key: t for name, size in sizes.items() for key, t in random_tensors(name, size, checkpoint).items()}
        if checkpoint == "rotquant" and number == 1:
            marker = writer.marker(f"mlp.down_proj.{writer.HADAMARDS['down']}", r4_block(shape), torch.bfloat16)
            tensors |= {f"model.layers.0.{key}": tensor for key, tensor in marker.items()}
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_tensors(folder / file, tensors)
        written |= dict.fromkeys(tensors, file)
    writer.write_index(folder, written)
    return folder


def r4_block(shape: str) -> int:
    """R4's block for a shape; from a config that is not quantized yet, as the quantizer reads it."""
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(**(COMMON | ALL_SHAPES[shape])).save_pretrained(folder)
        return initial_transforms(recipe(), read_architecture(Path(folder)), 1, seed=0).r4_block
