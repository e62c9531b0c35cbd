"""Recipes: a quantization method as data. One YAML file each, in `recipes/`, which reads them, or a file of your own.

rotations    what R1 to R4 start from: residual stream, values, queries and keys (online), down_proj's input (online)
scales       channel factors that are folded: behind the norms, between values and o_proj, between up and down_proj
online       more transforms that run before the linears of a site, beside R4
learn        how the values of all these are found: surrogate (R1, R2, without backpropagation through the model),
             blockwise (scales, clips, online matrices, layer by layer), end_to_end (all, through the whole model)
weights      bits, group size, RTN or GPTQ, clip search, low-rank branch
tune         after all else: weight scales, norm gains and clips of the whole quantized model, by gradients
activations  bits, symmetric or asymmetric, clip ratio; per token, dynamic; a budget of sites that get 8 bits
kv           bits (4, or 16 for vLLM's own cache), symmetric or asymmetric, clip ratios; per token and head
lm_head      16 (as it is) or 8 bits
base         a shipped recipe, from which this one differs by what it says; resolved as the file is read
choose       candidates of changes, which measuring on the model in hand takes or leaves (`choose.options`)
target       the device that all this was chosen for; says so in the model card, and changes nothing by itself
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from rotquant.choose.options import Choose, changed
from rotquant.common.faults import first_error
from rotquant.common.numbers import Ratio, is_power_of_two
from rotquant.common.part import Part
from rotquant.errors import RotQuantError
from rotquant.learn.options import Learning, Tuning
from rotquant_kernels.formats import KVFormat, RowFormat, WeightFormat

# A share of all sites, a number of them, or a KL in hundredths of a nat.
Budget = Annotated[str, BeforeValidator(str), Field(pattern=r"^(\d{1,3}(\.\d+)?%( KL)?|\d{1,6})$")]
KL = "% KL"


class Rotations(Part):
    """Where the rotations start; `learn` moves R1 and R2. R1 and R2 are folded into the weights, R3 and R4 run online.

    klt: eigenvectors (of the weights that read the residual stream for R1, of o_proj for R2, as OSTQuant) times a
    Hadamard. walsh: Walsh matrices in order of sequency on the diagonal.
    """

    r1: Literal["none", "hadamard", "walsh", "klt"] = "none"
    r2: Literal["none", "hadamard", "klt"] = "none"
    r3: Literal["none", "hadamard"] = "none"
    r4: Literal["none", "hadamard"] = "none"
    walsh_block: int = Field(default=128, ge=2, description="size of the blocks of r1: walsh")


class Scales(Part):
    """Channel factors, each none or smooth: max|X|^alpha / max|W|^(1 - alpha). Learning starts from them, or from 1."""

    norms: Literal["none", "smooth"] = "none"
    values: Literal["none", "smooth"] = "none"
    keys: Literal["none", "smooth"] = Field(
        default="none", description="smooth: keys against queries, for the least error of a score with a rotated cache"
    )
    up: Literal["none", "smooth"] = "none"
    alpha: float | Literal["search"] = Field(
        default=0.5, description="0: weights decide, 1: activations; search: least error of each site on a grid"
    )
    weights: Literal["all", "one"] = Field(
        default="all", description="behind a norm: of all linears there, or of q_proj and up_proj alone"
    )
    order: bool = Field(default=False, description="zigzag the intermediate channels over R4's blocks by magnitude")


OnlineWord = Literal["hadamard", "kronecker", "greedy", "shift"]
SITES = ("attn", "o", "mlp", "down")


class OnlineStages(Part):
    """Online transforms at each site, in order, after R4; `learn.starts` says what each word stands for.

    `shift_norms` and `shift_o` put a shift behind them: a site that has none else runs it inside the op of its
    linears. In a mixture of experts "all" is "attn": what its router reads its experts have to read.
    """

    attn: list[OnlineWord] = []
    o: list[OnlineWord | Literal["heads"]] = []
    mlp: list[OnlineWord] = []
    down: list[OnlineWord] = []
    shift_norms: Literal["none", "attn", "all"] = Field(
        default="none", description="which linears behind norms read what is less its mean: attention's, or all"
    )
    shift_o: bool = Field(default=False, description="the same of the output linears of attention")
    block: int = Field(default=128, ge=2, description="largest block of greedy, a power of two")
    greedy: Literal["ruquant", "duquant"] = "ruquant"

    def of(self, site: str) -> list[str]:
        """The words of a site, in their order."""
        words = list(getattr(self, site))
        shifted = {"attn": self.shift_norms != "none", "mlp": self.shift_norms == "all", "o": self.shift_o}
        return words + (["shift"] if shifted.get(site) and "shift" not in words else [])

    def learned(self, site: str) -> list[str]:
        """Those that depend on the model."""
        return [word for word in self.of(site) if word != "hadamard"]

    @model_validator(mode="after")
    def _sizes(self) -> OnlineStages:
        """Blocks that divide a power of two, and one shift a site: what it adds to the outputs is stored once."""
        if not is_power_of_two(self.block):
            raise ValueError(f"block {self.block} is not a power of two")
        for site in SITES:
            if self.of(site).count("shift") > 1:
                raise ValueError(f"{site} has more than one shift; one does what two would")
            if "hadamard" in self.of(site)[1:]:
                raise ValueError(f"{site}: hadamard comes first, and once")
        if "hadamard" in self.down:
            raise ValueError("down: the Hadamard there is rotations.r4")
        return self


class Weights(Part):
    bits: Literal[4, 8] = 4
    wide_bits: Literal[4, 8] | None = Field(
        default=None, description="at the sites that activations.budget gives 8 bits; null: those of all others"
    )
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
    branch: Literal["svd", "tsvd", "pca"] = Field(
        default="svd",
        description="svd: of the weights, alternating with quantization; tsvd: also lower the residual's row maxima"
        " (FRTQ); pca: along the leading directions of the inputs, taken off these before they are rounded",
    )

    @property
    def needs_inputs(self) -> bool:
        return self.method == "gptq" or self.rank > 0

    @property
    def subtracts(self) -> bool:
        """Whether the low-rank branch takes its directions off the inputs."""
        return self.rank > 0 and self.branch == "pca"

    @property
    def form(self) -> WeightFormat:
        return WeightFormat(self.bits, self.group_size)

    @property
    def wide(self) -> WeightFormat:
        """At sites whose activations have 8 bits by their budget."""
        return WeightFormat(self.wide_bits or self.bits, self.group_size)

    @property
    def most_bits(self) -> int:
        """That any of them may have."""
        return max(self.bits, self.wide_bits or 0)


class Activations(Part):
    bits: Literal[4, 8] = 4
    symmetric: bool = True
    clip: Ratio = 1.0
    budget: Budget = Field(
        default="0",
        description='sites of the model, the worst by measurement, that get 8 bits: at most "25%", or "12"; or as many'
        ' as bring the KL to at most "5% KL", 0.05 nats a token',
    )

    @property
    def rows(self) -> RowFormat:
        return RowFormat(self.bits, self.symmetric, self.clip)

    @property
    def mixed(self) -> bool:
        """True where some sites may get more bits than `bits`."""
        return float(self.budget.removesuffix(" KL").removesuffix("%")) > 0

    @property
    def most_kl(self) -> float | None:
        """The KL to full precision, nats a token, that the budget allows; None where it counts sites."""
        return float(self.budget.removesuffix(KL)) / 100 if self.budget.endswith(KL) else None

    def wide(self, sites: int) -> int:
        """How many of a model's `sites` a budget that counts them lets have 8 bits."""
        number = float(self.budget.removesuffix("%"))
        return min(sites, int(sites * number / 100 if self.budget.endswith("%") else number))

    @model_validator(mode="after")
    def _room(self) -> Activations:
        if self.budget.endswith("%") and float(self.budget[:-1]) > 100:
            raise ValueError(f"budget {self.budget} is more than all sites")
        if self.most_kl == 0:
            raise ValueError(f"budget {self.budget}: nothing quantized has a KL of 0; give it more, or take bits 8")
        if self.bits == 8 and self.mixed:
            raise ValueError(f"budget {self.budget}, and all sites have 8 bits as it is; take bits 4")
        return self


