"""Models of text and images, of which the text half is quantized: their files read as if they held nothing else.

Such a config.json holds that of the text model in `text_config`, and the files call its tensors `model.language_model.`
where the text model's own say `model.`, older ones `language_model.model.`. What is made of it is a model of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fields = dict[str, Any]

HALVES = {  # class of the whole -> of its text half
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Gemma4ForConditionalGeneration": "Gemma4ForCausalLM",
    "Gemma4UnifiedForConditionalGeneration": "Gemma4ForCausalLM",
    "Qwen3_5ForConditionalGeneration": "Qwen3_5ForCausalLM",
}
PREFIXES = {"model.language_model.": "model.", "language_model.": ""}  # of the files -> the text model's own
OF_BOTH = ("tie_word_embeddings", "dtype", "torch_dtype", "transformers_version", "quantization_config")


# Text halves that are the model of another class, whose config class has other defaults and a part that they lack.
UNIFIED = {"max_position_embeddings": 2**18, "sliding_window": 1024, "hidden_size_per_layer_input": 0}
OF_ANOTHER: dict[str, tuple[str, Fields]] = {"gemma4_unified_text": ("gemma4_text", UNIFIED)}


def has_text_half(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of such a model."""
    names = raw.get("architectures")
    return isinstance(names, list) and names[:1] != [] and names[0] in list(HALVES)


def text_half(raw: Fields) -> Fields:
    """The config.json of the text half; of any other model itself."""
    if not has_text_half(raw) or not isinstance(raw.get("text_config"), dict):
        return raw
    shared = {name: raw[name] for name in OF_BOTH if name in raw}
    text, kind = raw["text_config"], raw["text_config"].get("model_type")
    if kind in list(OF_ANOTHER):
        other, defaults = OF_ANOTHER[kind]
        text = defaults | text | {"model_type": other}
    return text | shared | {"architectures": [HALVES[raw["architectures"][0]]]}


def own_name(name: str) -> str:
    """What the text half's own files would call a tensor."""
    found = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    return name if found is None else PREFIXES[found] + name.removeprefix(found)
