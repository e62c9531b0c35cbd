"""What benchmarks/results holds, read for the pages of `write_docs.py`: medians, ranges, Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ABSENT = "not measured yet"
# Formats of serve.py
BF16, W8A8, HEAD8, W4A4, W4A8 = "bf16", "w8a8", "w8a8-head8", "rotquant-w4a4kv4", "rotquant-w4a8kv4"
BEST, BEST8, ONLINE = f"{W4A4}-best", f"{W4A8}-best", f"{W4A4}-best-online"
Run = dict[str, Any]


def read(name: str) -> Any:
    """A file of results by its name less the ending."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


@dataclass(frozen=True)
class Compared:
    """The finished runs of one file of `rotquant compare`, by their labels."""

    groups: dict[str, list[Run]]

    @classmethod
    def of(cls, name: str) -> Compared:
        groups: dict[str, list[Run]] = {}
        for run in read(name)["runs"]:
            if "error" not in run:
                groups.setdefault(run["label"], []).append(run)
        return cls(groups)

    def values(self, label: str, key: str) -> list[float]:
        return [run[key] for run in self.groups.get(label, []) if run.get(key) is not None]

    def median(self, label: str, key: str) -> float | None:
        found = self.values(label, key)
        return median(found) if found else None

    def cell(self, label: str, key: str, write: Callable[[float], str], spread: bool = False) -> str:
        """The median, and with `spread` the range over seeds where there are several."""
        found = self.values(label, key)
        if not found:
            return ABSENT if label not in self.groups else ""
        text = write(median(found))
        low, high = write(min(found)), write(max(found))
        return f"{text} ({low} to {high})" if spread and low != high else text

    @property
    def full(self) -> float:
        """Perplexity of the model in full precision."""
        return float(next(iter(self.groups.values()))[0]["full_perplexity"])

    @property
    def tokens(self) -> int:
        return int(next(iter(self.groups.values()))[0]["tokens"])


@dataclass(frozen=True)
class Served:
    """A file of `serve.py`: what each format does under each load; medians over rounds."""

    data: dict[str, Any]

    @classmethod
    def of(cls, name: str = "serve-smollm2-xeon-amx") -> Served:
        return cls(read(name))

    @property
    def formats(self) -> set[str]:
        return {server["format"] for server in self.data["servers"] if "error" not in server}

    def load(self, start: str) -> str | None:
        """The name of the first load that begins so, if there is one."""
        return next((run["load"] for run in self.data["runs"] if run["load"].startswith(start)), None)

    def run(self, load: str, form: str, metric: str) -> float:
        name = self.load(load)
        found = [run[metric] for run in self.data["runs"] if (run["load"], run["format"]) == (name, form)]
        return median(found)

    def server(self, form: str, key: str) -> float:
        return median(server[key] for server in self.data["servers"] if server["format"] == form)


def seconds(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.1f} s"


def perplexity(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 20 else f"{value:.1f} ms"


def rate(value: float) -> str:
    return f"{value:.1f}"


def four_digits(value: float) -> str:
    return f"{value:.4f}"


def nats(value: float) -> str:
    return f"{value:.3f}"


def percent(value: float) -> str:
    return f"{value:.1%}"


def minutes(found: float) -> str:
    return f"{found / 60:.1f}"
