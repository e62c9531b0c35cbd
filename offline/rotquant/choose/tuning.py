"""Tuning as the last candidate: tried on the whole quantized model, and kept where that is nearer to full precision.

Unlike the others it is tried after the run itself: the judged windows, from which nothing learned, pass through the
whole served model before and after. It has to lower both the mean KL and that of the typical token; it is one trial, so
that there is no luck of many to make up for.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from rotquant.choose.choice import TUNING, Trial
from rotquant.choose.judge import WINDOW
from rotquant.choose.search import NONE, compared
from rotquant.common.progress import say
from rotquant.learn.options import Tuning
from rotquant.learn.tune import AFTER, BEFORE
from rotquant.models import Tensors
from rotquant.resources import memory_of_tuning
from rotquant.run import Run


def too_large(run: Run, tuning: Tuning, max_memory: float | None) -> Trial | None:
    """Why tuning is not tried, where it would need more than the recipe or `max_memory`, GB, allow."""
    assert run.recipe.choose is not None
    most = run.recipe.choose.memory
    allowed = most if max_memory is None else min(most, max_memory)
    recipe = run.recipe.model_copy(update={"tune": tuning})
    need = memory_of_tuning(recipe, run.arch, run.windows, run.dtype)
    if need <= allowed * 1e9:
        return None
    note = f"not tried: it needs about {need / 1e9:.1f} GB, {allowed:g} are allowed (choose.memory, --max-memory)"
    say(f"{TUNING}: {note}")
    return Trial(TUNING, {}, *NONE, False, note)


def aside(run: Run) -> Tensor | None:
    """The windows int64 [n, T] to judge tuning by; None where it is not on trial."""
    if run.choice is None or run.calibrated is None or run.calibrated.aside is None:
        return None
    choose = run.recipe.choose
    return run.calibrated.aside[:, :WINDOW] if choose and choose.tuning else None


def judged(run: Run, tuned: Tensors) -> Run:
    """The run with the verdict on what `tune` made, and without tuning where it lost."""
    if run.choice is None or BEFORE not in tuned:
        return run
    trial = compared(TUNING, {}, tuned[AFTER], tuned[BEFORE], margin=0)
    say(f"{TUNING}: KL {trial.kl:.4f}, {trial.change}: {trial.verdict}")
    recipe = run.recipe if trial.taken else run.recipe.model_copy(update={"tune": None})
    return replace(run, recipe=recipe, choice=replace(run.choice, tuned=trial))
