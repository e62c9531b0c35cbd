"""Serves one model in several formats with vLLM on this machine and puts each under the same load.

    python benchmarks/serve.py --quick --shape tiny --output build/benchmarks/smoke.json    does it work here?
    python benchmarks/serve.py                                     the whole benchmark; hours on a small CPU
    python benchmarks/serve.py --formats bf16,rotquant-w4a4kv4 --rounds 1 --load 512:64:8
    python benchmarks/serve.py --model Qwen/Qwen2.5-0.5B-Instruct  a real model instead of a random one
    python benchmarks/serve.py --report benchmarks/results/serve.json    table and plots again, nothing is run

Formats: bf16; w8a8 and w4a16, as stock vLLM runs them on a CPU; rotquant-w4a4kv4 and rotquant-w4a8kv4. Each has
a `vllm serve` process of its own, with the same flags and threads; stock formats run without any plugin. On
request: float32, another baseline where a CPU has no bf16 instructions (avx512_bf16, amx_bf16); w8a8-head8,
whose lm_head is int8 as rotquant's is, while w8a8 and w4a16 keep it in bf16, as is usual; bf16-fp8kv; and
rotquant's two as `best` makes them (-best), with shifts, asymmetric activations and error feedback of keys,
or as `best-online` does (-best-online), with a low-rank branch of the inputs besides. A round starts every
format once (A B C A B C ...), so that a machine whose speed drifts is unkind to all alike; with --together
all are up at once and a round takes minutes. The tables hold medians over the rounds.

Results are written after every step: run the same command again to go on where it stopped. Tables go to
stdout, progress to stderr; next to the JSON file lie the same tables (.md) and the plots (.svg, .png).
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

import machine
import rotquant
import serve_report
from rotquant.common.progress import clock, say
from rotquant.common.signals import terminated_like_interrupted
from rotquant.errors import RotQuantError
from serve_candidate import Candidate, Load, bench
from serve_models import DEFAULT, FORMATS, SHAPES, prepare, size_on_disk

ROOT = Path(__file__).resolve().parents[1]
QUICK = (Load(128, 16, 2, concurrency=1), Load(128, 16, 8), Load(512, 16, 4))
FULL = (
    Load(128, 128, 3, concurrency=1),
    Load(1024, 128, 1, concurrency=1),
    Load(128, 128, 16),
    Load(1024, 128, 8),
    Load(3072, 64, 4),
    Load(128, 64, 8, rate=0.05),
    Load(128, 64, 8, rate=0.1),
    Load(128, 64, 16, rate=0.2),
)
WARM_UP = Load(64, 8, 2)  # once a server: the first request pays for what later ones find done


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code: 0 where every step has a result."""
    args = parser().parse_args(argv)
    try:
        if args.report:
            results = serve_report.Results(args.report)
        else:
            results = serve_report.Results(args.output or default_output(args.quick), settings(args))
            with terminated_like_interrupted():
                run(args, results)
        serve_report.write(results.data, results.file)
        failed = [record for record in results.data["runs"] + results.data["servers"] if "error" in record]
        for record in failed:
            say(f"round {record['round']} {record['format']} {record.get('load', 'server')}: {record['error']}")
        return 1 if failed else 0
    except RotQuantError as error:
        say(f"serve.py: error: {error}")
        return 2
    except KeyboardInterrupt:
        say("serve.py: interrupted; the same command goes on where it stopped")
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = top.add_argument_group("what is served")
    what.add_argument("--shape", default="qwen2.5-0.5b", choices=SHAPES,
        help="random model of this shape (default: %(default)s)")  # fmt: skip
    what.add_argument("--model", metavar="PATH|ID", help="a real bf16 model: folder or hub id")
    what.add_argument("--formats", type=formats, default=list(DEFAULT), metavar="A,B,...",
        help=f"some of {', '.join(FORMATS)} (default: {','.join(DEFAULT)})")  # fmt: skip
    what.add_argument("--work", type=Path, default=ROOT / "build" / "benchmarks", metavar="DIR",
        help="where made models and logs are kept (default: build/benchmarks)")  # fmt: skip
    how = top.add_argument_group("the load")
    how.add_argument("--quick", action="store_true", help="three short loads, one round")
    how.add_argument("--load", type=Load.parse, action="append", dest="loads", metavar="IN:OUT:N[:RATE[:MAX]]",
        help="a load of your own instead of the preset; repeatable: N requests of IN input and OUT output tokens, "
        "RATE a second (inf: all at once), at most MAX in flight (0: no limit)")  # fmt: skip
    how.add_argument("--rounds", type=int, metavar="N", help="times each format is started (default: 3, quick: 1)")
    how.add_argument("--together", action="store_true",
        help="all formats up at once, each stopped while others are under load: rounds of minutes, so that all meet "
        "the same moods of the machine; takes memory for all of them")  # fmt: skip
    how.add_argument("--timeout", type=float, default=1800, metavar="S",
        help="give a load up after this many seconds (default: %(default)s)")  # fmt: skip
    server = top.add_argument_group("the server, the same for all formats")
    server.add_argument("--kv-gib", type=int, default=1, metavar="N", help="size of the KV cache (default: 1)")
    server.add_argument("--threads-bind", default="auto", metavar="CPUS",
        help="VLLM_CPU_OMP_THREADS_BIND, e.g. 0-3 (default: auto, which leaves one core to the engine)")  # fmt: skip
    server.add_argument("--max-model-len", type=int, default=4096, metavar="N", help="(default: %(default)s)")
    server.add_argument("--max-num-seqs", type=int, default=32, metavar="N", help="(default: %(default)s)")
    server.add_argument("--vllm-args", type=shlex.split, default=[], metavar="'ARGS'",
        help="more arguments of `vllm serve`; with =, e.g. --vllm-args='--max-num-batched-tokens 512'")  # fmt: skip
    out = top.add_argument_group("results")
    out.add_argument("--output", type=Path, metavar="FILE.json",
        help="(default: benchmarks/results/serve.json, with --quick serve-quick.json)")  # fmt: skip
    out.add_argument("--report", type=Path, metavar="FILE.json", help="only make tables and plots from this file")
    return top


