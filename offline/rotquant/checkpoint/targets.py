"""Whether every name in a checkpoint's config.json means a module of the model: nothing else would notice a typo.

An engine asks the format for the modules that it has (`CheckpointFormat.linear`, `.attention`). A target that names
none of them, or an entry for a layer that is not quantized, would be passed over without a word.
"""

from __future__ import annotations

from collections.abc import Iterable

from compressed_tensors.transform import TransformArgs

from rotquant.checkpoint.format import CheckpointFormat, covers, matches
from rotquant.errors import RotQuantError
from rotquant.models import Architecture


def names_by_field(form: CheckpointFormat) -> dict[str, list[str]]:
    """The targets, patterns and names in config.json by the field that they stand in."""
    groups = "quantization_config.config_groups"
    transforms = form.transforms
    return {
        f"{groups}.targets": [t for scheme in form.schemes for t in scheme.targets],
        "quantization_config.ignore": form.ignore,
        "quantization_config.transform_config and rotquant.input_transforms: targets": [
            t for args, _ in transforms for t in args.targets
        ],
        "quantization_config.transform_config: ignore": [t for args, _ in transforms for t in args.ignore],
        "rotquant.low_rank.targets": [t for entry in form.extension.low_rank for t in entry.targets],
        "rotquant.activation_clip": [n for n in form.extension.activation_clip if n != "default"],
        "rotquant.kv_clip.layers": list(form.extension.kv_clip.layers),
    }


def check_targets(checkpoint: CheckpointFormat, arch: Architecture) -> None:
    """Compares the names in config.json with the modules of the model.

    Raises:
        RotQuantError: a name or pattern that matches no module, or says two things of one.
    """
    layers = [(arch.layer_prefix(i), kind) for i, kind in enumerate(arch.kinds)]
    linears = [prefix + name for prefix, kind in layers for name in kind.stored]
    linears += [prefix + name for prefix, kind in layers for names in kind.full_precision.values() for name in names]
    linears.append(arch.names.head.removesuffix(".weight"))
    attentions = list(arch.attentions)
    _check_schemes(checkpoint, linears)
    quantized = {name for name in linears if checkpoint.linear(name) is not None}
    _check_transforms(checkpoint, quantized, attentions)
    extension = checkpoint.extension
    for i, entry in enumerate(extension.low_rank):
        for target in entry.targets:
            _expect_match(f"rotquant.low_rank.{i}.targets", target, "Linear", quantized)
    for field, names, known in (
        ("activation_clip", extension.activation_clip.keys() - {"default"}, quantized),
        ("kv_clip.layers", extension.kv_clip.layers.keys(), set(attentions if checkpoint.kv else ())),
    ):
        for name in sorted(names - known):
            raise RotQuantError(
                f"config.json: rotquant.{field}.{name}: this model has no quantized module of that name"
            )


def _check_schemes(checkpoint: CheckpointFormat, linears: list[str]) -> None:
    """Each group has a layer to itself, and no layer two groups of equal right."""
    where = "quantization_config.config_groups"
    for name, scheme in checkpoint.groups.items():
        for target in scheme.targets:
            _expect_match(f"{where}.{name}.targets", target, "Linear", linears)
        if not any(checkpoint.scheme(linear) is scheme for linear in linears):
            raise RotQuantError(f"config.json: {where}.{name}: no layer is left for it; mend its targets, or `ignore`")
    for linear in linears:
        for module_class in (None, "Linear"):
            claims = [
                name
                for name, scheme in checkpoint.groups.items()
                if any(_how(linear, target) == module_class for target in scheme.targets)
            ]
            if len(claims) > 1:
                raise RotQuantError(f"config.json: {where}: {' and '.join(claims)} both name {linear}: keep one")
    for target in checkpoint.ignore:
        _expect_match("quantization_config.ignore", target, "Linear", linears)


def _how(name: str, target: str) -> str | bool | None:
    """How a target means a module: None by its name, "Linear" by its class, False not at all."""
    if matches(name, target, None):
        return None
    return "Linear" if matches(name, target, "Linear") else False


def _check_transforms(checkpoint: CheckpointFormat, quantized: set[str], attentions: list[str]) -> None:
    """Every target of a linear's transform has a quantized layer; those of queries and keys mean every attention."""
    where = "quantization_config.transform_config"
    for args, transform in checkpoint.transforms:
        _check_apply(f"online transform {transform.name}", args, "Linear", quantized)
    for args in checkpoint.rotated:
        _check_apply(f"{where} ({args.location})", args, "Attention", attentions)
        left_out = [name for name in attentions if not covers(args, name, "Attention")]
        if left_out:
            raise RotQuantError(
                f"config.json: {where}: {args.location} does not name {left_out[0]}: R3 turns all layers or none"
            )


def _check_apply(where: str, args: TransformArgs, module_class: str, modules: Iterable[str]) -> None:
    for target in [*args.targets, *args.ignore]:
        _expect_match(f"{where}: targets", target, module_class, modules)


def _expect_match(where: str, target: str, module_class: str, modules: Iterable[str]) -> None:
    if not any(matches(name, target, module_class) for name in modules):
        raise RotQuantError(f"config.json: {where}: {target!r} matches no module of this model; mend the name")
