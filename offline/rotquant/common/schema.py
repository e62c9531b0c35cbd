"""compressed-tensors' half of config.json, read to the letter: a key or value that its own models would pass over, or
quietly turn into another one, is refused by name."""

from __future__ import annotations

import json
from typing import Any

from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.transform import TransformConfig
from pydantic import BaseModel, ValidationError

from rotquant.common.faults import first_error
from rotquant.errors import RotQuantError

WHERE = "quantization_config"
# Keys beside those of compressed-tensors' own model (which ignores what it does not know): its version, a sparsity
# that must be none, and the transforms, which are a model of their own.
BESIDE = {"version", "sparsity_config", "transform_config"}
STORED = ("compressed", "frozen")  # statuses that say: the tensors are as `format` says
FORMATS = ("pack-quantized", "mixed-precision")  # of the whole; the latter where groups may have formats of their own


def read_schema(config: Any) -> tuple[QuantizationConfig, TransformConfig]:
    """Parses the dict `quantization_config`.

    Raises:
        RotQuantError: naming a field that is unknown, of another type, or says something else than a packed checkpoint.
    """
    if not isinstance(config, dict):
        raise RotQuantError(f"config.json: {WHERE} is {config!r}, expected a dict")
    for key in sorted(config.keys() - QuantizationConfig.model_fields.keys() - BESIDE):
        raise RotQuantError(
            f"config.json: {WHERE}.{key}: this build of rotquant does not know this key; a newer one may"
        )
    for key, wanted in (
        ("quant_method", ("compressed-tensors",)),
        ("format", FORMATS),
        ("quantization_status", STORED),
    ):
        if config.get(key, wanted[0]) not in wanted:
            raise RotQuantError(f"config.json: {WHERE}.{key} is {config[key]!r}, expected {' or '.join(wanted)}")
    if config.get("sparsity_config"):
        raise RotQuantError(f"config.json: {WHERE}.sparsity_config: this build of rotquant does not run sparse weights")
    transforms = config.get("transform_config") or {"config_groups": {}}
    own = {key: value for key, value in config.items() if key in QuantizationConfig.model_fields}
    return _strict(QuantizationConfig, own, WHERE), _strict(TransformConfig, transforms, f"{WHERE}.transform_config")


def _strict(model: type[BaseModel], data: Any, where: str) -> Any:
    """`data` as a model of compressed-tensors, without conversions such as "4", 4.0 or true to a number."""
    try:
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise RotQuantError(f"config.json: {first_error(error, where)}") from error
    except Exception as error:  # their validators compare before they look at the type
        raise RotQuantError(f"config.json: {where}: not what compressed-tensors writes ({error})") from error
