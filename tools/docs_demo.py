"""What `rotquant demo --once` printed (benchmarks/results/demo.txt), and what served models answer, for pages."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

from docs_results import RESULTS, read, table

FENCE = "```\n{}\n```"


def lines() -> list[str]:
    return (RESULTS / "demo.txt").read_text(encoding="utf-8").splitlines()


def proof() -> str:
    """The start-up check, as one rank logged it."""
    found = lines()
    start = next(i for i, line in enumerate(found) if line.startswith("rotquant start-up check"))
    stop = next(i for i in range(start, len(found)) if not found[i].strip())
    return FENCE.format("\n".join(found[start:stop]))


def demo() -> str:
    """The first answer of what is served and the table of perplexities."""
    found = lines()
    best = next(i for i, line in enumerate(found) if line.startswith("answers") and line.endswith("best:"))
    asked = next(i for i in range(best, len(found)) if found[i].startswith("chat: "))
    answer = found[asked : found.index("", asked)]
    scores = next(i for i, line in enumerate(found) if "perplexity on" in line)
    return FENCE.format("\n".join([*answer, *takewhile(str.strip, found[scores:])]))


def quickstart() -> str:
    """The commands of the quick start and what they printed, shortened (benchmarks/results/quickstart.txt)."""
    return FENCE.format((RESULTS / "quickstart.txt").read_text(encoding="utf-8").rstrip())


def answers() -> str:
    """What the original and its checkpoints said when they were served (benchmarks/answers.py)."""
    found = read("answers-smollm2")
    heads = [label if label == "original" else f"`{label}`" for label in found["answers"]]
    said = zip(*found["answers"].values(), strict=True)
    rows = [[question, *map(cell, each)] for question, each in zip(found["questions"], said, strict=True)]
    return table(["question", *heads], rows)


def cell(text: str) -> str:
    """Text of several lines in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


BLOCKS: dict[str, Callable[[], str]] = {"demo": demo, "proof": proof, "quickstart": quickstart, "answers": answers}
