"""Who imports whom in the project's packages, read from the sources: also what functions import when they run, and
what only type checkers see."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kernels/rotquant_kernels", "offline/rotquant", "vllm_rotquant", "benchmarks")


class Import(NamedTuple):
    """`names` are those of `from module import names`, () of `import module`."""

    module: str
    names: tuple[str, ...]
    line: int


def sources() -> dict[str, str]:
    """Every module of the packages by its full name; that of a package itself ends in `.__init__`."""
    found = {}
    for package in PACKAGES:
        folder = ROOT / package
        for file in sorted(folder.rglob("*.py")):
            found[".".join(file.relative_to(folder.parent).with_suffix("").parts)] = file.read_text(encoding="utf-8")
    return found


def imports(source: str, module: str) -> Iterator[Import]:
    """All imports of a source; `module`: its own name, as in `sources`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, (), node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            name = ".".join([*package, *([node.module] if node.module else [])])
            yield Import(name, tuple(alias.name for alias in node.names), node.lineno)


def arrows(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """For each module those that it imports, without itself. A script finds its neighbours by their bare names."""

    def known(name: str) -> str | None:
        return next((one for one in (name, f"{name}.__init__") if one in modules), None)

    found: dict[str, set[str]] = {}
    for module, source in modules.items():
        beside = module.rpartition(".")[0]
        targets: set[str | None] = set()
        for name, names, _ in imports(source, module):
            inner = [known(f"{name}.{each}") for each in names]  # modules of a package, or names in it
            targets |= {*inner} if inner and all(inner) else {known(name), known(f"{beside}.{name}"), *inner}
        found[module] = {target for target in targets if target and target != module}
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The sets of more than one module of which each reaches each."""
    reach = {start: _reached(graph, start) for start in graph}
    sets = {frozenset({a, *(b for b in reach[a] if a in reach[b])}) for a in graph}
    return sorted(sorted(one) for one in sets if len(one) > 1)


def _reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for target in graph[todo.pop()] - seen:
            seen.add(target)
            todo.append(target)
    return seen
