"""Tables of `kernels.py`'s results, in Markdown that reads well on a terminal too."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

OURS = {"linear": "rotquant-w4a4", "attention": "rotquant-kv4", "experts": "rotquant-w4a4"}
QUANTIZE = "rotquant-quantize"
Run = dict[str, Any]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are padded; the first column is flush left, the others right."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(headings, widths, strict=True)) + " |"]
    lines += ["|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"]
    for row in rows:
        padded = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("| " + " | ".join(padded) + " |")
    return "\n".join(lines)


def seconds(found: dict[str, Any], clock: str, threads: int) -> float | None:
    """Time of one call; by CPU time it is what the threads would take had they the machine for themselves."""
    if "skipped" in found:
        return None
    return found["wall_us"] * 1e-6 if clock == "wall" else found["cpu_us"] * 1e-6 / threads


def limit(results: Run, threads: int, name: str, clock: str) -> float | None:
    """The best rate seen before and after the run."""
    rates = [one.get(name, {}).get(clock) for one in results["limits"] if one["threads"] == threads]
    return max((rate for rate in rates if rate), default=None)


def read_limit(results: Run, threads: int, clock: str) -> float | None:
    rates = [limit(results, threads, name, clock) for name in ("read", "read_huge")]
    return max((rate for rate in rates if rate), default=None)


def share(rate: float, of: float | None) -> str:
    return f"{100 * rate / of:.0f}%" if of else "-"


def micro(time: float) -> str:
    return f"{1e6 * time:.0f}" if time >= 1e-4 else f"{1e6 * time:.1f}"


def cell(time: float | None, ours: float | None) -> str:
    """Microseconds, and how many times ours it takes."""
    if time is None:
        return "-"
    return micro(time) + (f" ({time / ours:.2f}x)" if ours else "")


def timed(runs: Sequence[Run]) -> list[str]:
    """Names of the peers that ran at least once, in their order."""
    names: dict[str, None] = {}
    for run in runs:
        names |= {name: None for name, found in run["kernels"].items() if "skipped" not in found}
    return list(names)


def linear_table(results: Run, runs: Sequence[Run], threads: int, clock: str) -> str:
    """Ours first, with its share of the machine's limits and of quantization; then every peer."""
    ours_name = OURS["linear"]
    peers = [name for name in timed(runs) if name not in (ours_name, QUANTIZE)]
    reading, multiplying = read_limit(results, threads, clock), limit(results, threads, "int8", clock)
    rows = []
    for run in runs:
        k, n, m = run["case"]["k"], run["case"]["n"], run["rows"]
        times = {name: seconds(found, clock, threads) for name, found in run["kernels"].items()}
        ours, quantize = times.get(ours_name), times.get(QUANTIZE)
        row = [f"{k}x{n}", str(m), cell(ours, None)]
        if ours:
            row += [
                share(run["kernels"][ours_name]["bytes"] / ours, reading),
                share(2.0 * m * n * k / ours, multiplying),
            ]
            row += [share(quantize, ours) if quantize else "-"]
        else:
            row += ["-"] * 3
        rows.append([*row, *(cell(times.get(name), ours) for name in peers)])
    return table(["KxN", "M", f"{ours_name} µs", "of read", "of int8", "quantize", *peers], rows)


def attention_table(results: Run, runs: Sequence[Run], threads: int, clock: str) -> str:
    ours_name = OURS["attention"]
    peers = [name for name in timed(runs) if name != ours_name]
    reading = read_limit(results, threads, clock)
    rows = []
    for run in runs:
        case, found = run["case"], run["kernels"].get(ours_name, {"skipped": ""})
        times = {name: seconds(one, clock, threads) for name, one in run["kernels"].items()}
        ours = times.get(ours_name)
        heads = f"{case['heads']}/{case['kv_heads']}/{case['dim']}"
        row = [case["work"], heads, str(case["context"]), str(case["batch"]), cell(ours, None)]
        row += [share(found["bytes"] / ours, reading) if ours and found["bytes"] else "-"]
        row += [f"{found[name]:.3f}" if name in found else "-" for name in ("error", "cache_error")]
        rows.append([*row, *(cell(times.get(name), ours) for name in peers)])
    headings = ["work", "heads", "tokens", "batch", f"{ours_name} µs", "of read", "kernel error", "cache error"]
    return table([*headings, *peers], rows)


