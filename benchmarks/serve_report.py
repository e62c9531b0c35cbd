"""Results of `serve.py`: the JSON file that grows with every step, and the tables and plots made from it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rotquant.checkpoint.source import save_text
from rotquant.common.progress import say
from rotquant.errors import RotQuantError

BASE, OURS = "bf16", "rotquant"
# Metric of vLLM's -> its heading, and whether more is better.
COMPARED = {
    "output_throughput": ("output tokens/s", True),
    "median_ttft_ms": ("TTFT", False),
    "median_tpot_ms": ("TPOT", False),
}
COLUMNS = {
    "median_ttft_ms": "TTFT ms, median", "mean_ttft_ms": "mean", "p99_ttft_ms": "p99",
    "median_tpot_ms": "TPOT ms, median", "mean_tpot_ms": "mean", "p99_tpot_ms": "p99",
    "output_throughput": "output tokens/s", "total_token_throughput": "all tokens/s",
    "request_throughput": "requests/s",
}  # fmt: skip
BARS = {
    "output_throughput": "output tokens/s (more is better)",
    "median_ttft_ms": "time to first token, median, ms (less is better)",
    "median_tpot_ms": "time per output token, median, ms (less is better)",
}


class Results:
    """The JSON file: settings, and one record for each model made, server started and load run.

    Args:
        file: where it is; expected: the settings of this run, None to only read the file.
    Raises:
        RotQuantError: no such file, or one of other settings.
    """

    def __init__(self, file: Path, expected: dict[str, Any] | None = None) -> None:
        self.file = file
        self.data: dict[str, Any] = {"settings": expected, "models": {}, "servers": [], "runs": []}
        if file.exists():
            self.data = json.loads(file.read_text())
            differ = [key for key, value in (expected or {}).items() if self.data["settings"].get(key) != value]
            if differ:
                raise RotQuantError(f"{file} holds results of another {', '.join(differ)}; give another --output")
        elif expected is None:
            raise RotQuantError(f"{file}: no such file")

    def done(self, number: int, name: str, load: str) -> bool:
        key = {"round": number, "format": name, "load": load}
        return any(key.items() <= record.items() and "error" not in record for record in self.data["runs"])

    def add(self, table: str, record: dict[str, Any]) -> None:
        """Adds a record in place of an older one of the same round, format and load, and writes the file."""
        key = [record.get(part) for part in ("round", "format", "load")]
        kept = [r for r in self.data[table] if [r.get(part) for part in ("round", "format", "load")] != key]
        self.data[table] = [*kept, record]
        self.save()

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        save_text(self.file, json.dumps(self.data, indent=1) + "\n")


class Medians:
    """What the rounds of one file of results say together.

    Args:
        data: content of the JSON file.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.runs = [run for run in data["runs"] if "error" not in run]
        self.servers = [server for server in data["servers"] if "error" not in server]
        measured = {record["format"] for record in self.runs + self.servers}
        self.formats = [name for name in data["models"] if name in measured]
        self.loads = list(dict.fromkeys(run["load"] for run in self.runs))

    def values(self, load: str, name: str, metric: str) -> list[float]:
        """A metric of a load in every round, [] where it was not measured."""
        found = [run for run in self.runs if (run["load"], run["format"]) == (load, name)]
        return [run[metric] for run in found if metric in run]

    def run(self, load: str, name: str, metric: str) -> float | None:
        values = self.values(load, name, metric)
        return median(values) if values else None

    def server(self, name: str, key: str, part: str | None = None) -> float | None:
        """A number of the format's servers; `part` of it where it is a dict."""
        found = [server[key] for server in self.servers if server["format"] == name and key in server]
        values = [float(value[part] if part else value) for value in found]
        return median(values) if values else None

    def kernels(self, name: str) -> str:
        """What computes, in a few words."""
        lines: list[str] = next((server["kernels"] for server in self.servers if server["format"] == name), [])
        if not name.startswith(OURS):
            return ", ".join(lines) or "not named"
        bits: dict[str, list[str]] = {}
        for line in lines:  # the plugin's start-up check is a table: layer, count, kernel, bits, ...
            cells = re.split(r"\s{2,}", line.strip())
            if len(cells) > 4 and cells[1].isdigit() and cells[3] not in bits.setdefault(cells[2], []):
                bits[cells[2]].append(cells[3])
        return ", ".join(f"{kernel}: {', '.join(found)}" for kernel, found in bits.items())

    def rows(self) -> list[tuple[str, Callable[[str], float | None], bool]]:
        """All that is compared: its name, its value for a format, and whether more is better."""
        rows: list[tuple[str, Callable[[str], float | None], bool]] = []
        for load in self.loads:
            rated = any(run["load"] == load and run.get("rate", "inf") != "inf" for run in self.runs)
            for metric, (label, more) in COMPARED.items():
                # How many tokens a second come out at a fixed request rate is the rate's doing, not the format's.
                if self.run(load, self.formats[0], metric) and not (rated and more):
                    rows.append((f"{load}: {label}", self._run_of(load, metric), more))
        rows.append(("tokens in the KV cache", lambda name: self.server(name, "kv_tokens"), True))
        rows.append(("memory", lambda name: self.server(name, "memory_after_start", "pss"), False))
        rows.append(("checkpoint", lambda name: self.data["models"][name]["bytes"], False))
        return rows

    def _run_of(self, load: str, metric: str) -> Callable[[str], float | None]:
        return lambda name: self.run(load, name, metric)


