"""Random LoRA adapters as PEFT writes them, and what they do to a model in plain torch."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_adapter(
    folder: Path, model: nn.Module, *, names: list[str] = NAMES, size: float = 1.0, **config: Any
) -> Path:
    """An adapter for the linears `names` of a transformers model; `size`: its output beside that of the linears.

    The ranks are r (4), 6 in every k_proj where the config has a rank_pattern.
    """
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": names, "bias": "none"} | config
    random, tensors = torch.Generator().manual_seed(4), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in names:
            rank = 6 if settings.get("rank_pattern") and name.endswith("k_proj") else settings["r"]
            a = torch.randn(rank, module.in_features, generator=random)
            b = torch.randn(module.out_features, rank, generator=random)
            b *= size * module.weight.norm() / (scaling(settings, name) * b @ a).norm()
            tensors |= {f"base_model.model.{name}.lora_{x}.weight": t for x, t in (("A", a), ("B", b))}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def edit_adapter(
    folder: Path, config: dict[str, Any] | None = None, tensors: Callable[[dict[str, Tensor]], object] | None = None
) -> None:
    """Changes an adapter's config, and its tensors by a function that does so in place."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    if tensors:
        stored = load_file(folder / "adapter_model.safetensors")
        tensors(stored)
        save_file({k: t.contiguous() for k, t in stored.items()}, folder / "adapter_model.safetensors")


def scaling(config: dict[str, Any], name: str) -> float:
    """s of the linear `name`, for patterns whose keys are the last part of a name."""
    last = name.rpartition(".")[2]
    rank = (config.get("rank_pattern") or {}).get(last, config["r"])
    alpha = (config.get("alpha_pattern") or {}).get(last, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def changes(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """s B and A of every linear that the adapter in `folder` changes, by its full name."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {
        (name := key.removeprefix("base_model.model.")): (
            scaling(config, name) * tensors[f"{key}.lora_B.weight"].float(), tensors[f"{key}.lora_A.weight"].float()
        )
        for key in names
    }  # fmt: skip


def merged(model: Any, folder: Path) -> Any:
    """A copy of the model with W + s B A for every W."""
    model = copy.deepcopy(model)
    for name, (b, a) in changes(folder).items():
        model.get_submodule(name).weight.data += b @ a
    return model


def attach(model: nn.Module, folder: Path) -> None:
    """Adds x (s B A)ᵀ to the outputs of the linears, whatever their kind; x is what they are given."""
    for name, (b, a) in changes(folder).items():
        model.get_submodule(name).register_forward_hook(lambda _, x, y, b=b, a=a: y + (x[0].float() @ a.T @ b.T).to(y))