class KVCache(Part):
    bits: Literal[4, 16] = 4
    symmetric: bool = False
    key_clip: Ratio = 0.95
    value_clip: Ratio = 0.95
    key_feedback: bool = Field(
        default=False,
        description="what a channel of a key loses in rounding is taken from those behind it, by the queries' moments",
    )

    def form(self, rotate: int = 0, clips: Mapping[str, float] | None = None) -> KVFormat | None:
        """The 4-bit cache of a layer that has its own `clips` of "key" and "value"; None where it is not quantized."""
        if self.bits == 16:
            return None
        ratios = {"key": self.key_clip, "value": self.value_clip} | dict(clips or {})
        return KVFormat(self.symmetric, ratios["key"], ratios["value"], rotate, self.key_feedback)

    @property
    def values(self) -> RowFormat:
        """Rows of V whose scales are not rounded: what R2 is learned from."""
        return RowFormat(4, self.symmetric, self.value_clip)


class LMHead(Part):
    bits: Literal[8, 16] = 16

    @property
    def form(self) -> WeightFormat | None:
        """None where it is not quantized."""
        return WeightFormat(self.bits) if self.bits == 8 else None

    @property
    def rows(self) -> RowFormat:
        """What it reads."""
        return RowFormat(self.bits)


class Calibration(Part):
    samples: int = Field(default=128, ge=1)
    seq_len: int = Field(default=2048, ge=2)


