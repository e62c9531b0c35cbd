"""What was tried on a model and what was taken: the record of a choice, for config.json and the model card."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rotquant.choose.options import TUNE, Changes
from rotquant.recipe import Recipe

CACHE = (
    "What changes the KV cache alone was tried, with and without it, on all layers, whose weights and activations have"
    " 8 bits then.\n\n"
)
BASE, AGAIN, TUNING = "base", "all of it on other windows", "tuning"


@dataclass(frozen=True)
class Trial:
    """One candidate on top of those taken before it, or the base.

    `kl` is of the layers tried, in nats a token; `difference` is that to what it was tried on top of, `relative` the
    mean of each token's own relative difference, with its standard `error`. None for the base and where nothing was
    measured, for the reason that `note` gives.
    """

    name: str
    changes: Changes
    kl: float | None
    difference: float | None
    relative: float | None
    error: float | None
    taken: bool
    note: str = ""

    @property
    def change(self) -> str:
        return (
            f"{number(self.difference, '+.4f')}, a token {number(self.relative, '+.1%')} ± {number(self.error, '.1%')}"
        )

    @property
    def verdict(self) -> str:
        return self.note or ("taken" if self.taken else "left")


@dataclass(frozen=True)
class Choice:
    """All trials in their order, and what measured them: layers quantized, calibration and judged tokens.

    `again` is what was taken against the base, on other windows; None where nothing was taken. `tuned` is the whole
    quantized model tuned against itself before, on all windows that were judged; None before it was tried.
    """

    trials: tuple[Trial, ...]
    again: Trial | None
    layers: int
    calibrated: int
    judged: int
    tuned: Trial | None = None

    def apply(self, recipe: Recipe) -> Recipe:
        """The base with everything that was taken, in its order, or alone where that did not win again; and with the
        tuning that is open, unless it was left."""
        tuning = recipe.choose and recipe.choose.tuning
        for trial in self.trials if self.again and self.again.taken else ():
            if trial.taken and trial.changes:
                recipe = recipe.with_changes(trial.changes)
        if tuning and (self.tuned is None or self.tuned.taken):
            recipe = recipe.model_copy(update={TUNE: tuning})
        return recipe

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Choice:
        """Inverse of `as_dict`, also from JSON.

        Raises:
            TypeError, KeyError: it is none.
        """
        again, tuned = (data[name] and Trial(**data[name]) for name in ("again", "tuned"))
        trials = tuple(Trial(**trial) for trial in data["trials"])
        return cls(**data | {"trials": trials, "again": again, "tuned": tuned})

    def markdown(self) -> str:
        """A section of the model card."""
        rows = [
            f"| {t.name} | {number(t.kl, '.4f')} | {number(t.difference, '+.4f')} | {number(t.relative, '+.1%')}"
            f" | {number(t.error, '.1%')} | {t.verdict} |"
            for t in (*self.trials, *([self.again] if self.again else []))
        ]
        return (
            "## Chosen for this model\n\n"
            f"KL to full precision with {self.layers} layers quantized, on {self.judged} tokens that nothing learned"
            f" from (calibration of a trial: {self.calibrated} tokens). Each candidate was tried on top of those taken"
            " before it, and taken where it lowers the mean KL and that of a typical token. All of it together then had"
            " to win against the base once more, on other windows, by more than twice the error of the relative"
            " difference, or the base would stand.\n\n"
            f"{CACHE if any(of_cache(t.changes) for t in self.trials) else ''}"
            "| candidate | KL | difference | of a token, relative | its error | |\n|---|---|---|---|---|---|\n"
            + "\n".join(rows)
            + f"\n{self._tuning()}"
        )

    def _tuning(self) -> str:
        t = self.tuned
        if t is None:
            return ""
        if t.kl is None:
            return f"\nTuning of the whole model was {t.note}.\n"
        return (
            f"\nTuning, judged on the whole model and all of these windows: KL {t.kl:.4f}, {t.change}: {t.verdict}.\n"
        )


def of_cache(changes: Changes) -> bool:
    """Whether a candidate changes the KV cache and nothing else."""
    return bool(changes) and all(key.startswith("kv.") for key in changes)


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
