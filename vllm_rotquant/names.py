"""Names of modules: config.json's, and vLLM's, which puts a prefix in front where a model is not the only one.

A draft model is built under `draft_model.`, the language model of a larger one under `language_model.`. The plain names
in config.json (`lm_head`, `model.layers.3.self_attn.q_proj`) know nothing of that, so what stands before the name that
config.json would use is taken away before anything is looked up.
"""

from __future__ import annotations

import re

from rotquant.checkpoint.format import CheckpointFormat
from rotquant.checkpoint.targets import names_by_field
from rotquant.errors import RotQuantError

ROOTS = ("model", "lm_head", "score")  # first parts of module names in the checkpoints of causal language models
CLASSES = ("Linear", "Embedding")  # targets that are not names
START = re.compile(r"(?!re:)(\w+)\.|re:\^?(\w+)\\?\.")  # first part of a longer name, or of a pattern for one


class Names:
    """What config.json calls the modules that vLLM builds, and which of its plain names vLLM has built."""

    def __init__(self, form: CheckpointFormat) -> None:
        self.fields = names_by_field(form)
        starts = (START.match(target) for targets in self.fields.values() for target in targets)
        self.roots = {*ROOTS, *(start[1] or start[2] for start in starts if start)}
        self.built: set[str] = set()

    def own(self, name: str) -> str:
        """vLLM's name of a module without the prefix that config.json does not use."""
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part in self.roots), 0)
        return ".".join(parts[first:])

    def check_all_built(self, partly: bool, layers: int) -> None:
        """To be called when a model is built.

        Args:
            partly: this process holds only some layers of the model; layers: how many the model has.
        Raises:
            RotQuantError: config.json gives something to a module that the model does not have.
        """
        known = {layer_as(name, "N") for name in self.built} if partly else set()
        for field, targets in self.fields.items():
            for name in targets:
                elsewhere = layer_as(name, "N") in known and layer_of(name) < layers
                # vLLM leaves lm_head out where it is tied, in pooling models and in all but the last pipeline stage.
                if not (name.startswith("re:") or name in (*CLASSES, "lm_head") or name in self.built or elsewhere):
                    raise RotQuantError(
                        f"config.json: {field}: {name!r} is no module of this model, so that what it says would be left"
                        " out: correct the name, or quantize the model again"
                    )


LAYER = re.compile(r"(?<=\blayers\.)\d+")


def layer_as(name: str, index: str) -> str:
    return LAYER.sub(index, name, count=1)


def layer_of(name: str) -> int:
    found = LAYER.search(name)
    return int(found[0]) if found else 0


def parts_of(prefix: str, packed: dict[str, list[str]]) -> list[str]:
    """Names of the checkpoint's layers that vLLM runs as the one named `prefix`."""
    parent, _, name = prefix.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in packed.get(name, [name])]
