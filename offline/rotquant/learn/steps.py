"""The steps of a learning loop: rates that fall as half a cosine, and snapshots from which a killed run goes on.

    steps = Steps(600, [optimiser], loop)
    for _ in steps:
        loss().backward()
        steps.advance("loss ...")

The same numbers come out, wherever the run was interrupted: a snapshot holds the parameters and all that the
optimisers remember.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotquant.journal import Slot


class Loop(NamedTuple):
    """What surrounds a loop: where its snapshots go, and who hears of each step (how many are done, a note)."""

    slot: Slot | None = None
    report: Callable[[int, str], object] = lambda done, note: None

    def passed(self, done: int, snapshot: Callable[[], dict[str, Tensor]], note: str) -> None:
        """So many passes are done; `snapshot` gives what the next one needs."""
        if self.slot:
            self.slot.save(done, snapshot)
        self.report(done, note)


ALONE = Loop()


class Steps:
    """Counts, and moves the parameters.

    Args:
        total: of steps; optimisers: with the rates of the first step.
    """

    def __init__(self, total: int, optimisers: list[torch.optim.Optimizer], loop: Loop) -> None:
        self.total, self.optimisers, self.loop, self.done = total, optimisers, loop, 0
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["first_lr"] = group["lr"]
        if loop.slot and loop.slot.found:
            self.done = loop.slot.done
            self._restore(loop.slot.found)

    def __iter__(self) -> Iterator[int]:
        """The steps that are left."""
        return iter(range(self.done, self.total))

    def advance(self, note: str) -> None:
        """One step of all optimisers, from the gradients that are there; clears them."""
        share = 0.5 + 0.5 * math.cos(math.pi * self.done / self.total)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["first_lr"] * share
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.done += 1
        self.loop.passed(self.done, self._snapshot, note)

    def _snapshot(self) -> dict[str, Tensor]:
        """Parameter p of optimiser o as "o.p", what o remembers of it as "o.p.name"."""
        found = {}
        for o, optimiser in enumerate(self.optimisers):
            for p, x in enumerate(parameters(optimiser)):
                found[f"{o}.{p}"] = x.detach().cpu()
            for p, memory in optimiser.state_dict()["state"].items():
                found |= {f"{o}.{p}.{name}": torch.as_tensor(value).cpu() for name, value in memory.items()}
        return found

    @torch.no_grad()
    def _restore(self, found: dict[str, Tensor]) -> None:
        """Inverse of `_snapshot`."""
        for o, optimiser in enumerate(self.optimisers):
            memory: dict[int, dict[str, Any]] = defaultdict(dict)
            for p, x in enumerate(parameters(optimiser)):
                x.copy_(found[f"{o}.{p}"])
                prefix = f"{o}.{p}."
                for name in (name for name in found if name.startswith(prefix)):
                    value = found[name]
                    memory[p][name.removeprefix(prefix)] = value if value.is_floating_point() else value.item()
            optimiser.load_state_dict({"state": memory, "param_groups": optimiser.state_dict()["param_groups"]})


def parameters(optimiser: torch.optim.Optimizer) -> Iterator[Tensor]:
    """In the order in which `state_dict` numbers them."""
    return (x for group in optimiser.param_groups for x in group["params"])
