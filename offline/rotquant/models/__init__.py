"""What rotquant knows about models: an architecture is data in one file, the rest of the quantizer asks it.

architecture    a whole model as data              layer, attention, delta, mlp    what it is made of
registry        the families, one file each        config_fields   what config.json may say
decoder         how a layer computes               reading         config.json -> architecture; transformers' own model
"""

from rotquant.models.architecture import Architecture, Names, head_size, layer_configs
from rotquant.models.layer import Layer, Tensors
from rotquant.models.reading import (
    describe,
    expected_shapes,
    is_known,
    read_architecture,
    read_config,
    rotary,
    skeleton,
    torch_attention,
)

__all__ = [
    "Architecture",
    "Layer",
    "Names",
    "Tensors",
    "describe",
    "expected_shapes",
    "head_size",
    "is_known",
    "layer_configs",
    "read_architecture",
    "read_config",
    "rotary",
    "skeleton",
    "torch_attention",
]
