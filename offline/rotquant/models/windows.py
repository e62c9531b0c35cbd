"""Sliding windows: which layers have one, and what a checkpoint says so that both engines read the same.

A query sees its own position and the `window - 1` before it. transformers reads `layer_types` of config.json in some
classes and applies `sliding_window` to all layers in the others. vLLM reads `layer_types` in all of them; its classes
of the Qwen family have no windows in single layers, and refuse `max_window_layers` below the number of layers. There
the plugin gives each layer the window that transformers reads (`vllm_rotquant.windows`).
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

SLIDING, FULL = "sliding_attention", "full_attention"  # in `layer_types`


def windows(config: PreTrainedConfig, by_layer: bool) -> list[int | None]:
    """The window of each layer, None where it sees everything: a window that holds every context is none.

    by_layer: whether transformers' class of this model reads `layer_types`.
    """
    window, layers = stated_window(config), config.num_hidden_layers
    if window is None or window >= config.max_position_embeddings:
        return [None] * layers
    kinds = getattr(config, "layer_types", None) if by_layer else None
    return [window if kind == SLIDING else None for kind in kinds] if kinds else [window] * layers


def stated_window(config: PreTrainedConfig) -> int | None:
    """`sliding_window`, None where there is none: 0 in some config classes."""
    return getattr(config, "sliding_window", None) or None


def stated(config: PreTrainedConfig, found: list[int | None]) -> dict[str, Any]:
    """What config.json of a checkpoint says about windows, in place of the original's.

    Args:
        found: the window of each layer.
    """
    if stated_window(config) is None:
        return {}
    if not any(found):
        # Not null where there are kinds: transformers' Ministral makes a mask of the window even if no layer has it.
        kinds = getattr(config, "layer_types", None)
        return {"layer_types": [FULL] * len(found)} if kinds else {"sliding_window": None}
    if all(found):
        return {}
    last = {"max_window_layers": len(found)} if hasattr(config, "max_window_layers") else {}
    return {"layer_types": [SLIDING if window else FULL for window in found], **last}
