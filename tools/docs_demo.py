"""What `rotquant demo --once` printed (benchmarks/results/demo.txt), shortened for the pages."""

from __future__ import annotations

from collections.abc import Callable

from docs_results import RESULTS

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
    """The first answer, the size of the cache, and the table of perplexities."""
    found = lines()
    asked = next(i for i, line in enumerate(found) if line.startswith("chat: "))
    answer = found[asked : found.index("", asked)]
    cache = next(line for line in found if line.startswith("KV cache: "))
    table = next(i for i, line in enumerate(found) if "perplexity on" in line)
    scores = found[table : found.index("", table)]
    return FENCE.format("\n".join([*answer, "...", cache, *scores]))


BLOCKS: dict[str, Callable[[], str]] = {"demo": demo, "proof": proof}
