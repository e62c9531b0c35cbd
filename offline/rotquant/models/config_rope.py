"""Rotary settings of config.json: those that give the same cosines and sines in transformers and in vLLM.

At every position that is served, near 0 and near the longest, both compute the same for these types:

    default, linear, llama3, yarn

Of the classes whose `Known` names it also proportional: of a head's pairs of channels the first share turns, the others
have frequency 0.

Others do not: dynamic follows the length of the sequence in transformers, and vLLM serves positions beyond its table;
longrope chooses its factors by the length of the sequence in transformers, by the longest context in vLLM; of the rest
one of the two knows nothing.
"""

from __future__ import annotations

import math
from typing import Any

from rotquant.common.json_files import short
from rotquant.errors import RotQuantError
from rotquant.models.config_rules import Known, number
from rotquant.models.windows import FULL, SLIDING

ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
# Keys beside rope_type, type and rope_theta; `?` where a key may be left out.
TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "proportional": ("partial_rotary_factor?",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings?", "attention_factor?", "beta_fast?", "beta_slow?", "mscale?",
        "mscale_all_dim?", "truncate?",
    ),
}  # fmt: skip
COMMON = ("default", "linear", "llama3", "yarn")
LEAST = {"factor": 1.0, "rope_theta": 2.0}  # of other keys: above 0


def check_rope(where: str, raw: dict[str, Any], known: Known) -> None:
    """Refuses rotary settings that the two readers take differently.

    Args:
        where: the file, for messages; raw: the content of config.json.
        known: of the class; `rope`: keys beside those of the type, and what is expected of them.
    Raises:
        RotQuantError: naming the field.
    """
    theta = raw.get("rope_theta")
    if "rope_theta" in raw:
        _check_number(where, "rope_theta", theta, LEAST["rope_theta"])
    if known.rope_by_layer and isinstance(raw.get("rope_parameters"), dict):
        _check_entries(where, raw, known)
        raw = {name: value for name, value in raw.items() if name != "rope_parameters"}
    given = [name for name in ("rope_parameters", "rope_scaling") if raw.get(name) is not None]
    if len(given) == 2 and raw[given[0]] != raw[given[1]]:
        raise RotQuantError(f"{where}: rope_parameters and rope_scaling differ; remove the one that does not hold")
    for name in given:
        settings = raw[name]
        if not isinstance(settings, dict):
            raise RotQuantError(f"{where}: {name} is {short(repr(settings), 60)}, expected is an object or null")
        _check_settings(where, name, settings, raw, known)
        if theta is not None and settings.get("rope_theta", theta) != theta:
            raise RotQuantError(f"{where}: rope_theta is {theta}, but {name}.rope_theta is {settings['rope_theta']}")


def _check_entries(where: str, raw: dict[str, Any], known: Known) -> None:
    """Of each kind of layer; what older files say of it beside them must be the same."""
    entries = raw["rope_parameters"]
    if raw.get("rope_scaling") is not None:
        raise RotQuantError(
            f"{where}: rope_parameters and rope_scaling are both there; remove the one that does not hold"
        )
    for kind, older in ((FULL, "rope_theta"), (SLIDING, "rope_local_base_freq")):
        settings = entries.get(kind)
        if settings is not None and not isinstance(settings, dict):
            raise RotQuantError(
                f"{where}: rope_parameters.{kind} is {short(repr(settings), 60)}, expected is an object"
            )
        _check_settings(where, f"rope_parameters.{kind}", settings or {}, raw, known)
        theta = (settings or {}).get("rope_theta")
        if None not in (theta, raw.get(older)) and theta != raw[older]:
            raise RotQuantError(f"{where}: {older} is {raw[older]}, but rope_parameters.{kind}.rope_theta is {theta}")
    if other := entries.keys() - {FULL, SLIDING}:
        raise RotQuantError(f"{where}: rope_parameters.{short(min(other), 60)} is no kind of layer of this model")


def _check_settings(where: str, name: str, settings: dict[str, Any], raw: dict[str, Any], known: Known) -> None:
    kind, types = settings.get("rope_type", settings.get("type", "default")), COMMON + known.rope_types
    if not isinstance(kind, str) or kind not in types:
        raise RotQuantError(
            f"{where}: {name}.rope_type is {short(repr(kind), 60)}; the same in transformers and vLLM are"
            f" {', '.join(types)}"
        )
    if settings.get("type", kind) != kind:
        raise RotQuantError(f"{where}: {name}.rope_type is {kind!r}, but its type is {short(repr(settings['type']))}")
    allowed = {key.rstrip("?") for key in TYPES[kind]}
    for key in TYPES[kind]:
        if not key.endswith("?") and settings.get(key) is None:
            raise RotQuantError(f"{where}: {name}.{key} is missing, and rope_type {kind!r} needs it")
    for key, value in settings.items():
        if key in ("rope_type", "type"):
            continue
        if key in known.rope:
            if expected := known.rope[key](value):
                raise RotQuantError(f"{where}: {name}.{key} is {short(repr(value), 60)}, expected is {expected}")
            continue
        if key == "partial_rotary_factor" and type(value) in (int, float) and value == 1:
            continue
        if key not in allowed and key != "rope_theta":
            raise RotQuantError(f"{where}: {name}.{short(key, 60)} does not belong to rope_type {kind!r}")
        if key == "truncate":
            if type(value) is not bool:
                raise RotQuantError(f"{where}: {name}.truncate is {short(repr(value), 60)}, expected is true or false")
        elif key == "partial_rotary_factor":
            if expected := number(0, 1, above=True)(value):
                raise RotQuantError(f"{where}: {name}.{key} is {short(repr(value), 60)}, expected is {expected}")
        elif key == "original_max_position_embeddings":
            if type(value) is not int or not 1 <= value <= 2**25:
                raise RotQuantError(f"{where}: {name}.{key} is {short(repr(value), 60)}, expected is a whole number")
        else:
            _check_number(where, f"{name}.{key}", value, LEAST.get(key, 0.0))
    _check_lengths(where, name, kind, settings, raw)


def _check_lengths(where: str, name: str, kind: str, settings: dict[str, Any], raw: dict[str, Any]) -> None:
    outer, inner = (some.get("original_max_position_embeddings") for some in (raw, settings))
    if kind in ("llama3", "yarn") and "original_max_position_embeddings" in raw and outer != inner:
        raise RotQuantError(f"{where}: original_max_position_embeddings is {short(outer, 60)}, but {inner} in {name}")
    if kind == "llama3" and settings["low_freq_factor"] >= settings["high_freq_factor"]:
        raise RotQuantError(f"{where}: {name}.low_freq_factor must be below high_freq_factor")
    longest = raw.get("max_position_embeddings")
    if kind == "yarn" and isinstance(longest, int):
        original = settings.get("original_max_position_embeddings", longest)
        if original * settings["factor"] < longest:  # the rows of vLLM's table
            raise RotQuantError(
                f"{where}: max_position_embeddings is {longest}, beyond {name}.original_max_position_embeddings times"
                f" factor, {original * settings['factor']:g}, where vLLM's table ends"
            )


def _check_number(where: str, name: str, value: Any, least: float = 0.0) -> None:
    fine = type(value) in (int, float) and 0 < value < 1e15 and math.isfinite(value) and value >= least
    if not fine:
        expected = f"a number of at least {least:g}" if least else "a number above 0"
        raise RotQuantError(f"{where}: {name} is {short(repr(value), 60)}, expected is {expected}")
