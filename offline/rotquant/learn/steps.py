"""The steps of a learning loop: rates that fall as half a cosine, and snapshots from which a killed run goes on.

    steps = Steps(600, [optimiser], slot)
    for _ in steps:
        loss().backward()
        steps.advance()

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

from rotquant.checkpoint.journal import Slot


class Loop(NamedTuple):
    """What surrounds a loop: where its snapshots go, and who hears, with a note, of each step."""

    slot: Slot | None = None
    report: Callable[[str], object] = lambda note: None


ALONE = Loop()


class Steps:
    """Counts, and moves the parameters.

    Args:
        total: of steps; optimisers: with the rates of the first step; slot: of the snapshots, None for none.
    """

    def __init__(self, total: int, optimisers: list[torch.optim.Optimizer], slot: Slot | None) -> None:
        self.total, self.optimisers, self.slot, self.done = total, optimisers, slot, 0
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["first_lr"] = group["lr"]
        if slot and slot.found:
            self.done = slot.done
            self._restore(slot.found)

    def __iter__(self) -> Iterator[int]:
        """The steps that are left."""
        return iter(range(self.done, self.total))

    def advance(self) -> None:
        """One step of all optimisers, from the gradients that are there; clears them."""
        share = 0.5 + 0.5 * math.cos(math.pi * self.done / self.total)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["first_lr"] * share
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.done += 1
        if self.slot:
            self.slot.save(self.done, self._snapshot)

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
