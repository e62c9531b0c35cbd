"""Every number that needs a GPU, with one command, on a machine that may have no network.

    python benchmarks/gpu.py --dry-run                     list the steps; check all that needs no GPU
    python benchmarks/gpu.py                               everything, about 25 minutes on an H200
    python benchmarks/gpu.py --vllm-bundle DIR             with vLLM unpacked in DIR, or packed there (*.tar.xz)
    python benchmarks/gpu.py --steps 'check *,attention *' --output results.json
    python benchmarks/gpu.py --report results.json         the tables of an earlier run
    python benchmarks/gpu.py --part A --vllm-bundle DIR    where a GPU is held for minutes: in 320 s, whether it runs,
                                                           is right, where the time goes; then mend, and --part B
    python benchmarks/gpu.py --part A --rehearse           the same without a GPU: every phase, on toy shapes

First every op is compared with its specification, then kernels are timed against their peers, then vLLM serves a
model of Llama-3-8B's shape with random weights in bf16, fp8, W4A16 and rotquant's format. Nothing is installed or
downloaded; the plugin need not be installed either. Each step is a process of its own with a time limit, and the
results (JSON, tables beside it) are written after each: a run that is cut short leaves what it had.

Times are medians of CUDA events around replays of a CUDA graph, the L2 cache flushed before each.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT, ROOT / "offline", ROOT / "kernels", Path(__file__).parent]
sys.path[:0] = [str(folder) for folder in SOURCES]

import gpu_checks  # noqa: E402
import gpu_kernels  # noqa: E402
import gpu_serve  # noqa: E402
import gpu_session  # noqa: E402
from kernels_report import table  # noqa: E402


@dataclass(frozen=True)
class Step:
    """Args: seconds: time limit; run: measures, on the GPU; validate: what can be known without one, in words."""

    seconds: int
    run: Callable[[], dict[str, Any]]
    validate: Callable[[], str]


def all_steps() -> dict[str, Step]:
    """In the order in which they are worth having."""
    steps = {"environment": Step(120, gpu_kernels.environment, lambda: str(gpu_kernels.environment()["peers"]))}
    for op in gpu_checks.CASES:
        steps[f"check {op}"] = Step(
            240, lambda op=op: gpu_checks.check(op, "cuda"), lambda op=op: str(gpu_checks.check(op, "cpu", quick=True))
        )
    for kind, problems in gpu_kernels.PROBLEMS.items():
        for problem in problems:
            steps[f"{kind} {problem}"] = Step(
                240, lambda p=problem: gpu_kernels.measure(p), lambda p=problem: gpu_kernels.validate(p)
            )
    for name in gpu_serve.FORMATS:
        for load in gpu_serve.LOADS:
            steps[f"serve {name} {load}"] = Step(
                420, lambda n=name, w=load: gpu_serve.measure(n, w), lambda n=name, w=load: gpu_serve.validate(n, w)
            )
    return steps


def environment(bundle: Path | None, work: Path) -> dict[str, str]:
    """Variables of the steps: where packages lie, the bundle's first. Unpacks the bundle where it is packed."""
    paths = [str(folder) for folder in SOURCES]
    if bundle:
        packed = next(iter(sorted(bundle.glob("*.tar.xz"))), None)
        site = work / "site" if packed else bundle
        if packed and not site.exists():
            site.mkdir(parents=True)
            subprocess.run(["tar", "-xJf", packed, "-C", site], check=True)
        paths.insert(0, str(site))
    try:
        importlib.metadata.distribution("rotquant")
    except importlib.metadata.PackageNotFoundError:
        paths.append(str(write_metadata(work / "plugin")))
    return {
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "ROTQUANT_GPU_WORK": str(work),
        "HF_HUB_OFFLINE": "1",
    }


def write_metadata(folder: Path) -> Path:
    """What an installation would tell Python: name, version and the entry point by which vLLM finds the plugin."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"rotquant-{project['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rotquant\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


def run_step(name: str, step: Step, variables: dict[str, str]) -> dict[str, Any]:
    """One step in its own process: its result, or under "error" why there is none."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder, "answer.json"), Path(folder, "log")
        command = [sys.executable, __file__, "--only", name, "--output", str(answer)]
        with log.open("w") as out:
            process = subprocess.Popen(
                command, env=os.environ | variables, stdout=out, stderr=out, start_new_session=True
            )
            try:
                process.wait(step.seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)  # the step's own processes, vLLM's among them
                process.wait()
        text = log.read_text(errors="replace")
        if answer.exists():
            result = json.loads(answer.read_text())
        else:
            late = time.monotonic() - started >= step.seconds
            reason = f"no result after {step.seconds} s" if late else f"ended with {process.returncode}"
            result = {"error": reason, "log": text[-4000:]}
    return result | {"step_seconds": round(time.monotonic() - started, 1)}


