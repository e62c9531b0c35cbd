"""The verbs that measure: eval, inspect, compare."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rotquant.cli.verb import Verbs, add_verb, positive
from rotquant.errors import RotQuantError


def add_eval(verbs: Verbs) -> None:
    add = add_verb(
        verbs,
        "eval",
        _eval,
        "measure the perplexity of a model or checkpoint on a text file",
        "rotquant eval llama-w4 --text held_out.txt\n"
        "  rotquant eval llama-w4 --text held_out.txt --engine vllm          through vLLM and the served kernels\n"
        "  rotquant eval meta-llama/Llama-3.2-1B --text held_out.txt --json  the full-precision model",
        more="Both engines score the same windows with the same arithmetic, so their numbers can be compared.",
    ).add_argument
    add("model", metavar="OUT|MODEL", help="checkpoint folder, or any Hugging Face model (folder or hub id)")
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    add("--tokens", type=positive, metavar="N", help="use only the first N tokens of the text (default: all)")
    add("--seq-len", type=positive, metavar="L", help="tokens in a window (default: 2048, or the model's limit)")
    add(
        "--engine",
        default="torch",
        choices=["torch", "vllm"],
        help="torch: the served ops in transformers; vllm: the server",
    )
    add("--max-model-len", type=positive, metavar="N", help="vllm: the server's flag (default: as without it)")
    add("--enforce-eager", action="store_true", help="vllm: the server's flag; starts faster and rounds otherwise")
    add("--json", action="store_true", help="print one JSON object instead of text")


def _eval(args: argparse.Namespace) -> int:
    from rotquant.measure.evaluate import evaluate

    score = evaluate(
        args.model,
        args.text,
        tokens=args.tokens,
        seq_len=args.seq_len,
        engine=args.engine,
        max_model_len=args.max_model_len,
        enforce_eager=args.enforce_eager,
    )
    print(json.dumps(score.as_dict()) if args.json else score)
    return 0


def add_inspect(verbs: Verbs) -> None:
    add = add_verb(
        verbs,
        "inspect",
        _inspect,
        "show by layer and site how hard a model is to quantize, before and after",
        "rotquant inspect meta-llama/Llama-3.2-1B                                    what is in the way of 4 bits\n"
        "  rotquant inspect llama-w4 --against meta-llama/Llama-3.2-1B --html report.html  what the rotations did\n"
        "  rotquant inspect out-quarot --against out-rtn --json > figures.json         two checkpoints",
        more="Runs the model over a text and looks at the inputs of its linears, at K and V as the cache gets them,\n"
        "and at the weights. Reading the columns (- the lower the better, + the higher the better):\n"
        "  peak/RMS   -  largest |x| of a token over its RMS: 1 flat, 3 Gaussian\n"
        "  GSR        -  step over standard deviation; rounding costs GSR²/12\n"
        "  kurtosis   -  1.8 uniform, 3 Gaussian, large: few channels hold the energy\n"
        "  difficulty -  how unequal the channels' norms are, 0 to 1\n"
        "  QSUR       +  share of the quantizer's range that is filled, 1 for a ball\n"
        "  SNR        +  energy over quantization error of 4-bit inputs and KV, in dB\n"
        "  massive       tokens whose peak is over 10 times that of the median token\n"
        "Sites: h residual stream; attn_in, o_in, mlp_in, down_in inputs of q/k/v, o, gate/up, down; k, v the cache.",
    ).add_argument
    add("model", metavar="OUT|MODEL", help="checkpoint folder, or a full-precision model (folder or hub id)")
    add(
        "--against", metavar="OTHER", help="the model before, usually the original: every figure becomes before → after"
    )
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to run (default: bundled text)")
    add("--tokens", type=positive, default=4096, metavar="N", help="use only the first N tokens of the text")
    add("--seq-len", type=positive, metavar="L", help="tokens in a window (default: 512, or the model's limit)")
    add("--html", type=Path, metavar="REPORT", help="also write a report with plots, one file that needs no network")
    add("--json", action="store_true", help="print one JSON object instead of text")


def _inspect(args: argparse.Namespace) -> int:
    from rotquant.measure.inspection import inspect

    if args.html and (args.html.is_dir() or not args.html.absolute().parent.is_dir()):
        raise RotQuantError(f"--html {args.html}: must be a file in a folder that exists")
    found = inspect(args.model, against=args.against, text=args.text, tokens=args.tokens, seq_len=args.seq_len)
    if args.html:
        args.html.write_text(found.html(), encoding="utf-8")
        print(f"report: {args.html}", file=sys.stderr)
    print(json.dumps(found.as_dict()) if args.json else found)
    return 0


def add_compare(verbs: Verbs) -> None:
    add = add_verb(
        verbs,
        "compare",
        _compare,
        "compare recipes on one model: perplexity, KL to full precision, time, memory, online cost",
        "rotquant compare ./model --recipes rtn,quarot -o runs                go on after Ctrl-C: the same command\n"
        "  rotquant compare ./model --recipes all --text held_out.txt --seeds 5\n"
        "  rotquant compare ./model --recipes quarot,no-r4@quarot:rotations.r4=none,mine.yaml --markdown",
        more="A recipe is `[LABEL@]NAME|FILE.yaml[:KEY=VALUE,...]`. Each recipe and seed is quantized and measured in\n"
        "a process of its own. Finished runs are kept in -o or --json and not repeated. Exit code 1 if a run failed.",
    ).add_argument
    add("model", metavar="MODEL", help="local folder or hub id of a causal language model (families: docs/models.md)")
    add("--recipes", required=True, metavar="A,B,...", help="recipes to compare, or `all` that are shipped")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to measure on (default: the bundled held-out text)")
    add("--tokens", type=positive, metavar="N", help="use only the first N tokens of the text (default: all)")
    add("--seq-len", type=positive, metavar="L", help="tokens in a window (default: 2048, or the model's limit)")
    add("--samples", type=positive, metavar="N", help="calibration windows (default: the recipe's)")
    add("--calibration", metavar="FILE|DATASET", help="text to calibrate on: .txt, .jsonl or a hub dataset")
    add("--calibration-seq-len", type=positive, metavar="L", help="tokens in a calibration window")
    add("--seeds", type=positive, default=3, metavar="N", help="seeds 0 to N-1 for each recipe")
    add("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE",
        help="change one key of every recipe; repeatable")  # fmt: skip
    add("-o", "--output", type=Path, metavar="FOLDER", help="keep checkpoints and results.json here")
    add("--json", type=Path, dest="results", metavar="FILE", help="keep every run's numbers in this file")
    add("--profile", default="full", choices=["full", "portable"], help="as for quantize")
    add("--markdown", action="store_true", help="print the table in Markdown")


def _compare(args: argparse.Namespace) -> int:
    from rich.console import Console

    from rotquant.measure.compare import compare

    comparison = compare(
        args.model,
        args.recipes,
        text=args.text,
        tokens=args.tokens,
        seq_len=args.seq_len,
        samples=args.samples,
        calibration=args.calibration,
        calibration_seq_len=args.calibration_seq_len,
        seeds=args.seeds,
        settings=args.settings,
        output=args.output,
        results=args.results,
        profile=args.profile,
    )
    if args.markdown:
        print(comparison.markdown())
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(comparison.table())
    return 1 if comparison.failed else 0
