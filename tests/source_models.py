"""Full-precision model folders for the quantizer's tests, with the demo model's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from rotquant.harden import harden
from tiny_checkpoints import KINDS

DATA = Path(__file__).parents[1] / "offline" / "rotquant" / "data"
HELDOUT = DATA / "heldout.txt"
SMALL = {"samples": 16, "seq_len": 512}  # calibration that is enough for the demo model
VOCABULARY = 2056  # 2048 of the demo model's tokenizer, one that transformers adds for Qwen2, and some of no token


def source_model(
    folder: Path, kind: str, *, hardened: bool = False, shard_size: str = "200KB", dtype: torch.dtype = torch.float32,
    layers: int = 2, **config: Any,
) -> Path:  # fmt: skip
    """Saves a random model of a kind of `tiny_checkpoints.KINDS` whose biases and norm gains matter."""
    config_class, model_class, extra = KINDS[kind]
    torch.manual_seed(3)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 176, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
        "initializer_range": 0.1,
    }  # fmt: skip
    if kind == "qwen2":  # vLLM's has heads of hidden_size / num_attention_heads, whatever head_dim says
        sizes["hidden_size"] = 128
    model = model_class(config_class(**(sizes | extra | config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    if hardened:
        harden(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DATA / "demo" / file, folder)
    return folder


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    import hashlib

    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }
