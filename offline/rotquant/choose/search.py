"""Which candidates a model is quantized with: greedy, one after the other, by the KL that each trial measures.

The base is tried first. Each candidate is tried on top of the base and of those taken so far, and is taken if it lowers
the KL of the typical token (`judge.relative`) and does not raise the mean by more than its error: a wrong pick within
the error of the measurement costs little, a part left out costs what it is worth. Then all that was taken has to win
against the base once more, in both, judged on other windows, by more than MARGIN standard errors of the relative
difference: he who tries much finds something. The mean alone cannot tell: few tokens hold most of it. Where it does not
win, the base stands as it is.

What a trial learns of the whole model (R1, or everything end to end) is kept in the journal under what decides it, for
later trials and the run itself. So is each trial's result: a killed run repeats none.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from rotquant.checkpoint.journal import Journal, Scope, Slot
from rotquant.choose.choice import AGAIN, BASE, Choice, Trial, of_cache
from rotquant.choose.judge import WINDOW, Judge, Model, cache_alone, calibration, error_of, relative
from rotquant.choose.options import Changes
from rotquant.common.progress import Progress, clock, say
from rotquant.errors import RotQuantError
from rotquant.learn import plan
from rotquant.learn.stream import Job
from rotquant.recipe import Recipe

MARGIN = 2
UNSEEN = {"choose", "name", "description", "paper", "deviations", "calibration", "lm_head", "tune"}  # by a trial
NONE = (None,) * 4  # of what a trial measures
R1_KEYS = ("r1", "walsh_block")


@dataclass
class Search:
    """The trials of one run.

    Args:
        base: the recipe whose candidates are tried; aside: windows int64 [n, T] to judge by.
        begin: the work that a recipe asks for: everything that is checked before a run, then its transforms unlearned.
    """

    base: Recipe
    begin: Callable[[Recipe], Job]
    aside: Tensor
    journal: Journal

    def __post_init__(self) -> None:
        assert self.base.choose is not None
        self.effort, self.candidates = self.base.choose.effort, self.base.choose.tried
        self.started, self.number, self.total = time.monotonic(), 1, len(self.candidates) + 3
        job = self.begin(self.base)
        tokens = calibration(job.tokens, job.arch, self.effort)
        self.judge = Judge(
            Model(job.source, job.arch, tokens, self.aside[:, :WINDOW], job.devices), self.effort, self.journal
        )

    def __call__(self) -> Choice:
        """Tries everything, in its order."""
        kl = self._kl(BASE, self.begin(self.base))
        trials = [Trial(BASE, {}, kl.mean().item(), None, None, None, True)]
        self._report(trials[0])
        recipe, model = self.base, self.judge.model
        for name, changes in self.candidates.items():
            self.number += 1
            trial, recipe, kl = self._try(name, changes, recipe, kl)
            trials.append(trial)
            self._report(trial)
        again = self._again(recipe) if recipe != self.base else None
        return Choice(tuple(trials), again, self.judge.layers, model.tokens.numel(), len(kl))

    def _again(self, recipe: Recipe) -> Trial:
        """What was taken against the base, on the other windows."""
        self.number += 1
        before = self._kl(AGAIN, self.begin(self.base), turn=1)
        self.number += 1
        kl = self._kl(AGAIN, self.begin(recipe), turn=1)
        trial = compared(AGAIN, {}, kl, before, MARGIN)
        self._report(trial)
        return trial

    def _try(self, name: str, changes: Changes, recipe: Recipe, before: Tensor) -> tuple[Trial, Recipe, Tensor]:
        """The trial of one candidate, and recipe and KL of what stands after it."""
        left = partial(Trial, name, changes, taken=False)
        try:
            job = self.begin(recipe.with_changes(changes))
            if job.recipe == recipe:
                return left(*NONE, note="changes nothing here"), recipe, before
            if of_cache(changes):
                own, other = (self._kl(name, self.begin(cache_alone(one)), whole=True) for one in (job.recipe, recipe))
                trial = compared(name, changes, own, other)
                kl = self._kl(name, job) if trial.taken else before
            else:
                kl = self._kl(name, job)
                trial = compared(name, changes, kl, before)
        except RotQuantError as error:
            return left(*NONE, note=f"cannot be: {error}"), recipe, before
        return (trial, job.recipe, kl) if trial.taken else (trial, recipe, before)

    def _kl(self, name: str, job: Job, turn: int = 0, whole: bool = False) -> Tensor:
        """KL float32 [judged tokens] with a recipe, from the journal where it is known; whole: of all layers."""
        step = f"trial {turn}{' whole' if whole else ''} {digest(job.recipe.model_dump(exclude=UNSEEN))}"
        if known := self.journal.kept(step):
            return known["kl"]
        plan.learn_whole(job, learned(self.journal, job.recipe))
        slot = partial(Slot, Scope(self.journal, step))
        title = f"choosing {self.number}/{self.total}, {name}: layer"
        with Progress(title, job.arch.layers if whole else self.judge.layers, short=True) as progress:
            kl = self.judge(job, turn, slot, progress, whole)
        self.journal.keep(step, {"kl": kl})
        return kl

    def _report(self, trial: Trial) -> None:
        spent, left = time.monotonic() - self.started, self.total - self.number
        line = f"choosing {self.number}/{self.total} · {trial.name}"
        if trial.kl is not None:
            line += f": KL {trial.kl:.4f}"
        if trial.difference is not None:
            line += f", {trial.change}"
        if trial.name != BASE:
            line += f": {trial.verdict}"
        say(f"{line} · {clock(spent)} · eta {clock(spent / self.number * left)}")


def compared(name: str, changes: Changes, kl: Tensor, before: Tensor, margin: float | None = None) -> Trial:
    """A trial from the KL [judged tokens] of each side; with a margin the mean must fall, whatever its error, and the
    typical token by more than so many errors."""
    change, each = kl - before, relative(kl, before)
    difference, typical, error = change.mean().item(), each.mean().item(), error_of(each)
    noise = error_of(change) if margin is None else 0
    taken = difference < noise and typical < -(margin or 0) * error  # never where anything is not a number
    return Trial(name, changes, kl.mean().item(), difference, typical, error, taken)


def learned(journal: Journal, recipe: Recipe) -> Scope:
    """Where what a recipe learns of the whole model is kept: under all that decides it."""
    kept = recipe.model_dump(exclude=UNSEEN)
    if not recipe.learn.end_to_end:  # R1 alone
        kept = {"r1": [kept["rotations"][key] for key in R1_KEYS], "learn": kept["learn"]["surrogate"]}
        kept["quantizer"] = recipe.activations.model_dump()
        kept["shifted"] = [site for site in ("attn", "mlp") if "shift" in recipe.online.of(site)]
        kept["subtracted"] = recipe.weights.rank if recipe.weights.subtracts else 0
    return Scope(journal, f"learned {digest(kept)}")


def digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
