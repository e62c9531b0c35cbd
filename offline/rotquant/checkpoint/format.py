"""What a rotquant checkpoint asks of whoever runs it: config.json in, plain facts out, or a refusal.

One reader for both sides (`rotquant.load` and the vLLM plugin), so that what is measured is what is
served. Every field is either understood here or refused by name; nothing is skipped.

config.json holds `quantization_config` (compressed-tensors' own schema) and the key `rotquant` (`extension`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme
from transformers import PreTrainedConfig

from rotquant.checkpoint.claim import claims as claims
from rotquant.checkpoint.extension import FORMAT_VERSION, Extension, read_extension
from rotquant.checkpoint.schemes import check_kv, check_linear, expect, read_linear, refuse, text
from rotquant.common.numbers import is_power_of_two
from rotquant.common.schema import read_schema
from rotquant.errors import RotQuantError
from rotquant.models import head_size
from rotquant_kernels.formats import KVFormat, RowFormat, WeightFormat
from rotquant_kernels.stages import KINDS

__all__ = ["FORMAT_VERSION", "CheckpointFormat", "LinearFormat", "Transform", "claims", "matches"]


@dataclass(frozen=True)
class Transform:
    """Online transform of a linear input: kind and block as in `rotquant_kernels.stages`; `stored` has its tensor."""

    kind: str
    block: int
    name: str

    def span(self, inputs: int) -> int:
        """How many neighbouring inputs of `inputs` it mixes with each other: who runs it must hold all of them."""
        return KINDS[self.kind].span(self.block, inputs)

    def __str__(self) -> str:
        return f"{self.name} {self.kind}" + (f" {self.block}" if self.block else "")


@dataclass(frozen=True)
class LinearFormat:
    """How one linear layer is stored and run.

    `rows` are what its input is rounded to; `rank` 0 means no low-rank branch, which `subtracts` its directions from
    the input or does not; transforms run in their order.
    """

    weights: WeightFormat
    rows: RowFormat
    transforms: tuple[Transform, ...] = ()
    rank: int = 0
    subtracts: bool = False


class CheckpointFormat:
    """Parsed and checked `quantization_config` and `rotquant` of a config.json.

    Args:
        quantization_config: the dict of that name.
        extension: the dict `rotquant`, {} where there is none (a checkpoint of another tool).
        head_dim: the model's head size.
    Raises:
        RotQuantError: naming the field that this build does not run exactly as written.
    """

    def __init__(self, quantization_config: dict[str, Any], extension: dict[str, Any], head_dim: int) -> None:
        self.extension: Extension = read_extension(extension)
        config, transforms = read_schema(quantization_config)
        self.ignore: list[str] = list(config.ignore or [])
        self.groups: dict[str, QuantizationScheme] = {}
        for name, scheme in config.config_groups.items():
            if isinstance(scheme, list):
                refuse(f"quantization_config.config_groups.{name}", "a preset instead of a scheme")
            check_linear(f"quantization_config.config_groups.{name}", scheme, quantization_config.get("format"))
            self.groups[name] = scheme
        self.rotated = [a for s in transforms.config_groups.values() for a in s.apply if a.location != "input"]
        self.transforms, rotate = read_transforms(transforms, head_dim)
        for entry in self.extension.input_transforms:
            block = entry.block if KINDS[entry.kind].has_block else 0
            args = TransformArgs(targets=entry.targets, location="input")
            self.transforms.append((args, Transform(entry.kind, block, entry.name)))
        self.kv = self._kv(config.kv_cache_scheme, head_dim, rotate)
        if self.extension.profile == "portable":
            self._expect_portable()

    @classmethod
    def of(cls, config: PreTrainedConfig) -> CheckpointFormat:
        """Of a whole config.json that has a `quantization_config`."""
        return cls(config.quantization_config, getattr(config, "rotquant", {}), head_size(config))

    @property
    def schemes(self) -> list[QuantizationScheme]:
        return list(self.groups.values())

    def _expect_portable(self) -> None:
        """Refuses what the profile "portable" promises to leave out: all that stock engines would not run."""
        ours = self.extension
        clips = [ours.activation_clip.get("default", 1.0), *ours.activation_clip.values()]
        inputs = [scheme.input_activations for scheme in self.schemes]
        for what, there in (
            ("online transforms", self.transforms), ("a kv_cache_scheme", self.kv), ("low_rank", ours.low_rank),
            ("a clip ratio", min(clips) < 1), ("asymmetric activations", not all(a and a.symmetric for a in inputs)),
        ):  # fmt: skip
            if there:
                raise RotQuantError(f"config.json: rotquant.profile is 'portable', but the checkpoint has {what}")

    def _kv(self, scheme: QuantizationArgs | None, head_dim: int, rotate: int) -> KVFormat | None:
        if scheme is None:
            if rotate:
                refuse("quantization_config.transform_config", "q_attn/k_cache without a kv_cache_scheme")
            if self.extension.key_feedback:
                refuse("rotquant.key_feedback", "it without a kv_cache_scheme")
            return None
        where = "quantization_config.kv_cache_scheme"
        check_kv(where, scheme, head_dim)
        clip = self.extension.kv_clip
        return KVFormat(bool(scheme.symmetric), clip.key, clip.value, rotate, self.extension.key_feedback)

    def attention(self, name: str) -> KVFormat | None:
        """Format of the KV cache of the attention module with this full name, None where it is not quantized."""
        clip = self.extension.kv_clip.of(name)
        return self.kv and replace(self.kv, k_clip=clip.key, v_clip=clip.value)

    def linear(self, name: str) -> LinearFormat | None:
        """Format of the linear layer with this full name, None where it is not quantized.

        Raises:
            RotQuantError: config.json gives the layer what only a quantized one has, or one thing twice.
        """
        scheme = self.scheme(name)
        if scheme is None:
            self._expect_nothing(name)
            return None
        weights, rows = read_linear(scheme)
        transforms = tuple(transform for args, transform in self.transforms if covers(args, name, "Linear"))
        branches = [e for e in self.extension.low_rank if any(matches(name, t, "Linear") for t in e.targets)]
        if len({transform.name for transform in transforms}) < len(transforms):
            raise RotQuantError(f"config.json: two online transforms of {name} have one name: rename one")
        if len(branches) > 1:
            raise RotQuantError(f"config.json: rotquant.low_rank: two entries name {name}: keep one")
        clip = self.extension.activation_clip
        rows = rows.clipped(clip.get(name, clip.get("default", 1.0)))
        branch = (branches[0].rank, branches[0].subtracts) if branches else ()
        return LinearFormat(weights, rows, transforms, *branch)

    def scheme(self, name: str) -> QuantizationScheme | None:
        """The group of config.json that the linear layer with this full name belongs to, None where it has none."""
        if any(matches(name, target, "Linear") for target in self.ignore):
            return None
        # A target that names the module wins over one that names its class, as in compressed-tensors.
        named = [s for s in self.schemes if any(matches(name, t, None) for t in s.targets)]
        by_class = [s for s in self.schemes if any(matches(name, t, "Linear") for t in s.targets)]
        return next(iter(named + by_class), None)

    def _expect_nothing(self, name: str) -> None:
        """Refuses what would be left out of a layer that is not quantized; a class name means only quantized ones."""
        targets = [t for e in self.extension.low_rank for t in e.targets]
        if any(covers(args, name, None) for args, _ in self.transforms):
            refuse(f"online transforms of {name}", "them on a layer that is not quantized")
        if any(matches(name, target, None) for target in targets):
            refuse("rotquant.low_rank", f"it on {name}, which is not quantized")


def read_transforms(config: TransformConfig, head_dim: int) -> tuple[list[tuple[TransformArgs, Transform]], int]:
    """Online transforms of linear inputs, and R3's Hadamard block (0 for none)."""
    inputs: list[tuple[TransformArgs, Transform]] = []
    attention: dict[str, int] = {}
    for name, scheme in config.config_groups.items():
        where = f"quantization_config.transform_config.config_groups.{name}"
        expect(where, "type", scheme.type, "hadamard", "random-matrix")
        expect(where, "randomize", scheme.randomize, False)
        for args in scheme.apply:
            location = text(args.location)
            expect(f"{where}.apply", "location", location, "input", "q_attn", "k_cache")
            if args.inverse and scheme.type != "hadamard":  # H / sqrt(b) is its own inverse
                refuse(f"{where}.apply.inverse", "the inverse of a stored matrix")
            if location == "input":
                inputs.append((args, _input_transform(where, name, scheme)))
            else:
                expect(where, "type", scheme.type, "hadamard")
                attention[str(location)] = scheme.head_dim or head_dim
    if attention and (len(attention) != 2 or len(set(attention.values())) != 1):
        refuse("quantization_config.transform_config", "q_attn and k_cache that differ")
    rotate = attention.get("k_cache", 0)
    if rotate and (not is_power_of_two(rotate) or head_dim % rotate):
        refuse("quantization_config.transform_config", f"a Hadamard of size {rotate} on heads of {head_dim}")
    return inputs, rotate


def _input_transform(where: str, name: str, scheme: TransformScheme) -> Transform:
    if not scheme.head_dim:
        refuse(f"{where}.head_dim", "an online transform of unstated block size")
    block = int(scheme.head_dim or 0)
    if scheme.type == "hadamard" and not is_power_of_two(block):
        refuse(f"{where}.head_dim", f"a Hadamard block of {block} (not a power of two)")
    return Transform("hadamard" if scheme.type == "hadamard" else "dense", block, name)


def matches(name: str, target: str, module_class: str | None) -> bool:
    """compressed-tensors' matching of a module name (or class) with a target or `re:` pattern."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target in (name, module_class)


def covers(args: TransformArgs, name: str, module_class: str | None) -> bool:
    targeted = any(matches(name, target, module_class) for target in args.targets)
    return targeted and not any(matches(name, target, "Linear") for target in args.ignore)
