"""The verbs that write checkpoints, and what goes with them: quantize, adapter, draft."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from rotquant.cli.verb import Verbs, add_verb, positive


def add_quantize(verbs: Verbs) -> None:
    add = add_verb(
        verbs,
        "quantize",
        _quantize,
        "turn a Hugging Face model into a rotated 4-bit checkpoint",
        "rotquant quantize meta-llama/Llama-3.2-1B -o llama-w4 --calibration notes.txt\n"
        "  rotquant quantize ./model -o out --recipe rtn               no calibration text needed\n"
        "  rotquant quantize ./model -o out --scheme auto              8-bit activations where they pay most\n"
        "  rotquant quantize ./model -o out --target sm_86             as int4 tensor cores of an RTX 3090 read it\n"
        "  rotquant quantize ./model -o out --set kv.bits=16           a recipe with one key changed\n"
        "  rotquant quantize ./model -o out --resume                   go on after Ctrl-C or a crash",
        more="Works layer by layer: memory stays near that of two layers and the vocabulary's tables, whatever their"
        " number; recipes that learn end to end (spinquant, ostquant) hold the whole model.",
    ).add_argument
    add("model", metavar="MODEL", help="local folder or hub id of a causal language model (families: docs/models.md)")
    add("-o", "--output", metavar="OUT", required=True, help="folder to write; must not exist, except to --resume")
    add("--recipe", default="best", metavar="NAME|FILE", help="shipped recipe (`rotquant recipes`) or a .yaml file")
    add("--scheme", choices=["w4a4kv4", "w4a8kv4", "auto"],
        help="bits of weights, activations and KV cache, with any recipe (default: what the recipe says); auto: 4-bit"
        " activations, but 8-bit ones where 4 bits do most damage, found by measuring. `rotquant doctor` says which"
        " pays on this machine")  # fmt: skip
    add("--target", choices=["cpu", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"],
        help="device to serve on. sm_80, sm_86, sm_89 (A100; RTX 30xx, A10; RTX 40xx, L4, L40S) have int4 tensor cores:"
        " what their kernels read, which is symmetric activations, one scale a channel, no low-rank branch. The others"
        " multiply 4-bit activations in int8, where 8-bit ones cost little: w4a8kv4, unless --scheme says otherwise;"
        " cpu has lm_head in 8 bits, too. --set wins over both")  # fmt: skip
    add("--budget", metavar="N|P%|'P% KL'", help="of --scheme auto: at most so many of the (layer, site) pairs, or so"
        " large a share of them, get 8 bits (default: 25%%); or as few as bring the KL to full precision to at most so"
        " much: '5%% KL' is 0.05 nats a token, about 5%% of perplexity")  # fmt: skip
    add("--calibration", metavar="FILE|DATASET", help="text to calibrate on: .txt, .jsonl or a hub dataset")
    add("--samples", type=positive, metavar="N", help="calibration windows (default: the recipe's)")
    add("--seq-len", type=positive, metavar="L", help="tokens in a calibration window (default: the recipe's)")
    add("--device", default="auto", metavar="DEVICE",
        help="where to compute: cpu, cuda, or several, which share the calibration windows: cuda:0,cuda:1")  # fmt: skip
    add("--profile", default="full", choices=["full", "portable"],
        help="full: online rotations and 4-bit KV cache; portable: what plain transformers loads too")  # fmt: skip
    add("--tp-max", type=positive, default=1, metavar="N", help="largest tensor parallel size to serve with")
    add("--seed", type=int, default=0, metavar="S", help="same seed, same files")
    add("--effort", type=float, metavar="N", help="of recipes that choose by measuring (best, best-online): 0 none,"
        " 1 usual, 0.5 half the tokens and steps, 2 twice the layers too and more candidates")  # fmt: skip
    add("--resume", action="store_true", help="continue an interrupted run of the same command")
    add("--max-memory", type=float, metavar="GB", help="refuse a run that is estimated to need more")
    add("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE",
        help="change one key of the recipe, e.g. weights.method=rtn; repeatable")  # fmt: skip


def _quantize(args: argparse.Namespace) -> int:
    from rotquant.pipeline import quantize

    output = quantize(
        args.model,
        args.output,
        recipe=args.recipe,
        calibration=args.calibration,
        samples=args.samples,
        seq_len=args.seq_len,
        device=args.device,
        profile=args.profile,
        tp_max=args.tp_max,
        seed=args.seed,
        resume=args.resume,
        settings=[*args.settings, *([] if args.effort is None else [f"choose.effort={args.effort}"])],
        max_memory=args.max_memory,
        scheme=args.scheme,
        budget=args.budget,
        target=args.target,
    )
    folder = shlex.quote(str(output))
    print(
        f"{output} is ready. Next:\n"
        f"  vllm serve {folder} --quantization rotquant\n"
        f"  rotquant eval {folder} --text FILE --engine vllm\n"
        f"  lm_eval --model vllm --model_args pretrained={folder},quantization=rotquant --tasks TASK"
    )
    return 0


def add_adapter(verbs: Verbs) -> None:
    add = add_verb(
        verbs,
        "adapter",
        _adapter,
        "turn a LoRA adapter of the original model into one of its quantized checkpoint",
        "rotquant adapter ./my-lora --base llama-w4 -o my-lora-w4\n"
        "  vllm serve llama-w4 --quantization rotquant --enable-lora --lora-modules mine=my-lora-w4",
        more="A rotated checkpoint computes in another basis than its original, so an adapter that was trained on the\n"
        "original has to be turned, too. The turn is exact, and needs neither the original nor calibration text.\n"
        "`vllm serve` also turns an adapter of the original as it loads it: this verb does so once and for all.\n"
        "ADAPTER is what PEFT writes: adapter_config.json and adapter_model.safetensors, LoRA on linear layers.\n"
        "TURNED carries the checkpoint's hash, and is refused with any other checkpoint.",
    ).add_argument
    add("adapter", metavar="ADAPTER", help="PEFT LoRA adapter of the original model: local folder or hub id")
    add("--base", metavar="OUT", required=True, help="checkpoint that `rotquant quantize` made from that model")
    add("-o", "--output", metavar="TURNED", required=True, help="folder to write; must not exist")


def _adapter(args: argparse.Namespace) -> int:
    from rotquant.basis.turn_adapter import turn_folder

    output = turn_folder(args.adapter, args.base, args.output)
    base, folder = shlex.quote(args.base), shlex.quote(str(output))
    print(
        f"{output} is ready. Next:\n"
        f"  vllm serve {base} --quantization rotquant --enable-lora --lora-modules NAME={folder}"
    )
    return 0


def add_draft(verbs: Verbs) -> None:
    add = add_verb(
        verbs,
        "draft",
        _draft,
        "turn an EAGLE3 draft of the original model into the basis of a checkpoint",
        "rotquant draft ./llama-eagle3 --base llama-w4 -o llama-w4-eagle3\n"
        "  vllm serve llama-w4 --speculative-config \\\n"
        '    \'{"method": "eagle3", "model": "llama-w4-eagle3", "num_speculative_tokens": 3}\'',
        more="A draft reads the target's hidden states, which a rotated checkpoint has in another basis. Draft models\n"
        "(with all their layers) and ngram read tokens only: serve them as they are.",
    ).add_argument
    add("draft", metavar="DRAFT", help="EAGLE3 draft of the original model, in safetensors: local folder or hub id")
    add("--base", metavar="OUT", required=True, help="checkpoint that `rotquant quantize` made from that model")
    add("-o", "--output", type=Path, required=True, metavar="TURNED", help="folder to write; must not exist")


def _draft(args: argparse.Namespace) -> int:
    from rotquant.basis.draft import turn_draft

    output = turn_draft(args.draft, args.base, args.output)
    settings = json.dumps({"method": "eagle3", "model": str(output), "num_speculative_tokens": 3})
    print(
        f"{output} is ready. Next:\n  vllm serve {shlex.quote(args.base)} --speculative-config {shlex.quote(settings)}"
    )
    return 0
