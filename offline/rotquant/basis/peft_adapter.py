"""A LoRA adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors, read and checked.

An adapter adds s B A to the weights of some linears, y = x (W + s B A)ᵀ, with s = alpha / r, or alpha / sqrt(r) where
it is rank-stabilised. Two programs read this folder, PEFT by the config and servers by the tensors; one that would mean
two things to them is refused, and so is all that makes more of an adapter than its factors. PEFT itself is not needed.

An adapter of a model of text and images is one of its text half, under that half's names, if it changes nothing else.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rotquant.errors import RotQuantError
from rotquant.models import Architecture
from rotquant.models.text_half import own_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASIS = "rotquant_basis"  # in the config of an adapter that was turned: sha256 of the basis it was turned for
FACTORS = ("lora_A", "lora_B")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Fields that say what an adapter is besides its factors; one that is set is refused with its reason.
REFUSED = {
    "use_dora": "DoRA scales the rows of the whole weight, which has no factors that could be turned",
    "modules_to_save": "it replaces whole modules, which are in another basis here; train with LoRA on linears alone",
    "lora_bias": "biases of factors are not run; train with lora_bias=false",
    "layer_replication": "the served model has the layers of the checkpoint",
    "alora_invocation_tokens": "activated LoRA is not run",
    "trainable_token_indices": "it changes embeddings; train with LoRA on linears alone",
    "target_parameters": "it adapts parameters that are not linear layers",
    "use_bdlora": "block-diagonal LoRA is not run",
    "use_qalora": "QALoRA groups inputs, which a rotation mixes",
}
# Fields that do not change what a trained adapter computes, or that are read below.
KNOWN = {
    "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "bias",
    "layers_to_transform", "layers_pattern", "init_lora_weights", "lora_dropout", "fan_in_fan_out", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size",
    "runtime_config", "ensure_weight_tying", BASIS,
}  # fmt: skip
# Initial values of the factors only. All other named ones (PiSSA, OLoRA, CorDA, LoftQ) move the base's weights too.
PLAIN_INIT = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


@dataclass(frozen=True)
class LoRAAdapter:
    """`factors` by name, `model.layers.0.self_attn.q_proj.lora_A` [r, inputs] and `.lora_B` [outputs, r]."""

    where: Path
    config: dict[str, Any]
    factors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path, arch: Architecture) -> LoRAAdapter:
        """Reads an adapter of a model of these sizes.

        Raises:
            RotQuantError: naming the file and the field or tensor that is wrong, or that is more than LoRA on linears.
        """
        config = read_config(folder / CONFIG)
        factors, names = read_factors(folder / WEIGHTS, config, arch)
        return cls(folder, with_own_names(config, names), factors)

    @property
    def basis(self) -> str | None:
        """sha256 of the basis that the adapter was turned for, None for one of an original."""
        return self.config.get(BASIS)

    @property
    def rank(self) -> int:
        """The largest."""
        return max(len(factor) for name, factor in self.factors.items() if name.endswith("lora_A"))

    def scaling(self, linear: str) -> float:
        """s of a linear by its full name."""
        rank = pattern_of(self.config, "rank_pattern", linear, self.config["r"])
        alpha = pattern_of(self.config, "alpha_pattern", linear, self.config["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def scaled(self) -> LoRAAdapter:
        """The same with s in B, which programs that do not read the patterns of the config run alike."""
        factors = {
            name: (factor.double() * self.scaling(name.removesuffix(".lora_B"))).float() if "lora_B" in name else factor
            for name, factor in self.factors.items()
        }
        return replace(self, factors=factors)

    def layer(self, prefix: str) -> dict[str, Tensor]:
        """The factors of a decoder layer, by their names less `prefix`."""
        return {name.removeprefix(prefix): factor for name, factor in self.factors.items() if name.startswith(prefix)}

    def tensors(self) -> dict[str, Tensor]:
        """The factors under PEFT's names."""
        return {f"{PREFIX}{name}.weight": factor for name, factor in self.factors.items()}


# ---- the config ---------------------------------------------------------------------------------------------------


