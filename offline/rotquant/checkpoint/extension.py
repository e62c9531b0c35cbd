"""The key `rotquant` of config.json: what compressed-tensors' schema cannot say.

format_version    1
profile           "full" or "portable"
activation_clip   {"default": 0.9, "<linear module>": 0.85, ...}
kv_clip           {"key": 0.95, "value": 0.95, "layers": {"<attention module>": {"key": 0.9, "value": 0.9}, ...}}
key_feedback      true: keys are rounded with error feedback (`rotquant_kernels.formats.feedback`) in every attention
                  layer, by `<linear that makes keys>.key_feedback`, F float32 [KV heads * d, d]
input_transforms  [{"name": "T0", "kind": "kronecker", "block": 32, "targets": ["re:.*down_proj$"]}, ...]
                  online transforms of linear inputs, run in list order after those of `transform_config`; kinds
                  and tensors as in `rotquant_kernels.stages`
low_rank          [{"rank": 16, "targets": ["re:.*down_proj$"]}, ...]
                  a full-precision branch, `<module>.low_rank_down` [K, r] and `<module>.low_rank_up` [r, N]; with
                  "subtracts": true it takes x D Dᵀ off the inputs before they are rounded, and linears that share
                  inputs share D
basis             {"file": "rotquant_basis.safetensors", "sha256": "..."}: what turns between the original's bases and
                  the checkpoint's, see `basis`; not needed to run
provenance        recipe, seed, calibration, versions, what was chosen; not needed to run
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rotquant.common.faults import first_error
from rotquant.common.numbers import Ratio
from rotquant.errors import RotQuantError
from rotquant_kernels.stages import KINDS

FORMAT_VERSION = 1

Targets = Annotated[list[str], Field(min_length=1)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class KVRatios(Part):
    """Clip ratios of one attention layer."""

    key: Ratio = 1.0
    value: Ratio = 1.0


class KVClip(KVRatios):
    """Clip ratios of the KV cache; what `layers` says of a layer wins."""

    layers: dict[str, KVRatios] = {}

    def of(self, name: str) -> KVRatios:
        """Ratios of the attention module with this full name."""
        own = self.layers[name].model_dump(exclude_unset=True) if name in self.layers else {}
        return KVRatios(**({"key": self.key, "value": self.value} | own))


class InputTransform(Part):
    """One online transform and the linear layers that it belongs to."""

    name: str
    kind: str
    block: Annotated[int, Field(ge=0)] = 0
    targets: Targets

    @field_validator("name")
    @classmethod
    def _names_a_module(cls, name: str) -> str:
        if not name.isidentifier():
            raise ValueError("a letter, then letters, digits and _")
        return name

    @field_validator("kind")
    @classmethod
    def _runs(cls, kind: str) -> str:
        if kind not in KINDS:
            raise ValueError(f"this build of rotquant runs only {', '.join(KINDS)}")
        return kind

    @model_validator(mode="after")
    def _has_a_block(self) -> InputTransform:
        if fault := KINDS[self.kind].block_fault(self.block):
            raise ValueError(f"{self.name}: {fault}")
        return self


class LowRank(Part):
    """Rank of the branch beside the linear layers that `targets` names, and whether it is one of their inputs."""

    rank: Annotated[int, Field(gt=0)]
    subtracts: bool = False
    targets: Targets


class BasisFile(Part):
    """The basis sidecar: a file beside config.json, and the sha256 of its bytes."""

    file: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

    @field_validator("file")
    @classmethod
    def _lies_beside(cls, file: str) -> str:
        if PurePath(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError("the name of a .safetensors file in the folder of config.json")
        return file


class Extension(Part):
    """See the module's table."""

    format_version: int = FORMAT_VERSION
    profile: Literal["full", "portable"] = "full"
    activation_clip: dict[str, Ratio] = {}
    kv_clip: KVClip = KVClip()
    key_feedback: bool = False
    input_transforms: list[InputTransform] = []
    low_rank: list[LowRank] = []
    basis: BasisFile | None = None
    provenance: dict[str, Any] = {}


def read_extension(extension: Any) -> Extension:
    """Parses the dict `rotquant`, {} where there is none (a checkpoint of another tool).

    Raises:
        RotQuantError: naming the field that this build does not know or run.
    """
    if not isinstance(extension, dict):
        raise RotQuantError(f"config.json: rotquant is {extension!r}, expected a dict")
    version = extension.get("format_version", FORMAT_VERSION)
    if type(version) is not int or version < 1:
        raise RotQuantError(f"config.json: rotquant.format_version is {version!r}, expected 1 to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise RotQuantError(
            f"config.json: rotquant.format_version is {version}, this build reads up to {FORMAT_VERSION}:"
            " update rotquant"
        )
    try:
        return Extension.model_validate(extension)
    except ValidationError as error:
        raise RotQuantError(f"config.json: {first_error(error, 'rotquant')}") from error
