"""The inspection as text: one line for each layer and site, then the sites over all layers."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable, Sequence
from operator import itemgetter
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

FIGURES = {"peak_to_rms": "peak/RMS", "gsr": "GSR", "kurtosis": "kurtosis", "difficulty": "difficulty",
           "common": "common", "qsur": "QSUR", "snr": "SNR dB"}  # fmt: skip
HIGHER_IS_BETTER = ("qsur", "snr")
WHEN = ("before", "after")
NARROWEST = 146  # columns that the table needs


def render(facts: dict[str, Any]) -> str:
    """The tables for a terminal, with colours where stdout is one."""
    terminal = sys.stdout.isatty()
    width = max(NARROWEST, shutil.get_terminal_size().columns if terminal else 0)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
    for number, line in enumerate(facts["findings"], 1):
        console.print(f"{number}. {line}", highlight=False, markup=False)
    console.print()
    for table in (_sites(facts), _overall(facts), _linears(facts)):
        console.print(table)
    for line in (*massive_lines(facts), *experts_lines(facts)):
        console.print(line, highlight=False, markup=False)
    said = f"{facts['tokens']} tokens of {facts['text']} in {facts['windows']} windows of {facts['seq_len']}"
    console.print(f"{said}; quantizers: {quantizers(facts)}", highlight=False, markup=False)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines)


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", box=None, padding=(0, 2, 0, 0)
    )
    for name in columns:
        table.add_column(name, justify="left" if name in ("layer", "site", "linear") else "right", no_wrap=True)
    return table


def _title(facts: dict[str, Any], what: str) -> str:
    return f"{what}: {facts['against']} → {facts['model']}" if facts["against"] else f"{what}: {facts['model']}"


def _sites(facts: dict[str, Any]) -> Table:
    table = _table(_title(facts, "Inputs and KV cache"), "layer", "site", *FIGURES.values(), "massive")
    last = None
    for site in facts["sites"]:
        layer = "" if site["layer"] == last else str(site["layer"])
        last = site["layer"]
        counts = change(*_pair(site, lambda found: found["massive"]["count"]), higher_is_better=False)
        table.add_row(layer, site["site"], *_figures(site), counts)
    return table


def _overall(facts: dict[str, Any]) -> Table:
    table = _table("\nMean over layers", "site", *FIGURES.values())
    for site, found in by_site(facts).items():
        means = {when: _means([s[when] for s in found if s[when]]) for when in WHEN}
        table.add_row(site, *_figures(means))
    return table


def _linears(facts: dict[str, Any]) -> Table:
    groups: dict[str, list[dict[str, Any]]] = {}  # experts of a layer together
    for linear in facts["linears"]:
        path = [part for part in linear["name"].split(".") if not part.isdecimal()]
        groups.setdefault(" ".join(path[-2:]) if "experts" in path else path[-1], []).append(linear)
    table = _table("\nWeights, SNR dB, mean over layers", *groups)
    cells = []
    for rows in groups.values():
        before, after = (_mean([row[when] for row in rows]) for when in WHEN)
        cells.append(change(before, after, higher_is_better=True))
    table.add_row(*cells)
    return table


def experts_lines(facts: dict[str, Any]) -> list[str]:
    """Lines on the experts of a mixture: their traffic, their choice, and the one whose weights fare worst."""
    routing = facts.get("routing") or []
    if not routing:
        return []
    few, most = min((n, r["layer"]) for r in routing for n in r["tokens"]), max(max(r["tokens"]) for r in routing)
    lines = [f"experts: {few[0]} (layer {few[1]}) to {most} tokens each"]
    agreed = [(r["agreement"], r["layer"]) for r in routing if r["agreement"] is not None]
    if agreed:
        mean = fmean(share for share, _ in agreed)
        lines.append(
            f"routing: {mean:.1%} of the choices are as before; least {min(agreed)[0]:.1%}, layer {min(agreed)[1]}"
        )
    known = [x for x in facts["linears"] if ".experts." in x["name"] and x["after"] is not None]
    if known:
        worst = min(known, key=itemgetter("after"))
        lines.append(
            f"weights: the least SNR of an expert is {worst['after']} dB, {worst['name']} of layer {worst['layer']}"
        )
    return lines


def massive_lines(facts: dict[str, Any]) -> list[str]:
    """A line on the massive tokens of the residual stream for each model."""
    lines = []
    for when in WHEN:
        layers = [s for s in facts["sites"] if s["site"] == "h" and s[when] and s[when]["massive"]["count"]]
        if layers:
            top = max(layers, key=lambda s: s[when]["massive"]["largest"] / s[when]["massive"]["median"])
            whose = f"massive tokens {when}" if facts["against"] else "massive tokens"
            lines.append(f"{whose}: {_massive(top['layer'], top[when]['massive'], facts['token_texts'])}")
    return lines or ["massive tokens: none in the residual stream"]


def _massive(layer: int, m: dict[str, Any], texts: dict[str, str]) -> str:
    return (
        f"{m['count']} in the residual stream entering layer {layer}; the largest has |x| = {m['largest']:.4g},"
        f" {m['largest'] / m['median']:.0f} times the median token's peak: position {m['position']},"
        f" {texts.get(str(m['token']), '')!r}, channel {m['channel']}"
    )


def by_site(facts: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The objects of `sites`, layers of one site together."""
    found: dict[str, list[dict[str, Any]]] = {}
    for site in facts["sites"]:
        found.setdefault(site["site"], []).append(site)
    return found


def _means(found: Sequence[dict[str, Any]]) -> dict[str, float | None] | None:
    return {name: _mean([m[name] for m in found]) for name in FIGURES} if found else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _figures(site: dict[str, Any]) -> list[Text]:
    return [change(*_pair(site, itemgetter(name)), name in HIGHER_IS_BETTER) for name in FIGURES]


def _pair(site: dict[str, Any], figure: Callable[[dict[str, Any]], Any]) -> tuple[float | None, float | None]:
    """A figure before and after."""
    before, after = (figure(site[when]) if site[when] else None for when in WHEN)
    return before, after


def change(before: float | None, after: float | None, higher_is_better: bool) -> Text:
    """`before → after`, green where it became better by 2% or more, red where worse; `after` alone without before."""
    if before is None:
        return Text("-" if after is None else _number(after))
    text = Text(f"{_number(before)} → ", style="dim")
    if after is None:
        return text.append("-")
    better = after > before if higher_is_better else after < before
    clear = abs(after - before) > 0.02 * abs(before)
    return text.append(_number(after), style=f"not dim {'green' if better else 'red'}" if clear else "not dim")


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"


def quantizers(facts: dict[str, Any]) -> str:
    """The number formats, the sites that have each, and their clips: one, or the range that tuning made of it."""
    kinds: dict[str, tuple[dict[str, None], list[float]]] = {}  # sites of each, in order, and clips
    for site in facts["sites"]:
        f = site["format"]
        if f["bits"] < 16:
            sites, clips = kinds.setdefault(f"int{f['bits']} {'' if f['symmetric'] else 'a'}symmetric", ({}, []))
            sites[site["site"]] = None
            clips.append(f["clip"])
    return "; ".join(f"{kind} clip {_range(clips)} ({', '.join(sites)})" for kind, (sites, clips) in kinds.items())


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"
