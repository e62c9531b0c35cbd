"""Recipes: a quantization method as data. One YAML file each, in `recipes/`, or a file of your own.

rotations    r1 residual stream, r2 values, r3 queries and keys (online), r4 down_proj input (online)
weights      bits, group size, RTN or GPTQ, clip search
activations  bits, symmetric or asymmetric, clip ratio; per token, dynamic
kv           bits (4, or 16 for vLLM's own cache), symmetric or asymmetric, clip ratios; per token and head
lm_head      16 (as it is) or 8 bits
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rotquant.errors import RotQuantError

Ratio = Annotated[float, Field(gt=0, le=1)]
Rotation = Literal["none", "hadamard"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rotations(_Part):
    """Which rotations are used. R1 and R2 are folded into the weights, R3 and R4 run online."""

    r1: Rotation = "none"
    r2: Rotation = "none"
    r3: Rotation = "none"
    r4: Rotation = "none"


class Weights(_Part):
    bits: Literal[4, 8] = 4
    group_size: int = Field(default=0, ge=0, description="inputs that share a scale; 0: one scale per output channel")
    method: Literal["rtn", "gptq"] = "rtn"
    clip_search: bool = Field(default=True, description="shrink each row's range where that lowers its rounding error")
    damping: float = Field(default=0.01, gt=0, description="GPTQ: share of the mean Hessian diagonal added to it")
    refit: bool = Field(default=True, description="GPTQ: first fit the weights to the inputs as they are quantized")
    act_order: bool = Field(default=True, description="GPTQ: quantize the columns of largest Hessian diagonal first")


class Activations(_Part):
    bits: Literal[4, 8] = 4
    symmetric: bool = True
    clip: Ratio = 1.0


class KVCache(_Part):
    bits: Literal[4, 16] = 4
    symmetric: bool = False
    key_clip: Ratio = 0.95
    value_clip: Ratio = 0.95


class LMHead(_Part):
    bits: Literal[8, 16] = 16


class Calibration(_Part):
    samples: int = Field(default=128, ge=1)
    seq_len: int = Field(default=2048, ge=2)


class Recipe(_Part):
    name: str
    description: str
    paper: str = ""
    deviations: str = Field(default="", description="where this recipe differs from its paper")
    rotations: Rotations = Rotations()
    weights: Weights = Weights()
    activations: Activations = Activations()
    kv: KVCache = KVCache()
    lm_head: LMHead = LMHead()
    calibration: Calibration = Calibration()

    @property
    def needs_calibration(self) -> bool:
        return self.weights.method == "gptq"

    @property
    def folds(self) -> bool:
        """True where the norm gains have to be folded into the linears that follow them."""
        return self.rotations.r1 != "none"


def shipped() -> list[tuple[str, str]]:
    """Name and description of every recipe in the package."""
    found = sorted(p.name for p in files("rotquant").joinpath("recipes").iterdir() if p.name.endswith(".yaml"))
    return [(name[:-5], load_recipe(name[:-5]).description) for name in found]


def load_recipe(recipe: str, settings: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies `key=value` settings to it.

    Args:
        recipe: name of a shipped recipe, or a path ending in .yaml.
        settings: e.g. ["weights.method=rtn", "kv.bits=16"]; values are read as YAML.
    Raises:
        RotQuantError: unknown recipe, unknown key, or a value that the key does not take.
    """
    if recipe.endswith((".yaml", ".yml")):
        source, where = Path(recipe), recipe
    else:
        source, where = (
            Path(str(files("rotquant").joinpath("recipes", f"{Path(recipe).name}.yaml"))),
            f"recipe {recipe}",
        )
    if not source.is_file():
        folder = files("rotquant").joinpath("recipes")
        names = ", ".join(sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml")))
        raise RotQuantError(f"unknown recipe {recipe!r}: take one of {names}, or give the path of a .yaml file")
    try:
        data = yaml.safe_load(source.read_text())
    except yaml.YAMLError as error:
        raise RotQuantError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise RotQuantError(f"{where}: a recipe is a YAML mapping")
    for setting in settings:
        _set(data, setting)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RotQuantError(f"{where}: {key}: {first['msg']}") from error


def _set(data: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    if not equals:
        raise RotQuantError(f"--set {setting}: write it as key=value, e.g. weights.method=rtn")
    *parents, last = key.strip().split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise RotQuantError(f"--set {setting}: {parent} has no keys below it")
    data[last] = yaml.safe_load(value)