# ---- tables -----------------------------------------------------------------------------------------


def write(data: dict[str, Any], file: Path) -> None:
    """Prints the tables and writes them (.md) and the plots (.svg, .png) next to the JSON file."""
    medians = Medians(data)
    if not medians.runs:
        say("no load has a result yet: no tables, no plots")
        return
    text = "\n".join(tables(medians))
    print(text)
    save_text(file.with_suffix(".md"), text + "\n")
    try:
        plot(medians, file)
    except ImportError:
        say("no plots: they need matplotlib (pip install matplotlib)")


def tables(medians: Medians) -> list[str]:
    """Lines of Markdown: the set-up, the servers, every load, and the ratios."""
    made = medians.data["settings"]
    environment = " ".join(f"`{key}={value}`" for key, value in made["environment"].items())
    rounds = max(run["round"] for run in medians.runs)
    lines = [
        f"{made['model']} on {made['cpu']['count']} CPUs ({made['cpu']['name']}: "
        f"{' '.join(made['cpu']['instructions'])}), vLLM {made['vllm']}, {environment}, "
        f"`{' '.join(made['arguments'])}`. Medians over {rounds} round{'s' * (rounds > 1)}.",
        "",
    ]
    lines += servers(medians)
    for load in medians.loads:
        shown = {k: v for k, v in COLUMNS.items() if any(medians.run(load, name, k) for name in medians.formats)}
        rows = [[name, *(number(medians.run(load, name, k)) for k in shown)] for name in medians.formats]
        lines += [f"**{load}** (tokens in/out)", "", *table(["format", *shown.values()], rows)]
    return lines + ratios(medians)


def servers(medians: Medians) -> list[str]:
    gib = float(medians.data["settings"]["environment"]["VLLM_CPU_KVCACHE_SPACE"])
    rows = []
    for name in medians.formats:
        memory = [number(_scaled(medians.server(name, "memory_after_start", kind), 2**-20)) for kind in ("rss", "pss")]
        tokens = number(_scaled(medians.server(name, "kv_tokens"), 1 / gib))
        size = number(medians.data["models"][name]["bytes"] / 2**20)
        rows.append([name, tokens, *memory, size, number(medians.server(name, "start_seconds")), medians.kernels(name)])
    heads = ["format", "KV tokens/GiB", "memory MiB, RSS", "PSS", "checkpoint MiB", "start s", "kernels, by the log"]
    return table(heads, rows)


