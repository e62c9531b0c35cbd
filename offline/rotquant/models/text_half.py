"""Models of text and images, of which the text half is quantized: their files read as if they held nothing else.

Such a config.json holds that of the text model in `text_config`, and the files call its tensors `model.language_model.`
where the text model's own say `model.`. What is made of it is a model of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fields = dict[str, Any]

HALVES = {"Qwen3_5ForConditionalGeneration": "Qwen3_5ForCausalLM"}  # class of the whole -> of its text half
PREFIX, OWN = "model.language_model.", "model."
OF_BOTH = ("tie_word_embeddings", "dtype", "torch_dtype", "transformers_version", "quantization_config")


def has_text_half(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of such a model."""
    names = raw.get("architectures")
    return isinstance(names, list) and names[:1] != [] and names[0] in list(HALVES)


def text_half(raw: Fields) -> Fields:
    """The config.json of the text half; of any other model itself."""
    if not has_text_half(raw) or not isinstance(raw.get("text_config"), dict):
        return raw
    shared = {name: raw[name] for name in OF_BOTH if name in raw}
    return raw["text_config"] | shared | {"architectures": [HALVES[raw["architectures"][0]]]}


def own_name(name: str) -> str:
    """What the text half's own files would call a tensor."""
    return OWN + name.removeprefix(PREFIX) if name.startswith(PREFIX) else name
