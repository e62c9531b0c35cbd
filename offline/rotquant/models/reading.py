"""From a model folder to its architecture, and what transformers itself says about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rotquant.errors import RotQuantError
from rotquant.models.architecture import Architecture, Names
from rotquant.models.registry import BY_CLASS

MOST_LAYERS = 10_000  # no model has as many; a wrong number should not be counted up to


def read_config(folder: Path) -> PreTrainedConfig:
    """config.json of a local folder.

    Raises:
        RotQuantError: no config.json, or one that transformers cannot read.
    """
    if not (folder / "config.json").is_file():
        raise RotQuantError(f"{folder}/config.json: no such file; MODEL must be a Hugging Face model folder or hub id")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise RotQuantError(f"{folder}/config.json: {' '.join(str(error).split())[:300]}") from error


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
    config = read_config(folder)
    where = f"{folder}/config.json"
    found = describe(config, where)
    if getattr(config, "quantization_config", None):
        raise RotQuantError(f"{where}: quantization_config: the model is already quantized; start from the original")
    if config.hidden_act != "silu":
        raise RotQuantError(f"{where}: hidden_act is {config.hidden_act!r}, supported is 'silu'")
    if uses_sliding_window(config):
        raise RotQuantError(
            f"{where}: sliding_window is {config.sliding_window}, which the 4-bit KV cache does not support; set it"
            " to null if you serve contexts no longer than that"
        )
    # A window that holds every context is none, and vLLM shall not see one.
    return replace(found, served={**found.served, "sliding_window": None}) if states_window(config) else found


def uses_sliding_window(config: PreTrainedConfig) -> bool:
    """True where some layer attends to a window only."""
    if kinds := getattr(config, "layer_types", None):
        return any(kind != "full_attention" for kind in kinds)
    return states_window(config) and config.sliding_window < config.max_position_embeddings


def states_window(config: PreTrainedConfig) -> bool:
    """Whether the config gives every layer a window. Qwen configs carry the field with the feature off."""
    if getattr(config, "layer_types", None):
        return False
    return bool(getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """transformers' own model without weights: parameters on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)


def expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config must hold."""
    model = skeleton(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(Names().head, None)
    return shapes


def rotary(config: PreTrainedConfig, positions: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """cos and sin of transformers' own rotary embedding (all its scaling variants), float32 [1, positions, channels].

    None for a model that has none.
    """
    found: Any = skeleton(config).get_decoder().rotary_emb
    if found is None:
        return None
    embedding = type(found)(config=config)
    return embedding(torch.zeros(1, dtype=torch.float32), torch.arange(positions)[None])
