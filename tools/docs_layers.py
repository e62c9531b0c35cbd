"""The tables of toys of other architectures: those whose layers differ, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable

from docs_results import RESULTS, Compared, four_digits, percent, perplexity, read, table

TOYS = {
    "mistral": "Mistral, a window in all layers",
    "qwen2": "Qwen2, a window in three layers of four",
    "gemma3": "Gemma 3, a window in three layers of four",
    "qwen3_5": "Qwen3.5, three layers of linear attention, one of gated",
}
RECIPES = ("rtn", "quarot", "best")


def layers() -> str:
    """Perplexity and KL of each recipe on each toy that was compared."""
    rows = []
    for name, shown in TOYS.items():
        if not (RESULTS / f"compare-{name}.json").exists():
            continue
        toy = Compared.of(f"compare-{name}")
        cells = [
            toy.cell(recipe, key, write)
            for recipe in RECIPES
            for key, write in (("perplexity", perplexity), ("kl", four_digits))
        ]
        rows.append([shown, perplexity(toy.full), *cells])
    heads = [f"`{recipe}`{what}" for recipe in RECIPES for what in ("", ", KL")]
    return table(["", "full precision", *heads], rows)


def engines() -> str:
    """vLLM beside the torch engine, and that beside itself in float32."""
    rows = []
    for run in read("engines-layers")["runs"]:
        mean = f"{run['difference']:+.4f} ± {run['error']:.4f}, {percent(abs(run['difference'] / run['nll']))}"
        apart = [f"{run[key]:.3f}" for key in ("spread", "chaos")]
        rows.append([TOYS[run["model"]].split(",")[0], f"{run['tokens']:,}", mean, *apart])
    heads = ["tokens", "mean loss: vLLM less torch", "spread over tokens", "the same of torch: float32 less bfloat16"]
    return table(["`quarot`, nats", *heads], rows)


MIXTURES = (
    ("Qwen3-MoE: 16 experts, top 4", "compare-qwen3-moe"), ("Mixtral: 8 experts, top 2", "compare-mixtral"),
    ("Qwen2-MoE: 16 experts, top 2, and a shared one", "compare-qwen2-moe"),
)  # fmt: skip


def mixtures() -> str:
    """Toys with experts: quality and routing of a few recipes, ranges over seeds where there are several."""
    rows = []
    for name, file in MIXTURES:
        found = Compared.of(file)
        rows.append([name, "full precision", f"{found.full:.1f}", "0", "100%"])
        for label in ("rtn", "quarot", "best", "best-online"):
            if label in found.groups:
                kl = found.cell(label, "kl", four_digits, spread=True)
                cells = [
                    found.cell(label, "perplexity", perplexity),
                    kl,
                    found.cell(label, "routing_agreement", percent),
                ]
                rows.append(["", f"`{label}`", *cells])
    return table(["model", "recipe", "perplexity", "KL, nats", "routing as before"], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "layers": layers, "engines of layers": engines, "mixtures": mixtures,
}  # fmt: skip
