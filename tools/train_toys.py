"""Train a toy of 4 layers of an architecture whose layers differ, in minutes of one core, and make it hard to quantize.

    python tools/train_toys.py build/models/gemma3 --architecture gemma3
    python tools/train_toys.py build/models/qwen3_5 --architecture qwen3_5 --steps 350

Result: a Hugging Face folder in OUT that `models.harden` gave outlier channels without changing what it computes, and
as it was trained in OUT-soft. Tokenizer and text are the demo model's: the bundled calibration texts, of which the
bundled held-out text has nothing. Windows of 64 tokens are half of a training row. `qwen3_5` takes ten minutes.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from rotquant.models.harden import harden_folder
from train_demo_model import DATA, begin, common_fields, save

LENGTH, ROWS, PEAK_LR, WARM = 128, 8, 3e-3, 20
WINDOW = 64
QWEN2_ROWS = 2056  # of embeddings: transformers reads the tokenizer of a Qwen2 with a token more
INTERLEAVED = ["sliding_attention"] * 3 + ["full_attention"]
# What each architecture has beside the sizes.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mistral": {"head_dim": 64, "sliding_window": WINDOW},
    "qwen2": {
        "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 4, "layer_types": INTERLEAVED,
    },
    "gemma3_text": {
        "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": WINDOW, "layer_types": INTERLEAVED,
    },
    "qwen3_5_text": {
        "head_dim": 64, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
    },
}  # fmt: skip


def new_model(architecture: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(architecture, **sizes | common_fields(tokenizer) | ARCHITECTURES[architecture])
    return AutoModelForCausalLM.from_config(config)


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 5% of the peak."""
    return min(1.0, (step + 1) / WARM) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    text = "".join((DATA / name).read_text(encoding="utf-8") for name in ("calibration.txt", "chat-calibration.txt"))
    stream = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)
    started = time.monotonic()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = PEAK_LR * rate(step, steps)
        rows = torch.stack([stream[i : i + LENGTH] for i in torch.randint(len(stream) - LENGTH, (ROWS,)).tolist()])
        rows[:, 0] = tokenizer.bos_token_id
        loss = model(rows, labels=rows, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 25 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps} loss {loss.item():.3f} {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    names = {name.removesuffix("_text"): name for name in ARCHITECTURES}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--architecture", choices=list(names), required=True)
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of 1024 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    begin(args.seed, args.threads)
    tokenizer = AutoTokenizer.from_pretrained(DATA / "demo")
    model = new_model(names[args.architecture], tokenizer)
    soft = args.out.with_name(f"{args.out.name}-soft")
    train(model, tokenizer, args.steps)
    if args.architecture == "qwen2":
        model.resize_token_embeddings(QWEN2_ROWS, mean_resizing=False)
    save(model, tokenizer, soft)
    harden_folder(soft, args.out)


if __name__ == "__main__":
    main()
