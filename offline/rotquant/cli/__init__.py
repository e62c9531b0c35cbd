"""The command line: `rotquant VERB`. Each verb is one Python call; heavy imports happen inside it.

Results go to stdout, progress and logs to stderr. Exit codes: 0 success, 1 a failure nobody foresaw (or,
for doctor, a problem found), 2 bad input or usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version

from rotquant.cli import environment, making, measuring
from rotquant.cli.verb import Help
from rotquant.common.faults import is_disk_full
from rotquant.common.large_pages import ask_torch
from rotquant.common.signals import ctrl_c_remembered
from rotquant.errors import RotQuantError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(arguments)
    # Threads that wait must sleep: spinning, they take the core that the last one needs, and on a busy
    # machine quantizing becomes many times slower. Read by OpenMP when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ask_torch()
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


def parser() -> argparse.ArgumentParser:
    """The whole command line as an argparse parser; `args.run(args)` runs the chosen verb."""
    top = argparse.ArgumentParser(
        prog="rotquant",
        formatter_class=Help,
        description="Quantize a model to 4-bit weights, activations and KV cache, and serve it with vLLM.",
        epilog="first steps:\n"
        "  rotquant demo        see everything work on a real chat model\n"
        "  rotquant doctor      what this machine has, and which --scheme pays on it\n"
        "  rotquant quantize Qwen/Qwen3-0.6B -o qwen3-w4 --calibration text.txt\n"
        "  vllm serve qwen3-w4 --quantization rotquant\n\n"
        "text.txt is text like that which the model will see. Words such as recipe, scheme and site are explained in"
        " docs/how-it-works.md.\n"
        "`rotquant VERB --help` explains each verb with examples.",
    )
    top.add_argument("--version", action="version", version=f"rotquant {version('rotquant')}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (
        making.add_quantize,
        measuring.add_eval,
        measuring.add_inspect,
        measuring.add_compare,
        making.add_adapter,
        making.add_draft,
        environment.add_recipes,
        environment.add_doctor,
        environment.add_build,
        environment.add_demo,
    ):
        add(verbs)
    return top