def ratios(medians: Medians) -> list[str]:
    """Times better than bf16, and rotquant against the best format of vLLM's own: above 1 is better in every row."""
    ours = [name for name in medians.formats if name.startswith(OURS)]
    stock = [name for name in medians.formats if name not in ours]
    others = [name for name in medians.formats if name != BASE]
    against_base, against_best = [], []
    for label, value, more in medians.rows():
        values = {name: value(name) for name in medians.formats}
        if BASE in stock and others:
            against_base.append([label, *(_times(values[name], values[BASE], more) for name in others)])
        known = {name: v for name in stock if (v := values[name])}
        if known and ours:
            best = (max if more else min)(known, key=lambda name: known[name])
            against_best.append([label, best, *(_times(values[name], known[best], more) for name in ours)])
    lines = []
    if against_base:
        lines += [f"**Times better than {BASE}**", "", *table(["", *others], against_base)]
    if against_best:
        lines += ["**rotquant, times better than the best other**", "", *table(["", "best other", *ours], against_best)]
    return lines


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns also line up as plain text; columns of numbers to the right."""
    columns = list(zip(heads, *rows, strict=True))
    text = [i == 0 or not any(cell[:1].isdigit() for cell in column[1:]) for i, column in enumerate(columns)]
    widths = [max(3, *map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        return " | ".join(f"{c:<{w}}" if t else f"{c:>{w}}" for c, w, t in zip(cells, widths, text, strict=True))

    rule = " | ".join("-" * w if t else "-" * (w - 1) + ":" for w, t in zip(widths, text, strict=True))
    return [f"| {content} |" for content in (line(heads), rule, *map(line, rows))] + [""]


def number(value: float | None) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _times(value: float | None, base: float | None, more: bool) -> str:
    if not value or not base:
        return "-"
    return f"{value / base if more else base / value:.2f}"


# ---- plots ------------------------------------------------------------------------------------------


def plot(medians: Medians, file: Path) -> None:
    """Bars for each load, lines over the request rate, and memory; whiskers from the worst to the best round."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "rotquant", "font.size": 9}  # same results, same file
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    rated = {run["load"]: float(run["rate"]) for run in medians.runs if run.get("rate", "inf") != "inf"}
    fixed = [load for load in medians.loads if load not in rated]
    figure, axes = pyplot.subplots(3, 2, figsize=(13, 12), layout="constrained")
    colors = {name: f"C{i}" for i, name in enumerate(medians.formats)}
    for axis, (metric, title) in zip(axes.flat, BARS.items(), strict=False):
        bars(axis, medians, fixed, metric, colors)
        axis.set_title(title)
    axes[0, 1].set_yscale("log")  # from one prompt to a queue of long ones
    for name in medians.formats:
        points = sorted((rate, y) for load, rate in rated.items() if (y := medians.run(load, name, "p99_ttft_ms")))
        axes[1, 1].plot([x for x, _ in points], [y for _, y in points], "o-", color=colors[name])
    if rated:
        axes[1, 1].set(title="time to first token by requests/s, p99, ms (less is better)", yscale="log")
    axes[1, 1].set_visible(bool(rated))
    kv = [medians.server(name, "kv_tokens") or 0 for name in medians.formats]
    memory = [(medians.server(name, "memory_after_start", "pss") or 0) / 2**20 for name in medians.formats]
    titles = ("tokens in a KV cache of the same size", "memory of all processes, MiB (PSS, KV cache included)")
    for axis, values, title in zip(axes[2], (kv, memory), titles, strict=True):
        axis.bar_label(axis.barh(medians.formats, values, color=list(colors.values())), fmt="{:,.0f}", padding=3)
        axis.set(title=title, xlim=(0, 1.2 * max(values) or 1))
        axis.invert_yaxis()
        axis.locator_params(axis="x", nbins=4)
        axis.xaxis.set_major_formatter("{x:,.0f}")
    for axis in axes.flat[:4]:
        if axis.get_yscale() == "log":  # 1, 2, 5, 10: a label at every step could not be read
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter("{x:,.6g}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(medians.formats))
    figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(file.with_suffix(".png"), dpi=120)


def bars(axis: Any, medians: Medians, loads: list[str], metric: str, colors: dict[str, Any]) -> None:
    """One group of bars for each load, one bar in it for each format."""
    width = 0.8 / len(medians.formats)
    for i, name in enumerate(medians.formats):
        shown = [(x, medians.values(load, name, metric)) for x, load in enumerate(loads)]
        shown = [(x, values) for x, values in shown if values]
        middle = [median(values) for _, values in shown]
        spread = [[m - min(v) for m, (_, v) in zip(middle, shown, strict=True)],
                  [max(v) - m for m, (_, v) in zip(middle, shown, strict=True)]]  # fmt: skip
        places = [x + (i - (len(medians.formats) - 1) / 2) * width for x, _ in shown]
        axis.bar(places, middle, width, yerr=spread, label=name, color=colors[name], error_kw={"lw": 0.8})
    axis.set_xticks(range(len(loads)), [load.replace(" ", "\n", 1) for load in loads], fontsize=8)
