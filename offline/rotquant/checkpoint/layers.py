"""A decoder layer's tensors from a model's files, whatever the files call them and hold together."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from rotquant.checkpoint.source import Source
from rotquant.models.architecture import Architecture
from rotquant.models.expert_tensors import ExpertTensors
from rotquant.models.layer import Tensors
from rotquant.models.mlp import Experts

Shapes = dict[str, tuple[int, ...]]


def read_gain(source: Source, arch: Architecture) -> Tensor:
    """The final norm's gain [hidden]; float64 where it is not what the files hold."""
    held = source.get(arch.names.norm)
    return held.double() + arch.offset if arch.offset else held


def read_layer(source: Source, arch: Architecture, index: int) -> Tensors:
    """The tensors of decoder layer `index` by their names less the layer's prefix.

    Of a mixture its experts are read when they are asked for (`ExpertTensors`).
    """
    kind, prefix = arch.kinds[index], arch.layer_prefix(index)
    block = kind.mlp
    if not isinstance(block, Experts):
        return kind.split(source.layer(prefix))
    names = [name.removeprefix(prefix) for name in source.files if name.startswith(prefix)]
    others = [name for name in names if ".experts." not in name]
    return ExpertTensors(
        {_in_files(block, name): source.get(prefix + name) for name in others},
        kind,
        lambda expert: _expert(source, prefix, block, expert),
    )


def _expert(source: Source, prefix: str, block: Experts, index: int) -> Tensors:
    """The tensors of one expert by their names less the prefix."""
    mlp = block.routed[index]

    def get(name: str, leaf: str, part: slice) -> Tensor:
        together = _together(block, prefix, leaf, source.files)
        return source.get(together, (index, part)) if together else source.get(f"{prefix}{name}.weight")

    return {
        f"{mlp.gate}.weight": get(mlp.gate, "gate_up_proj", slice(0, block.width)),
        f"{mlp.up}.weight": get(mlp.up, "gate_up_proj", slice(block.width, None)),
        f"{mlp.down}.weight": get(mlp.down, "down_proj", slice(None)),
    }


def _in_files(block: Experts, name: str) -> str:
    """The name that files have for one of transformers' names in a layer."""
    return block.files + name.removeprefix(block.module) if name.startswith(f"{block.module}.") else name


def in_files(arch: Architecture, name: str) -> str:
    """What files call a module or tensor of transformers' model."""
    for index, block in arch.mixtures.items():
        prefix = arch.layer_prefix(index)
        if name.startswith(prefix):
            return prefix + _in_files(block, name.removeprefix(prefix))
    return name


def _together(block: Experts, prefix: str, leaf: str, present: Collection[str]) -> str | None:
    """The tensor that holds a part of all experts, where the files have one."""
    names = (f"{prefix}{path}.experts.{leaf}" for path in (block.files, block.module))
    return next((name for name in names if name in present), None)


def stored_shapes(arch: Architecture, shapes: Shapes, present: Collection[str]) -> Shapes:
    """What files of a model hold, from what transformers' model of it does.

    Args:
        shapes: of every parameter of transformers' model; present: the names in the files, which may hold experts one
            by one or together.
    """
    found = dict(shapes)
    for index, block in arch.mixtures.items():
        prefix = arch.layer_prefix(index)
        for leaf in ("gate_up_proj", "down_proj"):
            shape = found.pop(f"{prefix}{block.module}.experts.{leaf}")
            if together := _together(block, prefix, leaf, present):
                found[together] = shape
                continue
            for mlp in block.routed:
                names = (mlp.gate, mlp.up) if leaf == "gate_up_proj" else (mlp.down,)
                found |= {f"{prefix}{name}.weight": arch.kinds[index].shapes[name] for name in names}
        for name in [n for n in found if n.startswith(f"{prefix}{block.module}.") and n not in present]:
            found[prefix + _in_files(block, name.removeprefix(prefix))] = found.pop(name)
    return found
