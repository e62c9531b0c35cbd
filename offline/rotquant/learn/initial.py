"""The transforms of a recipe before anything is learned: rotations that need neither weights nor text."""

from __future__ import annotations

import math
import zlib

import torch

from rotquant.common.numbers import is_power_of_two
from rotquant.errors import RotQuantError
from rotquant.models import Architecture
from rotquant.recipe import SITES, Recipe
from rotquant.transforms.dense import Dense
from rotquant.transforms.hadamard import RandomHadamard, power_of_two_factor
from rotquant.transforms.space import LayerTransforms, Rotation, Transforms
from rotquant.transforms.walsh import walsh_rows
from rotquant_kernels import Stage


def generator(seed: int, name: str) -> torch.Generator:
    """A random stream of its own for each rotation, so that no order of work or resume changes it."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}.{name}".encode()))  # the generator reads 32 bits only


def initial_transforms(recipe: Recipe, arch: Architecture, tp_max: int, seed: int) -> Transforms:
    """R1 to R4 as the recipe starts them; "klt" starts as "hadamard" and waits for `learn`.

    R3 is over the whole head; R4 in the largest power-of-two block that divides intermediate_size / tp_max, of experts
    and layers without them alike; other Hadamards as `block_at` says.

    Raises:
        RotQuantError: head size that is not a power of two, or tp_max that does not divide.
    """
    check_sizes(recipe, arch, tp_max)
    r4_block = power_of_two_factor(math.gcd(*(width // tp_max for kind in arch.kinds for width in kind.widths)))
    hadamards = {site: block_at(arch, site, tp_max) for site in SITES if recipe.online.of(site)[:1] == ["hadamard"]}
    rotations, layers = recipe.rotations, []
    for index, kind in enumerate(arch.kinds):
        layer, attention = LayerTransforms(), kind.attends
        layer.inputs = {site: [Stage("hadamard", block)] for site, block in hadamards.items()}
        if rotations.r2 != "none" and attention:
            hadamard = RandomHadamard(attention.head_dim, generator(seed, f"r2.{index}"))
            r2 = hadamard.rows(torch.eye(attention.head_dim, dtype=torch.float64))
            layer.r2 = r2.expand(attention.kv_heads, -1, -1)
        if rotations.r4 != "none":
            layer.inputs["down"] = [Stage("hadamard", r4_block)]
        layers.append(layer)
    r3 = arch.head_dim if rotations.r3 != "none" and recipe.kv.bits < 16 else 0
    return Transforms(r1_of(recipe, arch.hidden_size, generator(seed, "r1")), r3, layers, tp_max)


def block_at(arch: Architecture, site: str, tp_max: int) -> int:
    """The largest power of two that divides what a tensor-parallel rank holds of a site's input, in every layer."""
    inputs = [kind.shapes[kind.sites[site][0]][1] for kind in arch.kinds]
    return power_of_two_factor(math.gcd(*(width // (tp_max if site == "o" else 1) for width in inputs)))


def check_sizes(recipe: Recipe, arch: Architecture, tp_max: int) -> None:
    if recipe.rotations.r3 != "none" and recipe.kv.bits < 16 and not is_power_of_two(arch.head_dim):
        raise RotQuantError(
            f"config.json: head_dim is {arch.head_dim}, and R3 runs online as a Hadamard of a power of two:"
            " use --set rotations.r3=none"
        )
    for rotation in ("r1", "r2"):
        if getattr(recipe.rotations, rotation) == "none" and rotation in learned_rotations(recipe):
            raise RotQuantError(f"recipe {recipe.name}: rotations.{rotation} is none, and the recipe learns it")
    if recipe.weights.subtracts and recipe.weights.rank % tp_max:
        raise RotQuantError(
            f"--tp-max {tp_max} does not divide weights.rank {recipe.weights.rank}: no direction that is taken off the"
            " inputs may cross ranks, and each has as many; take a multiple"
        )
    for kind in arch.kinds:
        for width in kind.widths:
            if width % tp_max:
                raise RotQuantError(f"--tp-max {tp_max} does not divide {kind.width_field(width)} {width}")
        if "hadamard" in recipe.online.o and kind.attention.channels % tp_max:
            raise RotQuantError(
                f"--tp-max {tp_max} does not divide the {kind.attention.channels} inputs of {kind.attention.output}"
            )
    if recipe.rotations.r1 == "walsh" and arch.hidden_size % recipe.rotations.walsh_block:
        raise RotQuantError(
            f"config.json: hidden_size is {arch.hidden_size}, which rotations.walsh_block"
            f" {recipe.rotations.walsh_block} does not divide: --set rotations.walsh_block=N with one that does"
        )


def learned_rotations(recipe: Recipe) -> set[str]:
    """Names of the rotations that some stage of learning moves."""
    learn = recipe.learn
    found: set[str] = set(learn.surrogate.targets) if learn.surrogate else set()
    for stage in (learn.blockwise, learn.end_to_end):
        found |= set(stage.learns) if stage else set()
    return found


def r1_of(recipe: Recipe, size: int, random: torch.Generator) -> Rotation | None:
    kind = recipe.rotations.r1
    if kind in ("hadamard", "klt"):
        return RandomHadamard(size, random)
    if kind == "walsh":
        return Dense(walsh_rows(torch.eye(size, dtype=torch.float64), recipe.rotations.walsh_block))
    return None