def read_config(file: Path) -> dict[str, Any]:
    """adapter_config.json, checked."""
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RotQuantError(f"{file}: not there or no valid JSON ({error}); a PEFT LoRA adapter has it") from error
    if not isinstance(config, dict):
        raise RotQuantError(f"{file}: not a JSON object")
    if config.get("peft_type") != "LORA":
        raise RotQuantError(f"{file}: peft_type is {config.get('peft_type')!r}, only LORA adapters can be turned")
    for field, value in config.items():
        if field in REFUSED and value:
            raise RotQuantError(f"{file}: {field} is {value!r}: {REFUSED[field]}")
        if field not in KNOWN and field not in REFUSED and value:
            raise RotQuantError(f"{file}: {field} is {value!r}, which this build of rotquant does not know")
    if config.get("bias", "none") != "none":
        raise RotQuantError(f"{file}: bias is {config['bias']!r}: trained biases are not run; train with bias='none'")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INIT:
        raise RotQuantError(
            f"{file}: init_lora_weights is {init!r}, which also changes the base model's weights: convert the adapter"
            " with PEFT's path_initial_model_for_weight_conversion"
        )
    check_numbers(file, config)
    check_targets(file, config)
    return config


def check_numbers(file: Path, config: dict[str, Any]) -> None:
    ranks, alphas = {"r": config.get("r")}, {"lora_alpha": config.get("lora_alpha")}
    for field, found in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict):
            raise RotQuantError(f"{file}: {field} is {pattern!r}, not an object")
        for key in pattern:
            compiled(file, field, key)
        found |= {f"{field}.{key}": value for key, value in pattern.items()}
    for field, value in ranks.items():
        if type(value) is not int or value < 1:
            raise RotQuantError(f"{file}: {field} is {value!r}, not a positive integer")
    for field, value in alphas.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise RotQuantError(f"{file}: {field} is {value!r}, not a number")
    for field in ("use_rslora", BASIS):
        kind = str if field == BASIS else bool
        if not isinstance(config.get(field), kind | None):
            raise RotQuantError(f"{file}: {field} is {config[field]!r}, not a {kind.__name__}")


def check_targets(file: Path, config: dict[str, Any]) -> None:
    """The fields that name linears have the types that PEFT reads."""
    targets = config.get("target_modules")
    if not targets or not (isinstance(targets, str) or is_list(targets, str)):
        raise RotQuantError(f"{file}: target_modules is {targets!r}, not a list of names or a pattern")
    for field in ("target_modules", "exclude_modules"):
        if isinstance(value := config.get(field), str):
            compiled(file, field, value)
        elif value is not None and not is_list(value, str):
            raise RotQuantError(f"{file}: {field} is {value!r}, not a list of names or a pattern")
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is not None and type(layers) is not int and not is_list(layers, int):
        raise RotQuantError(f"{file}: layers_to_transform is {layers!r}, not a list of numbers")
    if patterns and not isinstance(patterns, str) and not is_list(patterns, str):
        raise RotQuantError(f"{file}: layers_pattern is {patterns!r}, not a list of names")
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        compiled(file, "layers_pattern", pattern)
    if isinstance(targets, str) and targets != "all-linear" and (layers is not None or patterns):
        raise RotQuantError(f"{file}: layers_to_transform and layers_pattern go with a list in target_modules only")
    if patterns and layers is None:
        raise RotQuantError(f"{file}: layers_pattern is {patterns!r} without layers_to_transform")


def is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)


