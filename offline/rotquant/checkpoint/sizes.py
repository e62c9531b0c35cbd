"""config.json of a checkpoint against the shapes in its files, before anything is built by it.

A wrong size would otherwise ask for memory that no machine has, or end deep inside the model's code.
"""

from __future__ import annotations

import math
from typing import Any

from rotquant.checkpoint.source import Source
from rotquant.errors import RotQuantError
from rotquant.models import Architecture, Layer, describe, layer_configs
from rotquant.models.delta import DeltaNet
from rotquant.models.registry import KNOWN_BY_CLASS


def check_sizes(config: Any, source: Source) -> Architecture:
    """Compares the sizes that config.json states with the first layer's tensors and the embeddings.

    Args:
        config: transformers' config of one of `rotquant.models`.
    Returns:
        its architecture.
    Raises:
        RotQuantError: naming the field.
    """
    where = f"{source.folder}/config.json"
    heads = config.num_attention_heads
    sizes = ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    experts = hasattr(config, "num_experts_per_tok") and getattr(config, "num_local_experts", None) != 0
    mixture = ("num_experts", "num_experts_per_tok") if experts else ()
    for own in layer_configs(config):
        for field in (*sizes, "num_key_value_heads", "max_position_embeddings", *mixture):
            value = getattr(own, field, None)
            if type(value) is not int or value < 1:
                raise RotQuantError(f"{where}: {field} is {value!r}, expected a positive whole number")
        if heads % own.num_key_value_heads:
            raise RotQuantError(f"{where}: num_key_value_heads is {own.num_key_value_heads}, with {heads} heads")
    arch = describe(config, where)
    check_shapes(where, arch, source)
    known = KNOWN_BY_CLASS[config.architectures[0]]
    if (activation := getattr(config, known.activation[0])) != known.activation[1]:
        field, supported = known.activation
        raise RotQuantError(f"{where}: {field} is {activation!r}, the supported activation is {supported!r}")
    if config.return_dict is not True:
        raise RotQuantError(f"{where}: return_dict is {config.return_dict!r}, expected true")
    for entry in config.rope_parameters.values() if known.rope_by_layer else (config.rope_parameters,):
        check_rope(where, entry)
    eps = config.rms_norm_eps
    if not isinstance(eps, float) or not 0 < eps < 1 or not math.isfinite(eps):
        raise RotQuantError(f"{where}: rms_norm_eps is {eps!r}, expected a small positive number")
    return arch


def check_shapes(where: str, arch: Architecture, source: Source) -> None:
    """Compares the architecture with the embeddings and the tensors of the first layer of each kind."""
    names = arch.names
    layers = {name.removeprefix(names.layers).split(".")[0] for name in source.files if name.startswith(names.layers)}
    table = source.shapes.get(names.embedding, (0, 0))
    found = [
        ("num_hidden_layers", arch.layers, len(layers)),
        ("vocab_size", arch.vocab_size, table[0]),
        ("hidden_size", arch.hidden_size, table[-1]),
    ]
    firsts = {
        (type(kind.attention), kind.attention.channels_of_head, type(kind.mlp)): index
        for index, kind in reversed(list(enumerate(arch.kinds)))
    }
    for index in firsts.values():
        kind = arch.kinds[index]
        holders = {part: name for name, parts in kind.stored.items() for part in parts}
        for field, part in sized(kind).items():
            own, whole = kind.shapes[part][0], kind.stored_shape(holders[part])[0]
            stored = rows(source, arch.layer_prefix(index) + holders[part])
            found.append((field, own, stored and stored - (whole - own)))
    for field, stated, stored in found:
        if stored and stated != stored:
            raise RotQuantError(f"{where}: {field} is {stated}, the tensors are made for {stored}")


def sized(kind: Layer) -> dict[str, str]:
    """Fields of config.json, each with the linear whose outputs it counts."""
    a = kind.attention
    own = (
        {
            "linear_num_value_heads times linear_value_head_dim": a.gate,
            "linear_num_key_heads times linear_key_head_dim": a.mixed,
        }
        if isinstance(a, DeltaNet)
        else {"num_attention_heads times head_dim": a.query, "num_key_value_heads times head_dim": a.key}
    )
    return {kind.width_field(kind.widths[0]): kind.mlp.gated[0].up} | own


def check_rope(where: str, rope: dict[str, Any]) -> None:
    """Refuses numbers that no rotary embedding can have."""
    for key, value in rope.items():
        number = isinstance(value, int | float)
        if (number and not (value > 0 and math.isfinite(value))) or (key == "rope_theta" and type(value) is bool):
            raise RotQuantError(f"{where}: rope_parameters.{key} is {value!r}, expected a positive number")


def rows(source: Source, name: str) -> int:
    """Outputs of a linear layer, packed or not, or rows of a tensor; 0 where it is not there, which is found later."""
    found = (source.shapes.get(key) for key in (name, f"{name}.weight_packed", f"{name}.weight"))
    shape = next((shape for shape in found if shape), (0,))
    return shape[0]
