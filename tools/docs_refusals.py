"""Every refusal of the sources in its own words, grouped by what a user was doing, for docs/troubleshooting.md."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from docs_results import ROOT

# The first folder or file that holds a module says where its refusals stand; a heading of the page each.
TOPICS = {
    "vllm_rotquant/experts": "mixtures of experts",
    "vllm_rotquant/agreement": "several ranks",
    "vllm_rotquant/__init__": "several ranks",
    "vllm_rotquant/settings": "settings",
    "vllm_rotquant/environment": "settings",
    "vllm_rotquant/adapters": "adapters",
    "vllm_rotquant/reload": "reloading weights",
    "vllm_rotquant": "serving",
    "kernels/rotquant_kernels/build": "kernels",
    "offline/rotquant/basis/draft": "drafts",
    "offline/rotquant/basis": "adapters",
    "offline/rotquant/checkpoint/experts_format": "mixtures of experts",
    "offline/rotquant/checkpoint/hub": "the model",
    "offline/rotquant/checkpoint/original": "the model",
    "offline/rotquant/checkpoint/source": "files",
    "offline/rotquant/checkpoint/journal": "the run",
    "offline/rotquant/checkpoint": "a checkpoint",
    "offline/rotquant/choose": "recipes",
    "offline/rotquant/cli": "the run",
    "offline/rotquant/common/schema": "a checkpoint",
    "offline/rotquant/common": "the run",
    "offline/rotquant/gate": "the equivalence gate",
    "offline/rotquant/learn": "recipes",
    "offline/rotquant/measure": "measuring",
    "offline/rotquant/models": "the model",
    "offline/rotquant/recipe": "recipes",
    "offline/rotquant/service": "the demo",
    "offline/rotquant/text": "text and tokenizer",
    "offline/rotquant/transforms": "recipes",
    "offline/rotquant/weights": "recipes",
    "offline/rotquant": "the run",
}
RAISED = ("RotQuantError", "BuildError")


def topic(module: Path) -> str | None:
    """The heading of a source file, by the longest name that it begins with; None for one that has no refusals."""
    name = module.relative_to(ROOT).with_suffix("").as_posix()
    return next((TOPICS[part] for part in sorted(TOPICS, key=len, reverse=True) if name.startswith(part)), None)


def refusals(heading: str) -> list[str]:
    """The lines under a heading, each once, `…` for what is filled in."""
    return list(dict.fromkeys(line for file in sources() if topic(file) == heading for line in lines(file)))


def sources() -> list[Path]:
    folders = ("offline/rotquant", "vllm_rotquant", "kernels/rotquant_kernels")
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def lines(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) in RAISED:
            text = words(node.exc.args[0]) if node.exc.args else ""
            if len(text.replace("…", "").split()) > 2:  # the others pass on what was said elsewhere
                yield text


@cache
def constants() -> dict[str, str]:
    """Text that a module gives a name in capitals which no other module gives to something else, by that name."""
    found: dict[str, set[str]] = {}
    for file in sources():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                for target in node.targets:
                    if isinstance(target, ast.Name) and target.id.isupper():
                        found.setdefault(target.id, set()).add(str(node.value.value))
    return {name: values.pop() for name, values in found.items() if len(values) == 1}


def words(node: ast.expr) -> str:
    """A message as it is written: literals and constants stay, what is filled in becomes `…`."""
    if isinstance(node, ast.Constant):
        return " ".join(str(node.value).split())
    if isinstance(node, ast.FormattedValue):
        return constants().get(node.value.id, "…") if isinstance(node.value, ast.Name) else "…"
    if isinstance(node, ast.JoinedStr):
        return " ".join(
            "".join(part.value if isinstance(part, ast.Constant) else words(part) for part in node.values).split()
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words(node.left) + words(node.right)
    return "…"


def block(heading: str) -> Callable[[], str]:
    return lambda: "\n".join(f"- {quoted(line)}" for line in refusals(heading))


def quoted(line: str) -> str:
    """In a code span, whatever the line holds."""
    return f"`` {line} ``" if "`" in line else f"`{line}`"


BLOCKS: dict[str, Callable[[], str]] = {
    f"refusals: {heading}": block(heading) for heading in dict.fromkeys(TOPICS.values())
}
