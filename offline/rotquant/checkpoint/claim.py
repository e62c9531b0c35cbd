"""Which checkpoints are rotquant's to run. Imports nothing: a broken installation must still refuse them."""

from __future__ import annotations

from typing import Any


def claims(quantization_config: Any, extension: Any = None) -> bool:
    """True for compressed-tensors' packed integer weights together with integer activations of 4 or 8 bits.

    Stock engines run such a checkpoint with 16-bit activations, or not at all. One with the key `rotquant` is ours
    whatever else it says, so that a broken one is refused rather than left to an engine that reads past the break.
    """
    config = quantization_config if isinstance(quantization_config, dict) else {}
    groups = config.get("config_groups")
    if extension and config:
        return True
    if config.get("quant_method") != "compressed-tensors" or not isinstance(groups, dict) or not groups:
        return False
    return all(isinstance(group, dict) and _packed_integers(group, config.get("format")) for group in groups.values())


def _packed_integers(group: dict[str, Any], top_format: str | None) -> bool:
    arguments = [group.get("weights") or {}, group.get("input_activations") or {}]
    if not all(isinstance(a, dict) for a in arguments):
        return False
    integers = all(a.get("type", "int") == "int" and a.get("num_bits") in (4, 8) for a in arguments)
    return integers and (group.get("format") or top_format) == "pack-quantized"