def experts_table(results: Run, runs: Sequence[Run], threads: int, clock: str) -> str:
    ours_name = OURS["experts"]
    peers = [name for name in timed(runs) if name != ours_name]
    reading = read_limit(results, threads, clock)
    rows = []
    for run in runs:
        times = {name: seconds(one, clock, threads) for name, one in run["kernels"].items()}
        ours = times.get(ours_name)
        of_read = share(run["kernels"][ours_name]["bytes"] / ours, reading) if ours else "-"
        sizes = ":".join(str(run["case"][name]) for name in ("hidden", "experts", "width", "top"))
        rows.append([sizes, str(run["rows"]), cell(ours, None), of_read, *(cell(times.get(p), ours) for p in peers)])
    return table(["hidden:experts:width:top", "M", f"{ours_name} µs", "of read", *peers], rows)


def check_table(results: Run) -> str:
    """What every peer computes, how exactly, how steadily it was timed, or why it did not run."""
    rows = []
    for section in OURS:
        runs = [run for run in results["runs"] if run["section"] == section]
        for name in {name: None for run in runs for name in run["kernels"]}:
            found = [run["kernels"][name] for run in runs if name in run["kernels"]]
            ran = [one for one in found if "skipped" not in one]
            why = sorted({one["skipped"] for one in found if "skipped" in one})
            errors = [one["error"] for one in ran if "error" in one]
            inputs = [one["activation_error"] for one in ran if "activation_error" in one]
            rows.append([
                section, name, results["formats"][section].get(name, "-"),
                f"{max(errors):.5f}" if errors else "-", f"{median(inputs):.4f}" if inputs else "-",
                f"{100 * median(one['spread'] for one in ran):.0f}%" if ran else "-", str(len(ran)), "; ".join(why),
            ])  # fmt: skip
    return table(
        ["section", "kernel", "computes", "largest error", "of activations", "spread", "cases", "skipped because"], rows
    )


def limits_table(results: Run) -> str:
    missing = sorted({one["missing"] for one in results["limits"] if "missing" in one})
    if missing or not results["limits"]:
        return " ".join(["The machine's limits were not measured.", *missing])
    rows = []
    for threads in results["settings"]["threads"]:
        for clock in ("cpu", "wall"):
            rates = [limit(results, threads, name, clock) for name in ("read", "read_huge", "int8", "float32")]
            rows.append([str(threads), clock, *(f"{rate / 1e9:.1f}" if rate else "-" for rate in rates)])
    return table(["threads", "clock", "read GB/s", "with 2 MiB pages", "int8 Gop/s", "float32 GFLOP/s"], rows)


def report(results: Run, clock: str = "") -> str:
    """Everything as Markdown.

    Args:
        clock: "wall" or "cpu"; default: CPU time for one thread, the wall for more.
    """
    machine, settings = results["machine"], results["settings"]
    ops = ", ".join(f"{name}: {kind}" for name, kind in results["ours"].items())
    parts = [
        f"{machine['cpu']} ({' '.join(machine['flags'])}), {machine['cpus']} CPUs, load {machine['load'][0]:.1f}; "
        f"{', '.join(f'{name} {number}' for name, number in results['versions'].items())}. Ours: {ops}.",
        f"Medians of {settings['rounds']} alternating rounds of at least {settings['min_ms']} ms; weights and caches "
        f"rotate over {settings['cold_mb']} MB, so that they come from memory. In brackets: times ours.",
        limits_table(results),
    ]
    tables = {"linear": linear_table, "attention": attention_table, "experts": experts_table}
    for threads in settings["threads"]:
        chosen = clock or ("cpu" if threads == 1 else "wall")
        for section, make in tables.items():
            runs = [run for run in results["runs"] if run["section"] == section and run["threads"] == threads]
            if runs:
                parts.append(f"**{section}, threads: {threads}, clock: {chosen}** (µs)")
                parts.append(make(results, runs, threads, chosen))
    if results["runs"]:
        parts += ["**Checks**", check_table(results)]
    return "\n\n".join(parts) + "\n"
