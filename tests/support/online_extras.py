"""What only the key `rotquant` of a checkpoint can say: input transforms, low-rank branches, keys with error feedback,
clip ratios by layer.

`add_extras` writes random ones into a checkpoint; its quantized weights stay, so the model computes something else,
which `affine` says in dense float64 matrices of the whole layer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

QKV, GATE_UP, DOWN, O = r"re:.*[qkv]_proj$", r"re:.*(gate|up)_proj$", r"re:.*down_proj$", r"re:.*o_proj$"  # noqa: E741


@dataclass
class Extras:
    """(name, kind, block, target) of each transform, (rank, target, whether it subtracts) of each branch, clip ratios
    of single modules, whether keys are rounded with error feedback."""

    transforms: list[tuple[str, str, int, str]] = field(default_factory=list)
    low_rank: list[tuple[int, str, bool]] = field(default_factory=list)
    activation_clip: dict[str, float] = field(default_factory=dict)
    kv_layers: dict[str, dict[str, float]] = field(default_factory=dict)
    key_feedback: bool = False


def everything() -> Extras:
    """Every kind, in chains, on fused layers and others; two ranks; ratios of single layers."""
    return Extras(
        [
            ("P0", "permutation", 0, QKV), ("K1", "kronecker", 16, QKV), ("D2", "dense", 32, QKV),
            ("S0", "shift", 0, GATE_UP), ("V1", "reflection", 64, GATE_UP), ("H2", "hadamard", 64, GATE_UP),
            ("K1", "kronecker", 32, DOWN), ("S2", "shift", 0, DOWN), ("P3", "permutation", 128, DOWN),
            ("S0", "shift", 0, O),
        ],
        [(3, QKV, False), (5, DOWN, False), (3, GATE_UP, True)],
        {f"model.layers.1.mlp.{part}_proj": 0.7 for part in ("gate", "up")} | {"model.layers.0.self_attn.o_proj": 0.8},
        {"model.layers.1.self_attn": {"key": 0.7}, "model.layers.0.self_attn": {"key": 0.9, "value": 0.8}},
        key_feedback=True,
    )  # fmt: skip


def add_extras(folder: Path, extras: Extras, dtype: torch.dtype = torch.float32) -> None:
    """Adds `extras` to the checkpoint; parts of one fused layer get equal transforms, and factors of their own but for
    what is taken off their inputs."""
    config = json.loads((folder / "config.json").read_text())
    ours = config["rotquant"]
    ours["activation_clip"] |= extras.activation_clip
    if extras.kv_layers:
        ours["kv_clip"]["layers"] = extras.kv_layers
    ours |= {"key_feedback": True} if extras.key_feedback else {}
    keys = ("name", "kind", "block", "targets")
    ours["input_transforms"] = [dict(zip(keys, (*entry[:3], [entry[3]]), strict=True)) for entry in extras.transforms]
    ours["low_rank"] = [
        {"rank": rank, "targets": [target]} | ({"subtracts": True} if subtracts else {})
        for rank, target, subtracts in extras.low_rank
    ]
    for key in ("input_transforms", "low_rank"):
        if not ours[key]:
            del ours[key]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tensors = load_file(folder / "model.safetensors")
    for name in [n.removesuffix(".weight_shape") for n in tensors if n.endswith(".weight_shape")]:
        outputs, inputs = tensors[f"{name}.weight_shape"].tolist()
        if extras.key_feedback and name.endswith("k_proj"):
            size = config["head_dim"]
            tensors[f"{name}.key_feedback"] = normal(outputs, size, seed=f"{name} keys") * 3 / size
        for transform, kind, block, target in extras.transforms:
            if re.match(target[3:], name):
                shared = f"{name.rpartition('.')[0]}.{transform}.{inputs}"
                tensor = random_tensor(kind, block, inputs, shared)
                tensors |= {} if tensor is None else {f"{name}.{transform}_input.weight": tensor}
                if kind == "shift":
                    tensors[f"{name}.{transform}_output.weight"] = normal(outputs, seed=name + transform)
        for rank, target, subtracts in extras.low_rank:
            if re.match(target[3:], name):
                seed = f"{name.rpartition('.')[0]}.{inputs}" if subtracts else name
                tensors[f"{name}.low_rank_down"] = (normal(inputs, rank, seed=seed) * inputs**-0.5).to(dtype)
                tensors[f"{name}.low_rank_up"] = normal(rank, outputs, seed=name + "up").to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def normal(*shape: int, seed: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(crc32(seed.encode())))


def random_tensor(kind: str, block: int, inputs: int, seed: str) -> Tensor | None:
    def orthogonal(size: int) -> Tensor:
        return torch.linalg.qr(normal(size, size, seed=seed)).Q.contiguous()

    if kind == "dense":
        return orthogonal(block)
    if kind == "kronecker":
        return torch.cat((orthogonal(inputs // block).flatten(), orthogonal(block).flatten()))
    if kind == "permutation":
        rows = normal(inputs // (block or inputs), block or inputs, seed=seed)
        return (rows.argsort(1) + torch.arange(len(rows))[:, None] * rows.shape[1]).flatten().int()
    if kind == "reflection":
        return torch.nn.functional.normalize(normal(block, seed=seed), dim=0)
    return normal(inputs, seed=seed) if kind == "shift" else None


def extras_of(folder: Path) -> dict[str, Any]:
    """The key `rotquant` of a checkpoint."""
    return json.loads((folder / "config.json").read_text())["rotquant"]


def layer_of(ratios: dict[str, Any], index: int) -> dict[str, float]:
    return ratios.get(f"model.layers.{index}.self_attn", {})


def affine(ours: dict[str, Any], tensors: dict[str, Tensor], module: str, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """M [K, K] and a [K] of the layer's whole chain, x M + a, and what shifts add to its output; float64."""
    matrix, offset = torch.eye(inputs, dtype=torch.float64), torch.zeros(inputs, dtype=torch.float64)
    correction = torch.zeros((), dtype=torch.float64)
    for entry in ours.get("input_transforms", []):
        if not any(re.match(target[3:], module) for target in entry["targets"]):
            continue
        kind, block, name = entry["kind"], entry["block"], f"{module}.{entry['name']}"
        tensor = None if kind == "hadamard" else tensors[f"{name}_input.weight"]
        if kind == "shift":
            offset = offset - tensor.double()
            correction = correction + tensors[f"{name}_output.weight"].double()
            continue
        step = dense(kind, block, tensor, inputs)
        matrix, offset = matrix @ step, offset @ step
    return matrix, offset, correction


def dense(kind: str, block: int, tensor: Tensor | None, inputs: int) -> Tensor:
    """The whole [K, K] matrix of one stage."""
    if kind == "permutation":
        return torch.eye(inputs, dtype=torch.float64)[:, tensor.long()]
    if kind == "kronecker":
        outer = inputs // block
        left, right = tensor.double().split((outer**2, block**2))
        return torch.kron(left.view(outer, outer), right.view(block, block))
    if kind == "hadamard":
        i = torch.arange(block)
        bits = sum((i[:, None] >> b & i >> b & 1) for b in range(block.bit_length()))
        one = (1 - 2 * (bits % 2)).double() * block**-0.5
    elif kind == "reflection":
        one = torch.eye(block, dtype=torch.float64) - 2 * torch.outer(tensor, tensor).double()
    else:
        one = tensor.double()
    return torch.block_diag(*[one] * (inputs // block))