Target = Literal["none", "cpu", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
OPEN = ("rotations", "scales", "online", "learn", "weights", "activations", "kv")  # what candidates may change


class Recipe(Part):
    name: str
    description: str
    paper: str = ""
    deviations: str = Field(default="", description="where this recipe differs from its paper")
    rotations: Rotations = Rotations()
    scales: Scales = Scales()
    online: OnlineStages = OnlineStages()
    learn: Learning = Learning()
    weights: Weights = Weights()
    tune: Tuning | None = None
    activations: Activations = Activations()
    kv: KVCache = KVCache()
    lm_head: LMHead = LMHead()
    calibration: Calibration = Calibration()
    choose: Choose | None = None
    target: Target = "none"

    @model_validator(mode="after")
    def _widened(self) -> Recipe:
        """A key that would do nothing is a mistake."""
        if self.weights.wide_bits and not self.activations.mixed:
            raise ValueError("weights.wide_bits is of the sites that activations.budget chooses, and it is 0: set both")
        return self

    @property
    def needs_inputs(self) -> bool:
        """True where quantizing a layer needs what enters it."""
        return self.weights.needs_inputs or self.kv.key_feedback

    @property
    def needs_calibration(self) -> bool:
        learns = self.needs_learning or self.chooses or self.tune is not None
        return learns or self.needs_inputs or self.activations.mixed

    @property
    def chooses(self) -> bool:
        """True where candidates, or tuning, are tried on the model."""
        return self.choose is not None and bool(self.choose.tried or self.choose.tuning)

    @property
    def possible(self) -> list[Recipe]:
        """The recipe and what each of its candidates alone makes of it."""
        tried = self.choose.tried.values() if self.choose else ()
        return [self, *(self.with_changes(changes) for changes in tried)]

    def with_changes(self, changes: dict[str, Any]) -> Recipe:
        """The recipe with the values of some dotted keys changed.

        Raises:
            RotQuantError: a key or a value that a recipe does not take, or a stage left with nothing to learn.
        """
        try:
            return changed(self, changes).check_learning()
        except ValidationError as error:
            raise RotQuantError(f"recipe {self.name}: {first_error(error, unknown='no such key')}") from error

    def without_choices_of(self, keys: list[str]) -> Recipe:
        """The recipe without the candidates that change what is set by hand; each of its candidates can be.

        Raises:
            RotQuantError: naming a candidate that cannot.
        """
        if self.choose is None:
            return self
        for name, changes in (one for found in self.choose.lists.values() for one in found.items()):
            if any(key.partition(".")[0] not in OPEN for key in changes):
                raise RotQuantError(f"recipe {self.name}: choose: {name}: may change {', '.join(OPEN)}")
            try:
                self.with_changes(changes)
            except RotQuantError as error:
                raise RotQuantError(f"{error} (choose: {name})") from error
        return self.model_copy(update={"choose": self.choose.without(keys)})

    @property
    def needs_learning(self) -> bool:
        """True where some transform depends on the model's weights or on calibration text."""
        return self.learns_r1 or self.learns_layers or self.learn.end_to_end is not None

    @property
    def learns_r1(self) -> bool:
        return self.rotations.r1 == "klt" or self._by_surrogate("r1")

    @property
    def learns_layers(self) -> bool:
        """True where a layer's own transforms depend on its weights or inputs."""
        scales = self.scales
        return (
            self.learn.blockwise is not None
            or self.rotations.r2 == "klt"
            or self._by_surrogate("r2")
            or "smooth" in (scales.norms, scales.values, scales.keys, scales.up)
            or scales.order
            or any(self.online.learned(site) for site in SITES)
        )

    def for_profile(self, profile: str) -> Recipe:
        """The recipe as a profile can express it.

        "portable" keeps what transformers and stock vLLM read exactly: folded rotations, int4 weights and
        symmetric unclipped activations; no online transform, no low-rank branch, no KV scheme, a 16-bit lm_head.
        """
        if profile == "full":
            return self
        return self.model_copy(
            update={
                "rotations": self.rotations.model_copy(update={"r3": "none", "r4": "none"}),
                "online": OnlineStages(),
                "learn": self.learn.without_clips(),
                "weights": self.weights.model_copy(update={"rank": 0}),
                "tune": self.tune and self.tune.without_clips(),
                "activations": self.activations.model_copy(update={"symmetric": True, "clip": 1.0}),
                "kv": KVCache(bits=16),
                "lm_head": LMHead(bits=16),
            }
        )

    def check_learning(self) -> Recipe:
        """The recipe itself, unless a stage of learning has nothing to learn.

        Raises:
            RotQuantError: naming the stage.
        """
        absent = {"kv_clip"} if self.kv.bits == 16 else set()
        if not any(self.online.learned(site) for site in SITES):
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