def compiled(file: Path, field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise RotQuantError(f"{file}: {field}: {pattern!r} is not a regular expression ({error})") from error


def pattern_of(config: dict[str, Any], field: str, linear: str, default: Any) -> Any:
    """PEFT's rule: the first key that is a suffix of the name, from a point on."""
    matching = (value for key, value in (config.get(field) or {}).items() if re.match(rf"(.*\.)?({key})$", linear))
    return next(matching, default)


def targeted(config: dict[str, Any], linear: str) -> bool:
    """Whether PEFT puts factors onto a linear of this full name."""

    def names(field: str) -> bool:
        value = config.get(field) or []
        if isinstance(value, str):
            return value == "all-linear" or re.fullmatch(value, linear) is not None
        return any(linear == name or linear.endswith(f".{name}") for name in value)

    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or "[^.]*"
    if not names("target_modules") or names("exclude_modules"):
        return False
    if layers is None or layers == []:
        return True
    indices = (re.match(rf".*\.{p}\.(\d+)\.", linear) for p in ([patterns] if isinstance(patterns, str) else patterns))
    index = next((int(found[1]) for found in indices if found), None)
    return index in ([layers] if isinstance(layers, int) else layers)


def with_own_names(config: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The config that says of linears by their own names what this one says of them by the adapter's names."""
    if all(own == name for own, name in names.items()):
        return config
    patterns = {
        field: {re.escape(own): pattern_of(config, field, name, config[default]) for own, name in names.items()}
        for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    }
    chosen = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    return config | chosen | patterns | {"target_modules": list(names)}


# ---- the factors --------------------------------------------------------------------------------------------------


def read_factors(file: Path, config: dict[str, Any], arch: Architecture) -> tuple[dict[str, Tensor], dict[str, str]]:
    """adapter_model.safetensors by name, checked against the config and the model; names of linears: own -> stored."""
    if not file.is_file():
        found = [p.name for p in sorted(file.parent.glob("adapter_model.*"))]
        hint = f"; {found[0]} may run code when it is read: save the adapter as safetensors" if found else ""
        raise RotQuantError(f"{file}: no such file{hint}")
    try:
        stored = load_file(file)
    except (SafetensorError, OSError) as error:
        raise RotQuantError(f"{file}: truncated or not a safetensors file ({error})") from error
    shapes, factors, names = arch.adaptable(), {}, {}
    for name, tensor in sorted(stored.items()):
        linear, factor = split_name(name)
        own = own_name(linear)
        if own not in shapes:
            raise RotQuantError(f"{file}: {name} {reason(name, own, arch)}")
        if not targeted(config, linear):
            raise RotQuantError(f"{file}: {name} belongs to a linear that {CONFIG} does not target")
        rank = pattern_of(config, "rank_pattern", linear, config["r"])
        outputs, inputs = shapes[own]
        wanted = [rank, inputs] if factor == "lora_A" else [outputs, rank]
        if list(tensor.shape) != wanted:
            raise RotQuantError(
                f"{file}: {name} has shape {list(tensor.shape)}, {CONFIG} and the model ask for {wanted}: is it an"
                " adapter of another model?"
            )
        if tensor.dtype not in DTYPES or not torch.isfinite(tensor).all():
            raise RotQuantError(f"{file}: {name} holds NaN or infinite values, or has dtype {tensor.dtype}")
        if f"{own}.{factor}" in factors:
            raise RotQuantError(f"{file}: {own}.{factor} is there twice")
        factors[f"{own}.{factor}"], names[own] = tensor, linear
    for name in factors:
        linear, _, factor = name.rpartition(".")
        other = FACTORS[factor == "lora_A"]
        if f"{linear}.{other}" not in factors:
            raise RotQuantError(f"{file}: {PREFIX}{names[linear]}.{other}.weight is missing")
    if not factors:
        raise RotQuantError(f"{file}: holds no tensor")
    return factors, names


def split_name(name: str) -> tuple[str, str]:
    """Full name of the linear and which factor; ("", "") for a tensor that is no factor."""
    found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.(lora_[AB])\.weight", name)
    return (found[1], found[2]) if found else ("", "")


def reason(name: str, linear: str, arch: Architecture) -> str:
    """Why a tensor is not taken."""
    if linear.startswith(arch.left):
        return "adapts a part of the model that is left out: train with LoRA on its language model alone"
    for part, what in (
        ("embed_tokens", "adapts the embeddings"),
        ("lm_head", "adapts the output layer"),
        ("norm", "adapts a norm"),
        ("lora_magnitude_vector", "is DoRA's magnitude"),
    ):
        if part in name:
            return f"{what}, which is not turned: train with LoRA on the linears of decoder layers alone"
    return "is not a factor of a linear of this model: is it an adapter of another one?"
