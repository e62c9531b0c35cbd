"""The table of recipes, from their YAML files and what they cost in benchmarks/results."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from docs_results import ROOT, Compared, minutes, percent, read, table

RECIPES = ROOT / "offline" / "rotquant" / "recipes"
OURS = ("best", "best-online", "best-tuned")
SPOKEN = {
    "r1": "R1", "r2": "R2", "online": "online transforms", "act_clip": "clips", "kv_clip": "KV clips",
    "weight_clip": "weight clips",
}  # fmt: skip
SITES = ("attn", "o", "mlp", "down")
WHERE_IT_PAYS = {"shifts": "shifts, where they pay", "low-rank branch": "a low-rank branch, where it pays"}


def recipes() -> list[dict[str, Any]]:
    """All shipped recipes as they are written, our own and the baseline first."""
    found = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(RECIPES.glob("*.yaml"))]
    order = [*OURS, "quarot", "rtn"]
    return sorted(found, key=lambda r: (order.index(r["name"]) if r["name"] in order else len(order), r["name"]))


def learns(recipe: dict[str, Any]) -> str:
    """What a recipe learns, and how, in a few words."""
    learn = recipe.get("learn", {})
    words = []
    if surrogate := learn.get("surrogate"):
        how = f"{surrogate['objective'].replace('_', ' ')}, {surrogate['optimiser']}"
        words.append(f"{_names(surrogate.get('targets', ['r1']))} from samples of activations ({how})")
    if layers := learn.get("blockwise"):
        words.append(f"{_names(layers['learns'])}, layer by layer")
    if whole := learn.get("end_to_end"):
        words.append(f"{_names(whole['learns'])}, through the whole model")
    if "smooth" in recipe.get("scales", {}).values():
        words.append("smoothing scales")
    if "greedy" in str(recipe.get("online", "")):
        words.append("greedy block rotations")
    if recipe.get("choose"):
        words.append("by measuring: " + ", ".join(recipe["choose"]["candidates"]))
    if recipe.get("tune"):
        words.append("scales, norm gains and clips, on the original's logits")
    return "; ".join(words) or "nothing"


def _names(keys: list[str]) -> str:
    spoken = {
        "r1": "R1",
        "r2": "R2",
        "online": "online transforms",
        "act_clip": "clips",
        "kv_clip": "KV clips",
        "weight_clip": "weight clips",
    }
    return ", ".join(spoken.get(key, key) for key in keys)


def online(recipe: dict[str, Any]) -> str:
    """What runs at each token beside the quantized linears."""
    rotations = recipe.get("rotations", {})
    words = [name.upper() for name in ("r3", "r4") if rotations.get(name, "none") != "none"]
    kinds = [kind for site in SITES for kind in recipe.get("online", {}).get(site, [])]
    words += [f"{kind} blocks" if kind == "greedy" else kind for kind in dict.fromkeys(kinds)]
    if recipe.get("weights", {}).get("rank"):
        words.append(f"branch of rank {recipe['weights']['rank']}")
    tried = (recipe.get("choose") or {}).get("candidates", {})
    words += [said for candidate, said in WHERE_IT_PAYS.items() if candidate in tried]
    return ", ".join(words) or "nothing"


def recipe_table() -> str:
    """One row a recipe; its share of online work and its time are of results, where there are any."""
    toy, real = Compared.of("compare-llama"), Compared.of("compare-smollm2")
    large = read("quantize-minutes")["minutes"]
    rows = []
    for recipe in recipes():
        name = recipe["name"]
        label = name if name in toy.groups else f"{name} (2 windows)"
        share = toy.cell(label, "online_share", percent) if label in toy.groups else ""
        spent = real.cell(name, "quantize_seconds", minutes) if name in real.groups else ""
        cells = [f"`{name}`", _paper(recipe), learns(recipe), online(recipe), share]
        rows.append([*cells, spent, str(large.get(name, ""))])
    heads = ["recipe", "paper", "learns", "runs online", "online work", "minutes, SmolLM2", "minutes, 0.5B shape"]
    return table(heads, rows)


def _paper(recipe: dict[str, Any]) -> str:
    """The paper's name, with a link where its number is known."""
    paper = recipe.get("paper", "")
    if not paper:
        return "our own" if recipe["name"] in OURS else ""
    number = re.search(r"arXiv (\d{4}\.\d{5})", paper)
    name = re.split(r"[:,]| \(", paper)[0]
    return f"[{name}](https://arxiv.org/abs/{number[1]})" if number else name


def deviations() -> str:
    """Where each recipe differs from its paper, in its own words."""
    sections = [
        f"### `{r['name']}`\n\n{r['description']}.\n\n{' '.join(r['deviations'].split())}"
        for r in recipes()
        if r.get("deviations")
    ]
    return "\n\n".join(sections)


BLOCKS: dict[str, Callable[[], str]] = {"recipes": recipe_table, "deviations": deviations}
