"""What was tried on a model and what was taken: the record of a choice, for config.json and the model card."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rotquant.choose.options import Changes
from rotquant.recipe import Recipe

BASE, AGAIN = "base", "all of it on other windows"


@dataclass(frozen=True)
class Trial:
    """One candidate on top of those taken before it, or the base.

    `kl` is of the layers tried, in nats a token; `difference` to what it was tried on top of and `error`, its standard
    error, are None for the base and where nothing was measured, for the reason that `note` gives.
    """

    name: str
    changes: Changes
    kl: float | None
    difference: float | None
    error: float | None
    taken: bool
    note: str = ""

    @property
    def verdict(self) -> str:
        return self.note or ("taken" if self.taken else "left")


@dataclass(frozen=True)
class Choice:
    """All trials in their order, and what measured them: layers quantized, calibration and judged tokens.

    `again` is what was taken against the base, on other windows; None where nothing was taken.
    """

    trials: tuple[Trial, ...]
    again: Trial | None
    layers: int
    calibrated: int
    judged: int

    def apply(self, recipe: Recipe) -> Recipe:
        """The base with everything that was taken, in its order; the base alone where that did not win again."""
        if self.again is None or not self.again.taken:
            return recipe
        for trial in self.trials:
            if trial.taken and trial.changes:
                recipe = recipe.with_changes(trial.changes)
        return recipe

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Choice:
        """Inverse of `as_dict`, also from JSON.

        Raises:
            TypeError, KeyError: it is none.
        """
        again = data["again"] and Trial(**data["again"])
        return cls(**data | {"trials": tuple(Trial(**trial) for trial in data["trials"]), "again": again})

    def markdown(self) -> str:
        """A section of the model card."""
        rows = [
            f"| {t.name} | {number(t.kl, '.4f')} | {number(t.difference, '+.4f')}"
            f" | {number(t.error, '.4f')} | {t.verdict} |"
            for t in (*self.trials, *([self.again] if self.again else []))
        ]
        return (
            "## Chosen for this model\n\n"
            f"KL to full precision with {self.layers} layers quantized, on {self.judged} tokens that nothing learned"
            f" from (calibration of a trial: {self.calibrated} tokens). Each candidate was tried on top of those taken"
            " before it, and taken where it lowers the KL. All of it together then had to win against the base once"
            " more, on other windows, by more than twice the error of the difference, or the base would stand.\n\n"
            "| candidate | KL | difference | its error | |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
        )


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