def report(results: dict[str, Any]) -> str:
    """All tables in Markdown."""
    parts, done = [], results["steps"]
    parts.append(gpu_checks.report({n: r for n, r in done.items() if n.startswith("check ")}))
    parts += [gpu_kernels.report({n: r for n, r in done.items() if n.startswith(k)}) for k in gpu_kernels.PROBLEMS]
    parts.append(gpu_serve.report({n: r for n, r in done.items() if n.startswith("serve ")}))
    failed = [[name, result["error"]] for name, result in done.items() if "error" in result]
    if failed:
        parts.append(table(["step without a result", "why"], failed))
    return "\n\n".join(filter(None, parts)) + "\n"


def save(results: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    output.with_suffix(".md").write_text(report(results))


def dry_run(steps: dict[str, Step]) -> int:
    """Prints the steps and what they would do; returns how many can be seen to fail already."""
    broken = 0
    for name, step in steps.items():
        try:
            said = step.validate()
        except Exception as error:  # of a step: the others are looked at all the same
            said, broken = f"BROKEN: {type(error).__name__}: {error}", broken + 1
        print(f"{name}  (at most {step.seconds} s): {said}", flush=True)
    print(f"{len(steps)} steps, {broken} broken")
    return broken


def arguments() -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=form)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="list the steps and check what needs no GPU")
    add("--steps", default="*", help="only these, patterns separated by commas (default: all)")
    add("--vllm-bundle", type=Path, metavar="DIR", help="folder with an unpacked vLLM, or with a packed one")
    add("--work", type=Path, default=ROOT / "build" / "gpu", metavar="DIR", help="for models (default: build/gpu)")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json", metavar="FILE")
    add("--report", type=Path, metavar="FILE", help="print the tables of these results and end")
    add("--part", choices=("A", "B"), help="a session of phases (gpu_session.py); results in $OUT where that is set")
    add("--budget", type=float, default=320, metavar="SECONDS", help="of a part (default: 320)")
    add("--rehearse", action="store_true", help="a part on the CPU, with toy shapes")
    add("--only", help=argparse.SUPPRESS)  # a step, in this process
    add("--phase", help=argparse.SUPPRESS)  # of a part, in this process
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.report:
        print(report(json.loads(args.report.read_text())))
        return 0
    if args.phase:
        gpu_session.phase(args.part, args.phase)
        return 0
    if args.part:
        folder = Path(os.environ.get("OUT") or args.output.parent)
        variables = environment(args.vllm_bundle, args.work) | {"ROTQUANT_CPU_TIER": "reference"}
        variables |= {"ROTQUANT_GPU_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""} if args.rehearse else {}
        budget, patience = (3600, 10) if args.rehearse else (args.budget, 1)  # of a CPU nobody knows the speed
        return 1 if gpu_session.session(args.part, folder, budget, variables, patience) else 0
    if args.only:
        args.output.write_text(json.dumps(all_steps()[args.only].run()))
        return 0
    patterns = args.steps.split(",")
    steps = {n: s for n, s in all_steps().items() if any(fnmatch.fnmatch(n, pattern) for pattern in patterns)}
    if args.dry_run:
        return 1 if dry_run(steps) else 0
    variables = environment(args.vllm_bundle, args.work)
    results: dict[str, Any] = {"started": time.strftime("%Y-%m-%d %H:%M:%S %z"), "steps": {}}
    for number, (name, step) in enumerate(steps.items(), 1):
        print(f"[{number}/{len(steps)}] {name}", file=sys.stderr, flush=True)
        found = results["steps"][name] = run_step(name, step, variables)
        print(f"  {found.get('error') or 'done'} ({found['step_seconds']} s)", file=sys.stderr, flush=True)
        save(results, args.output)
    print(report(results))
    return 1 if any("error" in result for result in results["steps"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
