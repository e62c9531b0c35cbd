"""A recipe as a model can take it, where the model lacks what the recipe rotates.

R2 rotates an attention's values, and the output linear takes it back: exact where nothing but the mixing of tokens is
between them. Behind a gate, and in linear attention, each channel has a factor of its own. There R2 becomes an online
Hadamard in front of the output linears, behind the gate; what would learn R2 has nothing to learn.
"""

from __future__ import annotations

from rotquant.common.part import Part
from rotquant.common.progress import say
from rotquant.errors import RotQuantError
from rotquant.models import Architecture
from rotquant.recipe import Recipe


def rotates_values(arch: Architecture) -> bool:
    """Whether every layer's values rotate into its output linear."""
    return all(kind.attends and not kind.attends.gated for kind in arch.kinds)


def fitted(recipe: Recipe, arch: Architecture) -> Recipe:
    """The recipe itself, or with R2 online where the model has none; the profile then keeps or drops it.

    Raises:
        RotQuantError: online stages that would not be the same in every layer.
    """
    check_chains(recipe, arch)
    if recipe.rotations.r2 == "none" or rotates_values(arch):
        return recipe
    learn = recipe.learn
    surrogate = learn.surrogate
    if surrogate:
        targets = [target for target in surrogate.targets if target != "r2"]
        surrogate = surrogate.model_copy(update={"targets": targets}) if targets else None
    learning = {"surrogate": surrogate, "blockwise": _less(learn.blockwise), "end_to_end": _less(learn.end_to_end)}
    online = [word for word in recipe.online.o if word != "hadamard"]
    say(
        f"recipe {recipe.name}: a gate stands between the values and the output linear of this model, so that R2 is not"
        " folded: a Hadamard runs online in front of o"
    )
    return recipe.model_copy(
        update={
            "rotations": recipe.rotations.model_copy(update={"r2": "none"}),
            "learn": learn.model_copy(update=learning),
            "online": recipe.online.model_copy(update={"o": ["hadamard", *online]}),
        }
    )


def check_chains(recipe: Recipe, arch: Architecture) -> None:
    """Refuses stages in front of output linears whose sizes the kinds of layer do not share."""
    words = recipe.online.learned("o")
    for what, asked, found in (
        ("inputs of the output linear", bool(words), {kind.attention.channels for kind in arch.kinds}),
        ("channels of a head", "heads" in words, {kind.attention.channels_of_head for kind in arch.kinds}),
    ):
        if asked and len(found) > 1:
            raise RotQuantError(
                f"recipe {recipe.name}: online.o is {words}, which needs the same {what} in every layer, and this model"
                f" has {' and '.join(map(str, sorted(found)))}: use --set online.o=[]"
            )


def _less(stage: Part | None) -> Part | None:
    """A stage of learning without R2; None where it learns nothing else."""
    kept = [name for name in getattr(stage, "learns", []) if name != "r2"]
    return stage.model_copy(update={"learns": kept}) if stage and kept else None
