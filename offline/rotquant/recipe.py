"""Recipes: a quantization method as data. One YAML file each, in `recipes/`, or a file of your own.

rotations    what R1 to R4 start from: residual stream, values, queries and keys (online), down_proj's input (online)
scales       channel factors that are folded: behind the norms, between values and o_proj, between up and down_proj
online       more transforms that run before the linears of a site, beside R4
learn        how the values of all these are found: surrogate (R1, R2, without backpropagation through the model),
             blockwise (scales, clips, online matrices, layer by layer), end_to_end (all, through the whole model)
weights      bits, group size, RTN or GPTQ, clip search, low-rank branch
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
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rotquant.common.json_files import short
from rotquant.errors import RotQuantError
from rotquant.learn.register import SERVES, optimisers

Ratio = Annotated[float, Field(gt=0, le=1)]
Site = Literal["attn", "o", "mlp", "down"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rotations(_Part):
    """Where the rotations start; `learn` moves R1 and R2. R1 and R2 are folded into the weights, R3 and R4 run online.

    random: a uniformly drawn orthogonal matrix. klt: eigenvectors (of the weights that read the residual stream for R1,
    of o_proj for R2, as OSTQuant) times a Hadamard. walsh: Walsh matrices in order of sequency on the diagonal.
    """

    r1: Literal["none", "hadamard", "walsh", "random", "klt"] = "none"
    r2: Literal["none", "hadamard", "random", "klt"] = "none"
    r3: Literal["none", "hadamard"] = "none"
    r4: Literal["none", "hadamard"] = "none"
    walsh_block: int = Field(default=128, ge=2, description="size of the blocks of r1: walsh")
    mean_to_ones: bool = Field(
        default=False,
        description="append to R1 the reflection of the tokens' mean onto the all-ones direction: the mean becomes a"
        " constant of each token, which an asymmetric quantizer's zero point takes",
    )


class Scales(_Part):
    """Channel factors, each none or smooth: max|X|^alpha / max|W|^(1 - alpha). Learning starts from them, or from 1."""

    norms: Literal["none", "smooth"] = "none"
    values: Literal["none", "smooth"] = "none"
    up: Literal["none", "smooth"] = "none"
    alpha: float | Literal["search"] = Field(
        default=0.5, description="0: weights decide, 1: activations; search: least error of each site on a grid"
    )
    weights: Literal["all", "one"] = Field(
        default="all", description="behind a norm: of all linears there, or of q_proj and up_proj alone"
    )
    order: bool = Field(default=False, description="zigzag the intermediate channels over R4's blocks by magnitude")


class OnlineStages(_Part):
    """Online transforms at each site, in order, after R4. greedy: RUQuant's or DuQuant's product of rotations."""

    attn: list[Literal["kronecker", "dense", "greedy", "shift"]] = []
    o: list[Literal["heads", "kronecker", "dense", "greedy", "shift"]] = []
    mlp: list[Literal["kronecker", "dense", "greedy", "shift"]] = []
    down: list[Literal["kronecker", "dense", "greedy", "shift"]] = []
    block: int = Field(default=128, ge=2, description="largest block of dense and greedy, which are powers of two")
    greedy: Literal["ruquant", "duquant"] = "ruquant"

    def of(self, site: str) -> list[str]:
        return list(getattr(self, site))

    @model_validator(mode="after")
    def _sizes(self) -> OnlineStages:
        """Blocks that divide a power of two, and one shift a site: what it adds to the outputs is stored once."""
        if self.block & (self.block - 1):
            raise ValueError(f"block {self.block} is not a power of two")
        for site in ("attn", "o", "mlp", "down"):
            if self.of(site).count("shift") > 1:
                raise ValueError(f"{site} has more than one shift; one does what two would")
        return self


class Surrogate(_Part):
    """R1 and R2 from samples of what they rotate, by an objective of the rotated rows alone."""

    targets: Annotated[list[Literal["r1", "r2"]], Field(min_length=1)] = ["r1"]
    objective: Literal["quantization_error", "clip", "corner", "uniform", "whip", "kurtosis", "variance", "gsr"] = (
        "quantization_error"
    )
    optimiser: Literal["procrustes", "qr", "cayley", "adam"] = "procrustes"
    steps: int = Field(default=100, ge=1)
    polish: int = Field(default=0, ge=0, description="quantization_error steps of Procrustes after the objective's own")
    lr: float = Field(default=0.01, gt=0)
    massive_weight: float = Field(default=1.0, gt=0, description="DFRot's gamma: weight of massive tokens, squared")
    rows: int = Field(default=16384, ge=64, description="tokens kept for R1, spread over all sites")

    @model_validator(mode="after")
    def _pair(self) -> Surrogate:
        """An optimiser that serves the objective."""
        if self.objective not in SERVES[self.optimiser]:
            fitting = " or ".join(optimisers(self.objective))
            raise ValueError(f"optimiser {self.optimiser} cannot learn objective {self.objective}: take {fitting}")
        return self


class Blockwise(_Part):
    """AdamW on one decoder layer at a time: its output, fake-quantized, is to equal the full-precision one."""

    learns: list[Literal["s_norms", "s_ov", "s_ud", "s_qk", "act_clip", "kv_clip", "weight_clip", "r2", "online"]] = [
        "s_norms", "s_ov", "s_ud", "s_qk", "act_clip", "kv_clip",
    ]  # fmt: skip
    epochs: int = Field(default=5, ge=1)
    batch: int = Field(default=4, ge=1)
    lr: float = Field(default=5e-3, gt=0)
    clip_lr: float = Field(default=5e-2, gt=0)
    rotation_lr: float = Field(default=1e-2, gt=0, description="of r2, radians a step")
    samples: int = Field(default=128, ge=1)
    inputs: Literal["full", "quantized"] = Field(
        default="full", description="what a layer sees while it learns: exact inputs, or what the layers before make"
    )
    weight_bits: Literal[4, 8, 16] | None = Field(
        default=None, description="while learning; null: weights.bits; 16 leaves the weights to GPTQ"
    )


class EndToEnd(_Part):
    """Gradients of a loss of the logits through the whole fake-quantized model."""

    objective: Literal["cross_entropy", "kl_top"] = "kl_top"
    learns: list[Literal["r1", "r2", "s_norms", "s_ov", "s_ud", "s_qk", "act_clip", "kv_clip", "online"]] = ["r1", "r2"]
    optimiser: Literal["cayley", "adam"] = Field(default="adam", description="of the rotations")
    steps: int = Field(default=100, ge=1)
    batch: int = Field(default=8, ge=1)
    lr: float = Field(default=1e-2, gt=0, description="of the rotations")
    scale_lr: float = Field(default=2e-3, gt=0)
    top: int = Field(default=1000, ge=1, description="kl_top: how many of the teacher's tokens")
    weight_bits: Literal[4, 8, 16] | None = Field(default=16, description="as of blockwise")


class Learning(_Part):
    surrogate: Surrogate | None = None
    blockwise: Blockwise | None = None
    end_to_end: EndToEnd | None = None

    def without_clips(self) -> Learning:
        """The same for a checkpoint that can hold no clip ratio and no online matrix."""

        def fewer(part: Any) -> Any:
            kept = [name for name in part.learns if name not in ("act_clip", "kv_clip", "online")] if part else []
            return part.model_copy(update={"learns": kept}) if kept else None

        return self.model_copy(update={"blockwise": fewer(self.blockwise), "end_to_end": fewer(self.end_to_end)})


class Weights(_Part):
    bits: Literal[4, 8] = 4
    group_size: int = Field(default=0, ge=0, description="inputs that share a scale; 0: one scale per output channel")
    method: Literal["rtn", "gptq"] = "rtn"
    clip_search: bool = Field(default=True, description="shrink each row's range where that lowers its rounding error")
    damping: float = Field(default=0.01, gt=0, description="GPTQ: share of the mean Hessian diagonal added to it")
    refit: bool = Field(default=True, description="GPTQ: first fit the weights to the inputs as they are quantized")
    attention_weight: float = Field(
        default=0.0, ge=0, le=1, description="GPTQ: share of a token's weight that is the attention it receives"
    )
    act_order: bool = Field(default=True, description="GPTQ: quantize the columns of largest Hessian diagonal first")
    rank: int = Field(default=0, ge=0, description="of a low-rank branch in full precision beside the integers")
    branch: Literal["svd", "tsvd"] = Field(
        default="svd", description="svd: alternate with quantization; tsvd: also lower the residual's row maxima (FRTQ)"
    )

    @property
    def needs_inputs(self) -> bool:
        return self.method == "gptq" or self.rank > 0


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
    scales: Scales = Scales()
    online: OnlineStages = OnlineStages()
    learn: Learning = Learning()
    weights: Weights = Weights()
    activations: Activations = Activations()
    kv: KVCache = KVCache()
    lm_head: LMHead = LMHead()
    calibration: Calibration = Calibration()

    @property
    def needs_calibration(self) -> bool:
        return self.weights.needs_inputs or self.needs_learning

    @property
    def needs_learning(self) -> bool:
        """True where some transform depends on the model's weights or on calibration text."""
        return self.learns_r1 or self.learns_layers or self.learn.end_to_end is not None

    @property
    def learns_r1(self) -> bool:
        rotations = self.rotations
        return rotations.r1 == "klt" or rotations.mean_to_ones or self._by_surrogate("r1")

    @property
    def learns_layers(self) -> bool:
        """True where a layer's own transforms depend on its weights or inputs."""
        scales = self.scales
        return (
            self.learn.blockwise is not None
            or self.rotations.r2 == "klt"
            or self._by_surrogate("r2")
            or "smooth" in (scales.norms, scales.values, scales.up)
            or scales.order
            or any(self.online.of(site) for site in ("attn", "o", "mlp", "down"))
        )

    def check_learning(self) -> Recipe:
        """The recipe itself, unless a stage of learning has nothing to learn.

        Raises:
            RotQuantError: naming the stage.
        """
        absent = {"kv_clip"} if self.kv.bits == 16 else set()
        if not any(set(self.online.of(site)) for site in ("attn", "o", "mlp", "down")):
            absent.add("online")
        for stage, part in (("blockwise", self.learn.blockwise), ("end_to_end", self.learn.end_to_end)):
            gone = absent | ({"weight_clip"} if part and part.weight_bits == 16 else set())
            if part and not set(part.learns) - gone:
                raise RotQuantError(
                    f"recipe {self.name}: learn.{stage}.learns is {list(part.learns)}, and this recipe has none of"
                    f" these; take others, or set learn.{stage}=null"
                )
        return self

    def _by_surrogate(self, rotation: str) -> bool:
        return self.learn.surrogate is not None and rotation in self.learn.surrogate.targets


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
        data = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise RotQuantError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise RotQuantError(f"{where}: a recipe is a YAML mapping")
    for setting in settings:
        _set(data, setting)
    try:
        return Recipe.model_validate(data).check_learning()
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise RotQuantError(f"{where}: {key}: {short(message)}") from error


def _set(data: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    if not equals:
        raise RotQuantError(f"--set {setting}: write it as key=value, e.g. weights.method=rtn")
    *parents, last = key.strip().split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise RotQuantError(f"--set {setting}: {parent} has no keys below it")
    try:
        data[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RotQuantError(f"--set {setting}: the value is not valid YAML: {short(error, 100)}") from error
