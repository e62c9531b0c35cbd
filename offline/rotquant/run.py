"""What a run is: what is asked for, what decides its result, and everything that can be checked before any work."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rotquant.checkpoint import writer
from rotquant.checkpoint.format import FORMAT_VERSION
from rotquant.checkpoint.hub import fetch
from rotquant.checkpoint.original import read_original
from rotquant.checkpoint.source import DTYPES, Source
from rotquant.choose.choice import Choice
from rotquant.choose.judge import judged_windows
from rotquant.common.devices import Devices
from rotquant.common.progress import say
from rotquant.errors import RotQuantError
from rotquant.fitting import fitted
from rotquant.learn.initial import generator, initial_transforms
from rotquant.learn.stream import Job
from rotquant.models import Architecture
from rotquant.models.registry import KNOWN_BY_CLASS
from rotquant.recipe import LMHead, Recipe
from rotquant.recipes import load_recipe
from rotquant.text import Calibrated, calibration_tokens, read_tokenizer
from rotquant.transforms.fold import Fold
from rotquant.transforms.gains import with_gains_in_linears
from rotquant.transforms.space import Transforms


@dataclass(frozen=True)
class Settings:
    """What a run is asked for, beside the model; see `quantize`."""

    recipe: str = "best"
    settings: Sequence[str] = ()
    calibration: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    device: str = "auto"
    profile: str = "full"
    tp_max: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """Everything that decides the result of a run."""

    model: Path
    source: Source
    arch: Architecture
    recipe: Recipe
    profile: str
    transforms: Transforms  # before `learn_transforms` those that need no learning
    calibrated: Calibrated | None
    dtype: torch.dtype
    devices: Devices
    seed: int
    tp_max: int
    choice: Choice | None = None  # among the recipe's candidates, where it has some; `recipe` is then what was chosen

    @property
    def windows(self) -> tuple[int, ...]:
        """Calibration samples and their tokens."""
        return tuple(self.calibrated.tokens.shape) if self.calibrated else (0, 0)

    @property
    def fold(self) -> Fold:
        return Fold(self.arch, self.transforms)

    def shard(self, number: int) -> str:
        """Name of a shard: 1 the embeddings, then one a layer, the last one the head."""
        return f"model-{number:05d}-of-{self.arch.layers + 2:05d}.safetensors"


def prepare(model: str, asked: Settings) -> Run:
    """Reads and checks everything that can be checked before any work is done."""
    devices = Devices(asked.device)
    if asked.profile not in ("full", "portable"):
        raise RotQuantError(f"--profile {asked.profile}: take full or portable")
    recipe = load_recipe(asked.recipe, asked.settings)
    recipe.for_profile(asked.profile).check_learning()  # before a model is fetched for it
    folder = fetch(model)
    arch, source = read_original(folder)
    recipe = fitted(recipe, arch).for_profile(asked.profile).check_learning()
    check_shapes(recipe, arch)
    check_windows(recipe, arch)
    recipe = for_cache(for_mixture(for_head(recipe, arch), arch), arch)
    transforms = with_gains_in_linears(initial_transforms(recipe, arch, asked.tp_max, asked.seed), arch, source)
    calibrated = None
    if recipe.needs_calibration:
        length = min(asked.seq_len or recipe.calibration.seq_len, arch.config.max_position_embeddings)
        count = asked.samples or recipe.calibration.samples
        effort = recipe.choose.effort if recipe.choose and recipe.chooses else 0
        if recipe.activations.most_kl is not None:
            effort = max(1, effort)
        aside = judged_windows(length, effort) if effort else 0
        more = max(0, tuned_windows(recipe, length) - count)
        tokenizer = read_tokenizer(folder)
        calibrated = calibration_tokens(asked.calibration, tokenizer, count, length, asked.seed, aside, more)
        if asked.calibration is None:
            say("no --calibration: taking sources of Python's standard library, which suit code models only")
        if len(calibrated.tokens) < count:
            say(f"calibration text gives {len(calibrated.tokens)} windows of {length} tokens, {count} were asked for")
        if recipe.chooses and calibrated.aside is None:
            say(f"calibration text gives no window to choose by: recipe {recipe.name} stays at its base")
    dtype = DTYPES[source.dtypes[arch.names.embedding]]
    return Run(
        folder, source, arch, recipe, asked.profile, transforms, calibrated, dtype, devices, asked.seed, asked.tp_max
    )


def tuned_windows(recipe: Recipe, length: int) -> int:
    """How many windows of `length` tokens tuning takes, if the recipe tunes or may: each step new ones, where there
    are as many."""
    tuning = recipe.tune or (recipe.choose and recipe.choose.tuning)
    if not tuning:
        return 0
    return math.ceil(tuning.steps * tuning.windows(length) / (length // tuning.length(length)))


def check_shapes(recipe: Recipe, arch: Architecture) -> None:
    """Refuses groups and ranks that a weight of the model cannot have."""
    size, rank = recipe.weights.group_size, recipe.weights.rank
    for name, shape in arch.linears():
        if shape[1] % 8 or (size and shape[1] % size):
            what = f"weights.group_size {size}" if size else "8, the codes of one int32 word"
            raise RotQuantError(f"config.json: the {shape[1]} inputs of {name}.weight are not divisible by {what}")
        if rank > min(shape):
            raise RotQuantError(
                f"recipe {recipe.name}: weights.rank {rank} is above {min(shape)}, the rank of {name}.weight"
            )


def check_windows(recipe: Recipe, arch: Architecture) -> None:
    """Refuses windows of single layers that nobody would give them where the KV cache is vLLM's own."""
    (name,) = arch.config.architectures or [""]
    found = {kind.attention.window for kind in arch.kinds}
    if recipe.kv.bits != 4 and len(found) > 1 and KNOWN_BY_CLASS[name].windows_of_plugin:
        raise RotQuantError(
            f"config.json: layer_types: vLLM's {name} gives no window to single layers. The plugin does, with a 4-bit"
            " KV cache: quantize with kv.bits=4 and --profile full, or set use_sliding_window to false"
        )


