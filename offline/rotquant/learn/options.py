"""How the values of transforms are found: a recipe's sections `learn` and `tune`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rotquant.common.part import Part

# What can learn what. procrustes alternates between a target for each row (`learn.targets`) and the rotation that comes
# nearest to all of them; the others take steps of a gradient (`learn.objectives`) on the orthogonal matrices.
PROCRUSTES: tuple[str, ...] = ("quantization_error", "clip", "corner")
GRADIENT: tuple[str, ...] = ("quantization_error", "whip", "kurtosis")
SERVES: dict[str, tuple[str, ...]] = {"procrustes": PROCRUSTES} | dict.fromkeys(("qr", "adam"), GRADIENT)


class Surrogate(Part):
    """R1 and R2 from samples of what they rotate, by an objective of the rotated rows alone."""

    targets: Annotated[list[Literal["r1", "r2"]], Field(min_length=1)] = ["r1"]
    objective: Literal["quantization_error", "clip", "corner", "whip", "kurtosis"] = "quantization_error"
    optimiser: Literal["procrustes", "qr", "adam"] = "procrustes"
    steps: int = Field(default=100, ge=1)
    polish: int = Field(
        default=0, ge=0, description="of procrustes: steps of quantization_error behind the objective's"
    )
    lr: float = Field(default=0.01, gt=0)
    massive_weight: float = Field(default=1.0, gt=0, description="DFRot's gamma: weight of massive tokens, squared")
    rows: int = Field(default=16384, ge=64, description="tokens kept for R1, spread over all sites")
    windows: int | None = Field(default=None, ge=1, description="calibration windows that R1's rows come from, or all")

    @model_validator(mode="after")
    def _pair(self) -> Surrogate:
        """An optimiser that serves the objective, and the polish."""
        if self.objective not in SERVES[self.optimiser]:
            fitting = " or ".join(name for name, objectives in SERVES.items() if self.objective in objectives)
            raise ValueError(f"optimiser {self.optimiser} cannot learn objective {self.objective}: take {fitting}")
        if self.polish and self.optimiser != "procrustes":
            raise ValueError(f"polish: optimiser {self.optimiser} has none, only procrustes does")
        return self


class Blockwise(Part):
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
    weight_bits: Literal[4, 8, 16] | None = Field(
        default=None, description="while learning; null: weights.bits; 16 leaves the weights to GPTQ"
    )


class EndToEnd(Part):
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


class Learning(Part):
    surrogate: Surrogate | None = None
    blockwise: Blockwise | None = None
    end_to_end: EndToEnd | None = None

    def without_clips(self) -> Learning:
        """The same for a checkpoint that can hold no clip ratio and no online matrix."""

        def fewer(part: Any) -> Any:
            kept = [name for name in part.learns if name not in ("act_clip", "kv_clip", "online")] if part else []
            return part.model_copy(update={"learns": kept}) if kept else None

        return self.model_copy(update={"blockwise": fewer(self.blockwise), "end_to_end": fewer(self.end_to_end)})


class Tuning(Part):
    """Distillation: Adam on the KL of the original's logits to the quantized model's, over the calibration windows.

    A low-rank branch stays as it is unless `learns` names it: SmolLM2's got worse with it, KL 0.31 to 0.36.
    """

    learns: Annotated[list[Literal["scales", "gains", "clips", "branch"]], Field(min_length=1)] = [
        "scales", "gains", "clips",
    ]  # fmt: skip
    steps: int = Field(default=100, ge=1)
    tokens: int = Field(default=1024, ge=1, description="a step, of several windows or of a part of one")
    window: int = Field(default=512, ge=1, description="tokens, at most: longer windows are cut into such")
    scale_lr: float = Field(default=2e-3, gt=0, description="of the logarithms of weight scales")
    gain_lr: float = Field(default=3e-3, gt=0, description="of norm gains, and of a low-rank branch, relative")
    clip_lr: float = Field(default=1e-2, gt=0, description="of clip ratios, behind a sigmoid")
    routing: float = Field(
        default=4.0, ge=0, description="weight of the KL of routers' probabilities, mean of the layers with experts"
    )

    def length(self, seq_len: int) -> int:
        """Tokens that tuning's windows have, into which those of the calibration are cut: of a step's tokens, more
        contexts tell more than long ones."""
        return min(self.window, self.tokens, seq_len)

    def windows(self, seq_len: int) -> int:
        """Of these a step."""
        return self.tokens // self.length(seq_len)

    def without_clips(self) -> Tuning | None:
        """The same for a checkpoint that can hold no clip ratio; None where nothing else is tuned."""
        kept = [name for name in self.learns if name != "clips"]
        return self.model_copy(update={"learns": kept}) if kept else None
