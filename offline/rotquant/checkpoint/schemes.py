"""compressed-tensors' schemes of config.json and the number formats they name, in both directions.

A family of formats is one pair of functions here: what a scheme must be to be run exactly, and what is written.
"""

from __future__ import annotations

from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from rotquant.errors import RotQuantError
from rotquant_kernels.formats import KVFormat, RowFormat, WeightFormat


def linear_scheme(targets: list[str], weights: WeightFormat, rows: RowFormat) -> dict[str, Any]:
    """A group of `config_groups`; a clip ratio is not part of it."""
    stored: dict[str, Any] = {"num_bits": weights.bits, "type": "int", "symmetric": True, "dynamic": False}
    by_group = {"strategy": "group", "group_size": weights.group_size}
    stored |= by_group if weights.group_size else {"strategy": "channel"}
    inputs = {
        "num_bits": rows.bits, "type": "int", "symmetric": rows.symmetric, "strategy": "token", "dynamic": True,
    }  # fmt: skip
    return {"targets": targets, "format": "pack-quantized", "weights": stored, "input_activations": inputs}


def read_linear(scheme: QuantizationScheme) -> tuple[WeightFormat, RowFormat]:
    """The formats of a scheme that `check_linear` had nothing against; the clip ratio is 1."""
    weights, inputs = scheme.weights, scheme.input_activations
    assert weights is not None
    assert inputs is not None
    group = (weights.group_size or 0) if text(weights.strategy) == "group" else 0
    return WeightFormat(weights.num_bits, group), RowFormat(inputs.num_bits, bool(inputs.symmetric))


def check_linear(where: str, scheme: QuantizationScheme, top_format: str | None) -> None:
    """Refuses a quantization scheme that the int_linear op does not run exactly.

    Raises:
        RotQuantError: naming the field.
    """
    weights, activations = scheme.weights, scheme.input_activations
    if weights is None or activations is None:
        refuse(where, "a scheme without weights or without input_activations")
    assert weights is not None
    assert activations is not None
    expect(where, "format", text(scheme.format or top_format), "pack-quantized")
    expect(where, "output_activations", scheme.output_activations, None)
    expect(f"{where}.weights", "type", text(weights.type), "int")
    expect(f"{where}.weights", "num_bits", weights.num_bits, 4, 8)
    expect(f"{where}.weights", "symmetric", weights.symmetric, True)
    expect(f"{where}.weights", "strategy", text(weights.strategy), "channel", "group")
    expect(f"{where}.weights", "actorder", text(weights.actorder), None, "static", "weight")
    expect(f"{where}.weights", "dynamic", weights.dynamic, False)
    expect(f"{where}.input_activations", "type", text(activations.type), "int")
    expect(f"{where}.input_activations", "num_bits", activations.num_bits, 4, 8)
    expect(f"{where}.input_activations", "strategy", text(activations.strategy), "token")
    expect(f"{where}.input_activations", "dynamic", activations.dynamic, True)


def kv_scheme(kv: KVFormat, head_dim: int) -> dict[str, Any]:
    """`kv_cache_scheme`; clip ratios and R3 are not part of it."""
    return {
        "num_bits": 4, "type": "int", "symmetric": kv.symmetric,
        "strategy": "group", "group_size": head_dim, "dynamic": True,
    }  # fmt: skip


def check_kv(where: str, scheme: QuantizationArgs, head_dim: int) -> None:
    """Refuses a KV cache that the kv4 ops do not run exactly.

    Raises:
        RotQuantError: naming the field.
    """
    expect(where, "num_bits", scheme.num_bits, 4)
    expect(where, "type", text(scheme.type), "int")
    expect(where, "strategy", text(scheme.strategy), "group")
    expect(where, "group_size", scheme.group_size, head_dim)
    expect(where, "dynamic", scheme.dynamic, True)
    if head_dim % 2:
        refuse(where, f"an odd head size ({head_dim})")


def expect(where: str, key: str, value: Any, *allowed: Any) -> None:
    """Refuses a value that is not among those this build runs."""
    if value not in allowed:
        options = " or ".join(repr(option) for option in allowed)
        raise RotQuantError(f"config.json: {where}.{key} is {value!r}, this build of rotquant runs only {options}")


def refuse(where: str, what: str) -> None:
    raise RotQuantError(f"config.json: {where}: this build of rotquant does not run {what}; a newer one may")


def text(value: Any) -> Any:
    """The plain value of an enum member."""
    return getattr(value, "value", value)