def for_head(recipe: Recipe, arch: Architecture) -> Recipe:
    """The recipe, with lm_head as it is where vLLM's class takes the embedding in its place, and the target alone asks.

    Raises:
        RotQuantError: the recipe itself asks for another lm_head there, or the model has one of its own.
    """
    if not arch.stays_tied:
        return recipe
    (name,) = arch.config.architectures or [""]
    if not arch.tied:
        raise RotQuantError(f"{arch.names.head}: vLLM's {name} would take the embedding in its place; leave it out")
    if not recipe.lm_head.form:
        return recipe
    if recipe.target != "cpu":
        raise RotQuantError(f"vLLM's {name} has no lm_head but the embedding: quantize with --set lm_head.bits=16")
    say(f"--target cpu: lm_head stays in 16 bits, since vLLM's {name} has none but the embedding")
    return recipe.model_copy(update={"lm_head": LMHead(bits=16)})


def for_mixture(recipe: Recipe, arch: Architecture) -> Recipe:
    """The recipe with the candidates of mixtures, and without those that experts do not run: more before them than R4,
    or beside them a branch.

    A branch of the inputs stays: it is at attention alone there (`Layer.branch_sites`).

    Raises:
        RotQuantError: the recipe itself asks for one.
    """
    if not arch.mixtures:
        return recipe
    off = {
        "weights.rank": "0", "online.mlp": "[]", "online.down": "[]", "scales.order": "false",
    }  # fmt: skip
    asked = {
        "weights.rank": recipe.weights.rank > 0 and not recipe.weights.subtracts,
        "online.mlp": bool(recipe.online.of("mlp")),
        "online.down": bool(recipe.online.of("down")),
        "scales.order": recipe.scales.order,
    }
    if found := next((key for key, there in asked.items() if there), None):
        raise RotQuantError(
            f"recipe {recipe.name}: {found} is not supported in a mixture of experts, each of which has other inputs:"
            f" use --set {found}={off[found]}, or a recipe without it, such as best or quarot"
        )
    recipe = recipe.without_choices_of([key for key in off if key != "weights.rank"])
    if recipe.choose is None:
        return recipe
    choose = recipe.choose.those(lambda c: "weights.rank" not in c or c.get("weights.branch") == "pca")
    return recipe.model_copy(
        update={"choose": choose.model_copy(update={"candidates": choose.candidates | choose.mixtures})}
    )


