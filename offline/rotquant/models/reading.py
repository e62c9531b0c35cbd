"""From a model folder to its architecture, and what transformers itself says about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rotquant.common.json_files import read_object, short
from rotquant.errors import RotQuantError
from rotquant.models.architecture import Architecture, Names
from rotquant.models.config_fields import check_fields, check_values
from rotquant.models.registry import BY_CLASS
from rotquant.models.text_half import has_text_half, text_half
from rotquant.models.windows import stated

MOST_LAYERS = 10_000  # no model has as many; a wrong number should not be counted up to


def read_config(folder: Path) -> PreTrainedConfig:
    """config.json of a local folder, as transformers reads it.

    Raises:
        RotQuantError: no config.json, or one that transformers cannot read.
    """
    if not (folder / "config.json").is_file():
        raise RotQuantError(f"{folder}/config.json: no such file; MODEL must be a Hugging Face model folder or hub id")
    raw = _checked(folder / "config.json")
    try:
        if has_text_half(raw):
            half = text_half(raw)
            return CONFIG_MAPPING[half["model_type"]].from_dict(half)
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a config class makes of a wrong value
        raise RotQuantError(f"{folder}/config.json: {short(error)}") from error


def _checked(file: Path) -> dict[str, Any]:
    """Its content, looked at before transformers sees it, which may take long to fail, or name no field."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RotQuantError(f"{file}: no valid JSON: {short(error)}") from error
    if not isinstance(raw, dict):
        return {}
    half = text_half(raw)
    names = half.get("architectures")
    if isinstance(names, list) and names[:1] and names[0] in list(BY_CLASS):
        check_values(str(file), half)
    return raw


def torch_attention(arch: Architecture) -> str:
    """What transformers calls the attention that computes this model: torch's fast kernels have no soft cap, and
    "sdpa" drops it in silence."""
    return "eager" if arch.caps_scores else "sdpa"


def is_known(config: PreTrainedConfig) -> bool:
    """Whether some family describes the class that a config names."""
    return bool(set((config.architectures or [])[:1]) & BY_CLASS.keys())


def describe(config: PreTrainedConfig, where: str = "config.json", class_name: str | None = None) -> Architecture:
    """The architecture of a config.

    Args:
        class_name: of transformers' model, where it is not the first entry of the config's `architectures`.
    Raises:
        RotQuantError: a class that no family describes, or a config that does not describe a model of it.
    """
    names = [class_name] if class_name else config.architectures or []
    if not names or names[0] not in BY_CLASS:
        raise RotQuantError(f"{where}: architectures is {names}, supported are {', '.join(BY_CLASS)}")
    layers = config.num_hidden_layers
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise RotQuantError(f"{where}: num_hidden_layers is {layers!r}, expected 1 to {MOST_LAYERS}")
    try:
        return BY_CLASS[names[0]].describe(config)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise RotQuantError(f"{where}: not a config of {names[0]}: {type(error).__name__}: {error}") from error


def read_architecture(folder: Path) -> Architecture:
    """Checks that the model is one that can be quantized here.

    Raises:
        RotQuantError: naming the field of config.json that stands in the way.
    """
    where = f"{folder}/config.json"
    if (folder / "config.json").is_file():
        check_fields(where, text_half(read_object(folder / "config.json")))
    config = read_config(folder)
    found = describe(config, where)
    return replace(found, served={**stated(config, [kind.attention.window for kind in found.kinds]), **found.served})


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """transformers' own model without weights: parameters on the meta device."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    except Exception as error:  # of many kinds
        raise RotQuantError(f"config.json: transformers cannot build this model: {short(error)}") from error


def expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config must hold."""
    model = skeleton(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(Names().head, None)
    return shapes


def rotary(
    config: PreTrainedConfig, positions: int, entry: str | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """cos and sin of transformers' own rotary embedding (all its scaling variants), float32 [1, positions, channels].

    entry: of `rope_parameters`, where kinds of layer have their own. None for a model that has none.
    """
    found: Any = skeleton(config).get_decoder().rotary_emb
    if found is None:
        return None
    embedding = type(found)(config=config)
    kind = {"layer_type": entry} if entry else {}
    return embedding(torch.zeros(1, dtype=torch.float32), torch.arange(positions)[None], **kind)
