"""A recipe as a model can take it, where the model lacks what the recipe rotates.

R1 rotates the residual stream: exact where what a block writes is added as it is. Behind a norm of its output it is
multiplied by a gain, each channel by its own. There R1 becomes an online Hadamard behind the norms of the stream, in
front of attention's and the MLP's first linears.

R2 rotates an attention's values, and the output linear takes it back: exact where nothing but the mixing of tokens is
between them. Behind a gate, and in linear attention, each channel has a factor of its own. There R2 becomes an online
Hadamard in front of the output linears, behind the gate.

What would learn such a rotation has nothing to learn, and a candidate that would do nothing else is left out.
"""

from __future__ import annotations

from rotquant.choose.options import Changes, Choose
from rotquant.common.part import Part
from rotquant.common.progress import say
from rotquant.errors import RotQuantError
from rotquant.models import Architecture
from rotquant.recipe import Recipe


def rotates_values(arch: Architecture) -> bool:
    """Whether every layer's values rotate into its output linear."""
    return all(kind.attends and not kind.attends.gated for kind in arch.kinds)


def fitted(recipe: Recipe, arch: Architecture) -> Recipe:
    """The recipe itself, or with R1 or R2 online where the model has none; the profile then keeps or drops it.

    Raises:
        RotQuantError: online stages that would not be the same in every layer.
    """
    check_chains(recipe, arch)
    if arch.mixtures and recipe.online.shift_norms == "all":
        recipe = recipe.model_copy(update={"online": recipe.online.model_copy(update={"shift_norms": "attn"})})
    if not rotates_values(arch) and recipe.rotations.r2 != "none":
        say(
            f"recipe {recipe.name}: a gate stands between the values and the output linear of this model, so that R2"
            " is not folded: a Hadamard runs online in front of o"
        )
        recipe = online(recipe, "r2", "o")
    if not arch.rotates:
        if recipe.rotations.r1 != "none":
            say(
                f"recipe {recipe.name}: a norm stands between what a block of this model writes and the residual"
                " stream, so that R1 is not folded: Hadamards run online in front of attn and mlp"
            )
            recipe = online(recipe, "r1", "attn", "mlp")
        recipe = unlearned(recipe, "r1")
        if recipe.choose:
            recipe = recipe.model_copy(update={"choose": effective(recipe)})
    return recipe


def online(recipe: Recipe, rotation: str, *sites: str) -> Recipe:
    """The recipe with a Hadamard in front of these sites in the place of a rotation."""
    stages = {site: ["hadamard", *(word for word in recipe.online.of(site) if word != "hadamard")] for site in sites}
    recipe = recipe.model_copy(
        update={
            "rotations": recipe.rotations.model_copy(update={rotation: "none"}),
            "online": recipe.online.model_copy(update=stages),
        }
    )
    return unlearned(recipe, rotation)


def unlearned(recipe: Recipe, rotation: str) -> Recipe:
    """The recipe without what would learn a rotation."""
    learn, surrogate = recipe.learn, recipe.learn.surrogate
    if surrogate:
        targets = [target for target in surrogate.targets if target != rotation]
        surrogate = surrogate.model_copy(update={"targets": targets}) if targets else None
    learning = {
        "surrogate": surrogate, "blockwise": _less(learn.blockwise, rotation),
        "end_to_end": _less(learn.end_to_end, rotation),
    }  # fmt: skip
    return recipe.model_copy(update={"learn": learn.model_copy(update=learning)})


def effective(recipe: Recipe) -> Choose:
    """Its candidates but for those that only learn R1."""
    assert recipe.choose

    def kept(found: dict[str, Changes]) -> dict[str, Changes]:
        return {n: c for n, c in found.items() if unlearned(recipe.with_changes(c), "r1") != recipe}

    choose = recipe.choose
    return choose.model_copy(update={name: kept(found) for name, found in choose.lists.items()})


def check_chains(recipe: Recipe, arch: Architecture) -> None:
    """Refuses stages in front of output linears whose sizes the kinds of layer do not share."""
    words = [word for word in recipe.online.learned("o") if word != "shift"]  # a vector fits any size
    for what, asked, found in (
        ("inputs of the output linear", bool(words), {kind.attention.channels for kind in arch.kinds}),
        ("channels of a head", "heads" in words, {kind.attention.channels_of_head for kind in arch.kinds}),
    ):
        if asked and len(found) > 1:
            raise RotQuantError(
                f"recipe {recipe.name}: online.o is {words}, which needs the same {what} in every layer, and this model"
                f" has {' and '.join(map(str, sorted(found)))}: use --set online.o=[]"
            )


def _less(stage: Part | None, rotation: str) -> Part | None:
    """A stage of learning without a rotation; None where it learns nothing else."""
    kept = [name for name in getattr(stage, "learns", []) if name != rotation]
    return stage.model_copy(update={"learns": kept}) if stage and kept else None