def for_cache(recipe: Recipe, arch: Architecture) -> Recipe:
    """Refuses feedback of keys that are not rounded; without the candidates that would ask for it."""
    if recipe.kv.bits == 4 and arch.attentions:
        return recipe
    if recipe.kv.key_feedback:
        raise RotQuantError(
            f"recipe {recipe.name}: kv.key_feedback is of keys that are rounded to 4 bits, and here none is: set"
            " kv.bits=4, or kv.key_feedback=false"
        )
    if recipe.choose is None:
        return recipe
    return recipe.model_copy(update={"choose": recipe.choose.those(lambda changes: "kv.key_feedback" not in changes)})


def fingerprint(run: Run, digest: str) -> dict[str, Any]:
    """What must be equal for a resumed run to give the same bytes."""
    calibrated = run.calibrated
    return {
        "rotquant": version("rotquant"),
        "torch": torch.__version__,
        "format_version": FORMAT_VERSION,
        "model": digest,
        "recipe": run.recipe.model_dump(),
        "profile": run.profile,
        "tp_max": run.tp_max,
        "seed": run.seed,
        "device": run.devices.names,
        "calibration": [calibrated.sha256, *calibrated.tokens.shape] if calibrated else None,
    }


def finished(run: Run, output: Path, digest: str) -> bool:
    """True where the output folder is what this run would make."""
    try:
        found = json.loads((output / "config.json").read_text())["rotquant"]
        made = found["profile"], found["provenance"]
        if "choice" in made[1]:
            run = with_choice(run, Choice.from_dict(made[1]["choice"]))
    except (OSError, ValueError, KeyError, TypeError, RotQuantError):
        return False
    return made == (run.profile, json.loads(json.dumps(provenance(run, digest))))


def provenance(run: Run, digest: str) -> dict[str, Any]:
    found = writer.provenance(run.recipe, run.seed, run.tp_max, digest, run.calibrated)
    return found | ({"choice": run.choice.as_dict()} if run.choice else {})


def begin(run: Run, recipe: Recipe) -> Job:
    """The run's work with another recipe, as its profile can express it: checked, and nothing learned yet."""
    recipe = fitted(recipe, run.arch).for_profile(run.profile).check_learning()
    check_shapes(recipe, run.arch)
    transforms = initial_transforms(recipe, run.arch, run.tp_max, run.seed)
    transforms = with_gains_in_linears(transforms, run.arch, run.source)
    return learner(replace(run, recipe=recipe, transforms=transforms))


def with_choice(run: Run, choice: Choice) -> Run:
    job = begin(run, choice.apply(run.recipe))
    return replace(run, recipe=job.recipe, transforms=job.transforms, choice=choice)


def tuner(run: Run) -> Job:
    """The run's work of tuning: as many windows as it takes, those of the calibration and others of its text."""
    job, calibrated = learner(run), run.calibrated
    assert calibrated is not None
    every = job.tokens if calibrated.more is None else torch.cat((job.tokens, calibrated.more))
    tuning, whole = run.recipe.tune, every.shape[1]
    assert tuning is not None
    length = tuning.length(whole)
    cut = every[:, : whole // length * length].reshape(-1, length)
    drawn = torch.randperm(len(cut), generator=generator(run.seed, "tuned windows"))
    return replace(job, tokens=cut[drawn[: tuning.steps * tuning.windows(whole)]])


def learner(run: Run) -> Job:
    assert run.calibrated is not None
    return Job(
        recipe=run.recipe, arch=run.arch, source=run.source, tokens=run.calibrated.tokens,
        transforms=deepcopy(run.transforms), dtype=run.dtype, seed=run.seed, devices=run.devices, tp_max=run.tp_max,
    )  # fmt: skip
