"""Learning in its order: R1, then the layers from the first to the last, then end to end.

Every step's result, and snapshots of its loop, are files of the journal: an interrupted run reads them back, and goes
on with the same numbers.
"""

from __future__ import annotations

from torch import Tensor

from rotquant.checkpoint.journal import Journal, Scope, Slot
from rotquant.common.progress import Progress
from rotquant.learn.end_to_end import learn_end_to_end
from rotquant.learn.layers import LayerLearner
from rotquant.learn.rotations import R1_STEPS, learn_r1
from rotquant.learn.stream import Job
from rotquant.transforms.dense import Dense
from rotquant.transforms.space import LayerTransforms

R1, END_TO_END = "learn r1", "learn end to end"  # steps of the journal, beside those of the layers


def learn(job: Job, journal: Journal | Scope) -> None:
    """Completes job.transforms as job.recipe says."""
    learn_residual(job, journal)
    if job.recipe.learns_layers:
        learn_layers(job, journal)
    if job.recipe.learn.end_to_end:
        known = journal.kept(END_TO_END)
        if known is None:
            learn_end_to_end(job, Slot(journal, END_TO_END))
            known = all_tensors(job)
            journal.keep(END_TO_END, known, [Slot.name(END_TO_END)])
        restore(job, known)


def learn_whole(job: Job, journal: Journal | Scope) -> None:
    """The part of `learn` that no layer has for itself: R1, or everything where it is learned end to end."""
    if job.recipe.learn.end_to_end:
        learn(job, journal)
    else:
        learn_residual(job, journal)


def learn_residual(job: Job, journal: Journal | Scope) -> None:
    """R1, which belongs to no layer."""
    if not job.recipe.learns_r1:
        return
    known = journal.kept(R1)
    if known is None:
        known = learn_r1(job, journal)
        journal.keep(R1, known, [*R1_STEPS, *map(Slot.name, R1_STEPS)])
    job.transforms.r1 = Dense(known["r1"])


def learn_layers(job: Job, journal: Journal | Scope) -> None:
    learner = LayerLearner(job)
    with Progress("learning: layer", job.arch.layers) as progress:
        for index in range(job.arch.layers):
            step = f"learn layer {index}"
            known = journal.kept(step)
            start = LayerTransforms.from_tensors(known) if known else None
            layer = learner(index, start, Slot(journal, step), progress.within)
            if known is None:
                journal.keep(step, layer.tensors(), [Slot.name(step)])
            job.transforms.layers[index] = layer
            progress.step()


def all_tensors(job: Job) -> dict[str, Tensor]:
    found = {f"layers.{i}.{k}": t for i, layer in enumerate(job.transforms.layers) for k, t in layer.tensors().items()}
    return found | ({"r1": job.transforms.r1.matrix} if isinstance(job.transforms.r1, Dense) else {})


def restore(job: Job, tensors: dict[str, Tensor]) -> None:
    """Inverse of `all_tensors`."""
    if "r1" in tensors:
        job.transforms.r1 = Dense(tensors["r1"])
    for i in range(job.arch.layers):
        prefix = f"layers.{i}."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        job.transforms.layers[i] = LayerTransforms.from_tensors(own)