def formats(text: str) -> list[str]:
    """The formats of a comma-separated list."""
    names = text.split(",")
    for name in names:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(f"no format {name!r}; take some of {', '.join(FORMATS)}")
    return names


def default_output(quick: bool) -> Path:
    return ROOT / "benchmarks" / "results" / ("serve-quick.json" if quick else "serve.json")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What must not change within one file of results."""
    return {
        "model": Path(args.model).name if args.model else f"{args.shape} (random weights)",
        "cpu": cpu(),
        "vllm": version("vllm"),
        "torch": version("torch"),
        "environment": {
            "VLLM_CPU_KVCACHE_SPACE": str(args.kv_gib),
            "VLLM_CPU_OMP_THREADS_BIND": args.threads_bind,
        },
        "arguments": [
            "--dtype", "bfloat16", "--max-model-len", str(args.max_model_len), "--max-num-seqs", str(args.max_num_seqs),
            # Same prompts in every format, and a larger cache must not win by remembering them.
            "--no-enable-prefix-caching",
            *args.vllm_args,
        ],
    }  # fmt: skip


def cpu() -> dict[str, Any]:
    """Name of the processor, how many of them this process may use, and the instructions that matter here."""
    about = machine.describe()
    return {"name": about["cpu"], "count": about["cpus"], "instructions": about["flags"]}


# ---- running ----------------------------------------------------------------------------------------


def run(args: argparse.Namespace, results: serve_report.Results) -> None:
    """Makes the models, then measures what the results do not hold yet."""
    # Imported before the first server: pages of libraries that this process shares count less in a server's PSS.
    import vllm.benchmarks.serve  # noqa: F401

    loads = args.loads or (QUICK if args.quick else FULL)
    rounds = args.rounds or (1 if args.quick else 3)
    folders: dict[str, Path] = {}
    for name in args.formats:
        checkpoint = FORMATS[name].checkpoint
        folders[name], seconds = prepare(args.work, args.shape, args.model, checkpoint)
        size = size_on_disk(folders[name])
        results.data["models"][name] = {"bytes": size, "seconds_to_make": seconds}
    results.save()
    if args.together:
        together(args, results, rounds, folders, list(loads))
        return
    for number in range(1, rounds + 1):
        for name in args.formats:
            missing = [load for load in loads if not results.done(number, name, load.name)]
            if missing:
                say(f"round {number} of {rounds}: {name}, {len(missing)} loads")
                measure(args, results, number, name, folders[name], missing)


def measure(
    args: argparse.Namespace, results: serve_report.Results, number: int, name: str, folder: Path, loads: list[Load]
) -> None:
    """Starts one format and runs the loads; what goes wrong is noted, and the benchmark goes on."""
    record = describe(results, number, name)
    try:
        with candidate(args, results, record, folder) as server:
            up(args, results, record, server)
            run_loads(args, results, number, name, server, loads)
            results.add("servers", record | {"memory_after_loads": server.memory()})
    except RotQuantError as error:
        say(str(error))
        results.add("servers", record | {"error": str(error).partition(";")[0]})  # what follows names files


def together(
    args: argparse.Namespace, results: serve_report.Results, rounds: int, folders: dict[str, Path], loads: list[Load]
) -> None:
    """As `measure`, all formats up at once: each is stopped as a process while others are under load.

    Raises:
        RotQuantError: one of them did not start, or ended.
    """
    with ExitStack() as stack:
        servers: dict[str, Candidate] = {}
        for name, folder in folders.items():
            record = describe(results, 1, name)
            servers[name] = stack.enter_context(candidate(args, results, record, folder))
            up(args, results, record, servers[name])
            servers[name].pause()
        for number in range(1, rounds + 1):
            for name, server in servers.items():
                missing = [load for load in loads if not results.done(number, name, load.name)]
                if missing:
                    say(f"round {number} of {rounds}: {name}, {len(missing)} loads")
                    server.resume()
                    run_loads(args, results, number, name, server, missing)
                    server.pause()


def describe(results: serve_report.Results, number: int, name: str) -> dict[str, Any]:
    """What is noted of a server before it starts."""
    arguments = [*results.data["settings"]["arguments"], *FORMATS[name].arguments]
    # An empty VLLM_PLUGINS disables every plugin, so that stock formats are vLLM's own.
    environment = results.data["settings"]["environment"] | ({"VLLM_PLUGINS": ""} if FORMATS[name].stock else {})
    return {
        "round": number, "format": name, "arguments": arguments, "environment": environment, "commit": commit(),
    }  # fmt: skip


def candidate(
    args: argparse.Namespace, results: serve_report.Results, record: dict[str, Any], folder: Path
) -> Candidate:
    """The server that `describe` has described."""
    log = args.work / "logs" / results.file.stem / f"{record['format']}-{record['round']}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    return Candidate(folder, log, record["environment"], record["arguments"])


def up(args: argparse.Namespace, results: serve_report.Results, record: dict[str, Any], server: Candidate) -> None:
    """Waits for a server, has it serve two requests, and completes its record."""
    server.wait()
    record["start_seconds"] = time.monotonic() - server.started
    record |= {"kv_tokens": server.kv_tokens(), "kernels": server.kernels(FORMATS[record["format"]].stock)}
    record["memory_after_start"] = server.memory()
    if error := bench(server, WARM_UP, 0, args.timeout).get("error"):
        raise RotQuantError(f"the first two requests: {error}; the log is {server.log}")
    results.add("servers", record)


def run_loads(
    args: argparse.Namespace, results: serve_report.Results, number: int, name: str, server: Candidate,
    loads: list[Load],
) -> None:  # fmt: skip
    for load in loads:
        key = {"round": number, "format": name, "load": load.name, "load_average": psutil.getloadavg()[0]}
        started = time.monotonic()
        result = bench(server, load, seed=number, timeout=args.timeout)  # same seeds for all formats
        results.add("runs", key | vars(load) | {"rate": str(load.rate)} | result)
        outcome = result.get("error") or f"{result['output_throughput']:.1f} output tokens/s"
        say(f"  {load.name}: {outcome} ({clock(time.monotonic() - started)})")
        if server.process.poll() is not None:
            raise RotQuantError(f"vLLM ended during {load.name}; its log is {server.log}")


def commit() -> str:
    """The commit of the rotquant that runs, with a + where files differ from it; "" outside a checkout."""
    folder = str(Path(rotquant.__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    # vLLM is imported here for its load generator only; the server's log stays as it is (see rotquant.service.server).
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    code = main()
    sys.stdout.flush()
    os._exit(code)  # an ordinary exit prints pages about objects that Triton leaks
