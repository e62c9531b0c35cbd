"""README's figure: quality and speed at a glance, as an SVG of bars, light and dark, from benchmarks/results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from docs_results import BEST, BEST8, BF16, HEAD8, ROOT, W8A8, Compared, Served, milliseconds
from rotquant.recipes.schemes import SCHEMES

FILE = ROOT / "docs" / "figures" / "glance.svg"
STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #16202c; }
  .title { font-weight: 600; font-size: 14px; } .quiet { fill: #5b6b7c; font-size: 11.5px; }
  .ours { fill: #0f8a8a; } .other { fill: #9aa8b7; } .page { fill: #ffffff; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e8eef5; } .quiet { fill: #93a1b1; } .ours { fill: #35c9bf; } .other { fill: #566577; }
    .page { fill: #0d1117; }
  }
"""
WIDTH, PANEL, LABELS, ROW, TOP = 990, 320, 114, 26, 74


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    text: str
    ours: bool


def panels() -> list[tuple[str, tuple[str, str], list[Bar]]]:
    """Title, two lines of what to see, and bars of each panel."""
    real, served = Compared.of("compare-smollm2"), Served.of()
    quality = []
    for label in ("quarot", "best", "best-online", "auto", "w4a8kv4"):
        value = real.median(label, "kl")
        if value is not None:
            shown = f"best, {label}" if label in SCHEMES else label
            quality.append(Bar(shown, value, f"{value:.2f}", True))
    formats = {
        "bf16": BF16, "W4A16": "w4a16", "W8A8": W8A8, "W8A8, int8 head": HEAD8, "W4A4KV4": BEST, "W4A8KV4": BEST8,
    }  # fmt: skip
    speed, pages = [], []
    for label, form in formats.items():
        if form not in served.formats:
            continue
        ours = form.startswith("rotquant")
        token = served.run("1024/32", form, "median_tpot_ms")
        speed.append(Bar(label, token, milliseconds(token).removesuffix(" ms"), ours))
        tokens = served.server(form, "kv_tokens")
        pages.append(Bar(label, tokens, f"{tokens / 1000:.0f}k", ours))
    model = served.data["settings"]["model"]
    return [
        ("Distance to the original (KL, nats)", (f"{model}; shorter is better", off_scale(real)), quality),
        (
            "Milliseconds a token, one request",
            ("the same model, one thread of a Xeon with AMX", "ours with int8 lm_head; shorter is better"),
            speed,
        ),
        ("Tokens in 1 GiB of KV cache", ("the same model", "longer is better"), pages),
    ]


def off_scale(real: Compared) -> str:
    """What is said of rounding to nearest, whose bar would be ten times as long."""
    worst = real.median("rtn", "kl")
    return f"rounding to nearest without rotations: {worst:.1f}" if worst else ""


def svg() -> str:
    """The whole figure."""
    found = panels()
    height = TOP + ROW * max(len(bars) for *_, bars in found) + 12
    parts = [panel(i, *one) for i, one in enumerate(found)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' role="img">\n<title>rotquant at a glance: quality, speed and cache of SmolLM2-135M-Instruct'
        f'</title>\n<style>{STYLE}</style>\n<rect class="page" width="{WIDTH}" height="{height}" rx="10"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def panel(index: int, title: str, notes: Sequence[str], bars: Sequence[Bar]) -> str:
    """One panel: a title, what to see, a bar in each row."""
    left, longest = 14 + index * (PANEL + 6), max(bar.value for bar in bars)
    out = [f'<text class="title" x="{left}" y="24">{title}</text>']
    out += [f'<text class="quiet" x="{left}" y="{41 + 16 * i}">{note}</text>' for i, note in enumerate(notes)]
    start, room = left + LABELS, PANEL - LABELS - 52
    for row, bar in enumerate(bars):
        y, kind = TOP + row * ROW, "ours" if bar.ours else "other"
        length = max(2.0, room * bar.value / longest)
        out.append(f'<text x="{start - 8}" y="{y + 13}" text-anchor="end">{bar.label}</text>')
        out.append(f'<rect class="{kind}" x="{start}" y="{y}" width="{length:.1f}" height="17" rx="3"/>')
        out.append(f'<text x="{start + length + 6:.1f}" y="{y + 13}">{bar.text}</text>')
    return "\n".join(out)
