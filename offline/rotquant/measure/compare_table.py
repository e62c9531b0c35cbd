"""The table of a comparison: a row a recipe, median and range over its seeds, best perplexity first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from rotquant.common.progress import clock

Run: TypeAlias = dict[str, Any]
HEADERS = (
    "recipe", "perplexity", "KL to full precision, nats", "top-1 agreement", "same greedy tokens, of 32",
    "quantization time", "peak memory", "size", "online multiply-adds a token",
)  # fmt: skip
# The same for a terminal of 80 columns; what has no name here is left to `--markdown`.
SHORT = ("recipe", "perplexity", "KL, nats", "top-1", "", "time", "memory", "", "online")


@dataclass(frozen=True)
class Comparison:
    """The runs of a comparison, failed ones (with `error`) included."""

    runs: list[Run]

    @property
    def failed(self) -> list[Run]:
        return [run for run in self.runs if "error" in run]

    def rows(self) -> list[tuple[str, ...]]:
        """Cells under HEADERS, the full-precision model first."""
        finished = [run for run in self.runs if "error" not in run]
        if not finished:
            return []
        groups = [[run for run in finished if run["label"] == label] for label in {run["label"]: 0 for run in finished}]
        groups.sort(key=lambda group: median(run["nll"] for run in group))
        full = ("full precision", number(finished[0]["full_perplexity"]), "0", "100%", "32", "", "", "", "")
        return [full, *(row(group) for group in groups)]

    def failures(self) -> list[str]:
        return [f"{run['label']}, seed {run['seed']}: failed: {run['error']}" for run in self.failed]

    def summary(self) -> str:
        """What the numbers were measured on, for below the table."""
        finished = [run for run in self.runs if "error" not in run]
        seeds = len({run["seed"] for run in self.runs})
        tokens = f"{finished[0]['tokens']:,} tokens; " if finished else ""
        return f"{tokens}median (lowest to highest) of {seeds} seeds" if seeds > 1 else f"{tokens}one seed"

    def table(self) -> Table:
        """For a terminal of 80 columns or more: ranges below their medians."""
        said = "\n".join([self.summary(), *map(escape, self.failures())])
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=said)
        for name in filter(None, SHORT):
            table.add_column(name, no_wrap=name in ("recipe", "perplexity", "top-1"))
        for cells in self.rows():
            label, *others = (cell for cell, name in zip(cells, SHORT, strict=True) if name)
            table.add_row(escape(label), *(escape(below(cell)) for cell in others))
        return table

    def markdown(self) -> str:
        lines = [HEADERS, ("---",) * len(HEADERS), *self.rows()]
        table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]
        return "\n".join([*table, "", *(f"{line}  " for line in [self.summary(), *self.failures()])])


def row(runs: Sequence[Run]) -> tuple[str, ...]:
    """The cells of one recipe's finished runs."""
    online, share = runs[0]["online_multiply_adds"], runs[0]["online_share"]
    return (
        runs[0]["label"],
        spread(runs, "perplexity", number),
        spread(runs, "kl", number),
        spread(runs, "agreement", lambda share: f"{share:.1%}"),
        spread(runs, "greedy_tokens", lambda tokens: f"{tokens:.1f}"),
        spread(runs, "quantize_seconds", clock),
        spread(runs, "quantize_peak_gb", lambda gb: f"{gb:.2f} GB"),
        spread(runs, "checkpoint_bytes", lambda size: f"{size / 1e6:.0f} MB"),
        f"{online:,} ({share:.2%} of GEMM)" if online else "0",
    )


def spread(runs: Sequence[Run], key: str, show: Callable[[float], str]) -> str:
    """Median (lowest to highest); one value where they look the same; ? where a killed run left none."""
    values = [run[key] for run in runs if run.get(key) is not None]  # older runs lack some
    if not values:
        return "?"
    low, middle, high = show(min(values)), show(median(values)), show(max(values))
    return middle if low == high else f"{middle} ({low} to {high})"


def below(cell: str) -> str:
    """`1.5 (1 to 2)` on two lines."""
    value, _, spread = cell.partition(" (")
    return f"{value}\n{spread.removesuffix(')')}" if spread else value


def number(value: float) -> str:
    """Four significant digits, in full where there are more before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
