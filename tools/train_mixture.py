"""Train a small mixture of experts on the sources of Python's own standard library, and make it hard to quantize.

    python tools/train_mixture.py build/models/qwen3-moe
    python tools/train_mixture.py build/models/mixtral --architecture mixtral --experts 8 --top-k 2

Results: a Hugging Face folder in OUT, which `models.harden` gave outlier channels without changing what it computes,
and as it was trained in OUT-soft. Tokenizer and texts are the demo model's. The demo model's attention sink is not
planted: it would be one expert's. The loss that balances experts is weak (--balance), so that their traffic stays
uneven: it is printed at the end, for each layer with experts.

`qwen2_moe` has a shared expert beside the routed ones. 700 steps take 25 minutes of one core.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from rotquant.learn.stream import product_dtype
from rotquant.measure.inspection.routing import choices_watched
from rotquant.models import describe
from rotquant.models.harden import harden_folder
from train_demo_model import DATA, begin, common_fields, rate, save, stdlib_sources, text_rows

LENGTH, ROWS, PEAK_LR, DECAY = 256, 8, 2e-3, 0.1
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64


def config_of(architecture: str, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Any:
    """`intermediate_size` is an expert's in Mixtral, in Qwen models that of layers without experts."""
    own: dict[str, dict[str, Any]] = {
        "qwen3_moe": {
            "intermediate_size": 4 * args.width, "moe_intermediate_size": args.width, "head_dim": HEAD_DIM,
            "norm_topk_prob": True, "num_local_experts": args.experts,
        },
        "qwen2_moe": {
            "intermediate_size": 4 * args.width, "moe_intermediate_size": args.width,
            "shared_expert_intermediate_size": 2 * args.width, "norm_topk_prob": True, "num_experts": args.experts,
        },
        "mixtral": {"intermediate_size": args.width, "head_dim": HEAD_DIM, "num_local_experts": args.experts},
    }  # fmt: skip
    return AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=HEADS * HEAD_DIM,
        num_hidden_layers=args.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_experts_per_tok=args.top_k,
        **common_fields(tokenizer),
        output_router_logits=True,
        router_aux_loss_coef=args.balance,
        **own[architecture],
    )


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int, out: Path) -> None:
    text = "\n\n".join(stdlib_sources()[0].values())
    stream = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    rows = text_rows(stream, tokenizer.bos_token_id, LENGTH, torch.Generator().manual_seed(seed))
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=DECAY)
    mixed = product_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16  # elsewhere it is emulated
    started, mean = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = PEAK_LR * rate(step, steps)
        ids = torch.stack([next(rows) for _ in range(ROWS)])
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        mean = loss.item() if not step else 0.95 * mean + 0.05 * loss.item()
        if step % 10 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps} loss {mean:.3f} {time.monotonic() - started:.0f} s", flush=True)
        if step % 100 == 99 or step + 1 == steps:
            model.config.output_router_logits = False
            save(model, tokenizer, out)
            model.config.output_router_logits = True


@torch.no_grad()
def traffic(folder: Path) -> dict[int, list[int]]:
    """By layer, the tokens of held-out text that go to each expert."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    arch = describe(model.config, class_name=type(model).__name__)
    ids = tokenizer((DATA / "heldout.txt").read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids
    with choices_watched(model, arch) as choices:
        for window in ids[0, : 16 * 512].split(512):
            model(window[None], use_cache=False)
    counts = {i: torch.cat(found).flatten() for i, found in choices.items()}
    return {i: found.bincount(minlength=arch.mixtures[i].count).tolist() for i, found in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--architecture", choices=["qwen3_moe", "qwen2_moe", "mixtral"], default="qwen3_moe")
    parser.add_argument("--steps", type=int, default=700, help="optimiser steps of 2048 tokens")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="channels of an expert")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the loss that balances experts")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    begin(args.seed, args.threads)
    tokenizer = AutoTokenizer.from_pretrained(DATA / "demo")
    model = AutoModelForCausalLM.from_config(config_of(args.architecture, tokenizer, args))
    soft = args.out.with_name(f"{args.out.name}-soft")
    train(model, tokenizer, args.steps, args.seed, soft)
    harden_folder(soft, args.out)
    for layer, counts in traffic(args.out).items():
        print(f"layer {layer}: {min(counts)} to {max(counts)} of {sum(counts)} choices an expert: {counts}")


if __name__ == "__main__":
    main()
