"""What a recipe leaves open: its section `choose`, candidates of which measuring on the model in hand takes some.

    choose:
      effort: 1
      candidates:
        asymmetric activations: {activations.symmetric: false}
        smoothing before R4: {scales.up: smooth}
      mixtures:
        branch at attention: {weights.rank: 32, weights.branch: pca}
      thorough:
        no clip: {activations.clip: 1.0}
      tune: {steps: 32}

The recipe's other sections are the base. A candidate is a name and the keys that it changes; they are tried in their
order, each on top of the base and the candidates taken before it, so what rests on another comes after it. Those of
`mixtures` are tried where a model has experts, behind the others. Tuning is
tried last, on the whole quantized model. A key that somebody sets by hand is no longer open: candidates that would
change it are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rotquant.learn.options import Tuning

Changes = dict[str, Any]  # values by dotted keys of a recipe
TUNE = "tune"  # a recipe's key
Model = TypeVar("Model", bound=BaseModel)


class Choose(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    effort: float = Field(
        default=1,
        ge=0,
        le=100,
        description="0: the base as it is; else: that many times the layers, tokens and steps of tuning, 0.5 half of"
        " them, and from 2 on the thorough candidates",
    )
    candidates: dict[str, Changes]
    mixtures: dict[str, Changes] = {}
    thorough: dict[str, Changes] = {}
    tune: Tuning | None = None
    memory: float = Field(default=16, gt=0, description="GB: tuning that needs more is not tried")

    @model_validator(mode="before")
    @classmethod
    def _some(cls, data: Any) -> Any:
        if isinstance(data, dict) and "candidates" not in data:
            raise ValueError("this recipe has no candidates to choose from; take best or best-online, or give it some")
        return data

    @property
    def tried(self) -> dict[str, Changes]:
        """The candidates that this effort tries, in their order."""
        if not self.effort:
            return {}
        return self.candidates | (self.thorough if self.effort >= 2 else {})

    @property
    def tuning(self) -> Tuning | None:
        """What this effort tunes by."""
        if not self.effort or not self.tune:
            return None
        return self.tune.model_copy(update={"steps": math.ceil(self.tune.steps * self.effort)})

    def without(self, keys: Iterable[str]) -> Choose:
        """What is still open where these keys are set by hand."""
        fixed = list(keys)
        tune = None if any(overlap(TUNE, key) for key in fixed) else self.tune
        left = self.those(lambda changes: not any(overlap(a, b) for a in changes for b in fixed))
        return left.model_copy(update={"tune": tune})

    def those(self, keep: Callable[[Changes], bool]) -> Choose:
        """The candidates that change what they may."""
        return self.model_copy(
            update={name: {n: c for n, c in found.items() if keep(c)} for name, found in self.lists.items()}
        )

    @property
    def lists(self) -> dict[str, dict[str, Changes]]:
        """All candidates there are."""
        return {"candidates": self.candidates, "mixtures": self.mixtures, "thorough": self.thorough}


def overlap(first: str, second: str) -> bool:
    """Whether two dotted keys are one, or one holds the other."""
    return f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}.")


def changed(recipe: Model, changes: Changes) -> Model:
    """The recipe with some keys changed.

    Raises:
        ValidationError: a key or a value that the recipe does not take.
    """
    data = recipe.model_dump()
    for key, value in changes.items():
        place, (*parents, last) = data, key.split(".")
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[last] = value
    return type(recipe).model_validate(data)
