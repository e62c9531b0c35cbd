#!/usr/bin/env python3
"""Fills the blocks of README.md and docs/ from benchmarks/results, recipes and sources, and draws README's figure.

    python tools/write_docs.py             after results, a recipe or a refusal changed
    python tools/write_docs.py --check     exit code 1 where a page is not what the results say

A block stands between the lines `<!-- begin NAME -->` and `<!-- end NAME -->`; what is between them is written here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import docs_demo
import docs_figure
import docs_gpu
import docs_layers
import docs_recipes
import docs_refusals
import docs_speed
import docs_tables
from docs_results import ROOT

BLOCKS: dict[str, Callable[[], str]] = (
    docs_tables.BLOCKS
    | docs_demo.BLOCKS
    | docs_gpu.BLOCKS
    | docs_layers.BLOCKS
    | docs_recipes.BLOCKS
    | docs_refusals.BLOCKS
    | docs_speed.BLOCKS
)
BLOCK = re.compile(r"(<!-- begin (?P<name>[^>]+?) -->\n).*?(<!-- end (?P=name) -->)", re.DOTALL)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """A page with its blocks as they should be.

    Raises:
        KeyError: a block that nobody writes.
    """
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found['name']]()}\n{found[3]}", text)


def wanted() -> Iterator[tuple[Path, str]]:
    """Every file that is written here, and what it should hold."""
    for page in pages():
        yield page, filled(page.read_text(encoding="utf-8"))
    yield docs_figure.FILE, docs_figure.svg()


def main(arguments: list[str]) -> int:
    stale = [(file, text) for file, text in wanted() if not file.exists() or file.read_text(encoding="utf-8") != text]
    for file, text in stale:
        print(f"{file.relative_to(ROOT)}: {'differs; run python tools/write_docs.py' if arguments else 'written'}")
        if not arguments:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    return 1 if stale and arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
