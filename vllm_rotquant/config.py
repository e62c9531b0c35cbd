"""Claims a checkpoint, parses what it asks for and gives each layer its method; refuses the rest by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from rotquant.basis.sidecar import Basis
from rotquant.checkpoint.experts_format import experts_format
from rotquant.checkpoint.format import CheckpointFormat, LinearFormat, claims, matches
from rotquant.checkpoint.targets import check_targets
from rotquant.common.large_pages import ask_torch
from rotquant.errors import RotQuantError
from rotquant.models import Architecture, describe, head_size, is_known
from rotquant.models.config_fields import check_off
from rotquant_kernels.formats import KVFormat
from vllm_rotquant import boundary, compat, pages, settings
from vllm_rotquant.adapters import basis_of
from vllm_rotquant.collector import Collector
from vllm_rotquant.environment import refuse_batch_invariance
from vllm_rotquant.experts import RotQuantExpertsMethod
from vllm_rotquant.features import Checkpoint, check
from vllm_rotquant.key_feedback import Keys
from vllm_rotquant.kv_cache import KVCacheMethod
from vllm_rotquant.linear import RotQuantLinearMethod
from vllm_rotquant.names import Names, parts_of
from vllm_rotquant.startup import Startup
from vllm_rotquant.versions import version
from vllm_rotquant.windows import Windows

# vLLM writes these two into the dict of a compressed-tensors checkpoint.
VLLM_KEYS = ("total_num_heads", "total_num_kv_heads")


class RotQuantConfig(QuantizationConfig):
    """vLLM's view of a rotquant checkpoint.

    Made in the server's first process and sent to the workers as a pickle. `format` is there once
    vLLM has called `maybe_update_config` with the whole config.json.
    """

    restored: ClassVar[Callable[..., Any]]  # makes one of a pickle; set by `vllm_rotquant`, which registers the class

    def __init__(self, quantization_config: dict[str, Any] | None = None) -> None:
        super().__init__()
        if quantization_config is None:  # vLLM's call where config.json has no quantization_config
            raise RotQuantError(
                "--quantization rotquant: this checkpoint is not quantized (no quantization_config in config.json); "
                "make one with `rotquant quantize MODEL -o OUT`"
            )
        kept = {k: v for k, v in quantization_config.items() if k not in VLLM_KEYS}
        self.quantization_config: dict[str, Any] = copy.deepcopy(kept)
        self.extension: dict[str, Any] = {}
        self.head_dim = 0
        self.format: CheckpointFormat | None = None
        self.names: Names | None = None
        self.arch: Architecture | None = None  # once a layer has asked for it, of a model that is known
        self.windows: Windows | None = None
        self.startup = Startup()
        self.defaults = settings.from_environment()  # of the first process: workers have other variables

    def __reduce__(self) -> tuple[Any, ...]:
        # Plain data: `vllm_rotquant.restored` looks at it before anything of rotquant is imported. The start is of one
        # process.
        kept = {k: v for k, v in self.__dict__.items() if k not in ("startup", "format", "names", "arch", "windows")}
        return self.restored, (version(), kept)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RotQuantConfig:
        """The config of a pickle; see `vllm_rotquant.restored`."""
        config = cls.__new__(cls)
        config.__dict__ |= state
        config.startup, config.format, config.names = Startup(), None, None
        config.arch, config.windows = None, None
        if config.head_dim:  # vLLM has called `maybe_update_config`
            config._parse()
        return config

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any] | None, user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """ "rotquant" for a compressed-tensors W4A4 checkpoint, with or without `--quantization rotquant`."""
        if claims(hf_quant_cfg, getattr(hf_config, "rotquant", None)):
            if user_quant == "compressed-tensors":
                compat.logger.warning(
                    "--quantization compressed-tensors: vLLM's own path runs this W4A4 checkpoint with 16-bit "
                    "activations and no online rotation. Leave the flag out to run it with rotquant."
                )
                return None
            return "rotquant"
        if user_quant == "rotquant":
            found = (hf_quant_cfg or {}).get("quant_method", "none")
            raise RotQuantError(
                f"--quantization rotquant: this checkpoint (quant_method {found!r}) has no group of 4-bit integer "
                "weights with integer input_activations in quantization_config.config_groups; leave the flag out, "
                "or make a checkpoint with `rotquant quantize MODEL -o OUT`"
            )
        return None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RotQuantConfig:
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Parses the checkpoint's format; called by vLLM right after `from_config`, in the first process.

        Raises:
            RotQuantError: naming the field that this build does not run.
        """
        if hf_config is None:
            raise RotQuantError("vLLM did not pass the model's config.json to rotquant: this vLLM is not supported")
        refuse_batch_invariance()
        if compat.on_cpu():
            ask_torch()
        text = hf_config.get_text_config()
        self.head_dim = head_size(text)
        chunks = "dual_chunk_attention_config"  # vLLM has an attention of its own for it, of any architecture
        check_off("config.json", chunks, {chunks: getattr(text, chunks, None)})
        self.extension = copy.deepcopy(getattr(hf_config, "rotquant", {}))
        checkpoint = self._parse()
        if is_known(hf_config):  # their module names are known
            check_targets(checkpoint, describe(hf_config))

    def _parse(self) -> CheckpointFormat:
        self.format = CheckpointFormat(self.quantization_config, self.extension, self.head_dim)
        self.names = Names(self.format)
        return self.format

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Renames the modules that the format names, for models that vLLM builds under other names."""
        config, extension = self.quantization_config, self.extension
        transforms = (config.get("transform_config") or {}).get("config_groups", {}).values()
        lists = [
            (config, "ignore"),
            *((group, "targets") for group in config["config_groups"].values()),
            *((place, key) for group in transforms for place in group["apply"] for key in ("targets", "ignore")),
            *((entry, "targets") for key in ("input_transforms", "low_rank") for entry in extension.get(key, [])),
        ]
        dicts = [(extension, "activation_clip"), (extension.get("kv_clip", {}), "layers")]
        for rename, places in ((hf_to_vllm_mapper.apply_list, lists), (hf_to_vllm_mapper.apply_dict, dicts)):
            for owner, key in places:
                if owner.get(key):
                    owner[key] = rename(owner[key])
        self._parse()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer; vLLM calls it several times a layer."""
        assert self.format is not None
        assert self.names is not None
        self.startup.begin(self.defaults)
        self._begin()
        collector = self.startup.collector
        collector.kv4 = self.format.kv is not None
        if isinstance(layer, compat.RoutedExperts):
            return self._experts(layer, self.names.own(prefix))
        if isinstance(layer, compat.AttentionLayerBase):
            if not isinstance(layer, compat.Attention):
                raise RotQuantError(f"{prefix}: this build of rotquant does not run {type(layer).__name__} layers")
            name = self.names.own(prefix.removesuffix(".attn"))
            self.names.built.add(name)
            kv = self.format.attention(name)
            window = self._windows().of(name, layer.sliding_window, ours=kv is not None)
            if kv is None:
                compat.let_attention_use_amx()
            own = self.arch.attentions.get(name) if self.arch else None
            cap, size = (own.cap, own.head_dim) if own else (None, self.head_dim)
            blocks = self._blocks(kv).get(name, 1) if kv else 1
            if kv is None:
                return None
            maker = self.startup.key_makers.get(name)
            if kv.feedback and maker is None:
                raise RotQuantError(f"{prefix}: rotquant.key_feedback: the linear that makes its keys is not quantized")
            return KVCacheMethod(self, kv, prefix, size, window, cap, blocks, collector, maker)
        if isinstance(layer, compat.LinearBase | compat.ParallelLMHead):
            linear = self.linear_format(prefix)
            if linear is not None:
                keys = self._keys(layer, prefix)
                return RotQuantLinearMethod(linear, prefix, collector, len(self._parts(prefix)), keys)
            collector.unquantized.add(prefix)
            return compat.UnquantizedLinearMethod() if isinstance(layer, compat.LinearBase) else Embedding(collector)
        if isinstance(layer, compat.VocabParallelEmbedding):
            name = self.names.own(prefix)
            self.names.built.add(name)
            targets = [t for scheme in self.format.schemes for t in scheme.targets]
            if any(matches(name, target, "Embedding") for target in targets):
                raise RotQuantError(f"{prefix}: this build of rotquant does not run quantized embeddings")
            return Embedding(collector)
        return None

    def _experts(self, layer: Any, name: str) -> QuantizeMethodBase:
        """The method of the experts of a layer, `model.layers.3.mlp.experts` or the like.

        Raises:
            RotQuantError: what rotquant does not run, or experts of an architecture that it does not know.
        """
        assert self.format is not None
        assert self.names is not None
        config = self._read()
        for index, block in (self.arch.mixtures if self.arch else {}).items():
            prefix = self.arch.layer_prefix(index) if self.arch else ""
            if name == f"{prefix}{block.files}.experts":
                self.names.built.update(prefix + part for m in block.routed for part in (m.gate, m.up, m.down))
                form = experts_format(self.format, prefix, block)
                return RotQuantExpertsMethod(layer, block, form, name, self.startup.collector)
        classes = ", ".join(config.architectures or ["this model"])
        raise RotQuantError(f"{name}: this build of rotquant does not run the experts of {classes}")

    def _read(self) -> PreTrainedConfig:
        """transformers' own reading of config.json, and with it `arch`."""
        config = compat.own_config(compat.model_settings())
        self.arch = self.arch or (describe(config) if is_known(config) else None)
        return config

    def _blocks(self, kv: KVFormat) -> dict[str, int]:
        """Blocks of a page, by attention module."""
        attentions = self.arch.attentions if self.arch else {}
        if len({(own.head_dim, own.kv_heads) for own in attentions.values()}) < 2:
            return dict.fromkeys(attentions, 1)
        padded = compat.head_major_layouts() is not None  # since there is a choice of layouts
        return pages.by_layer(attentions, kv, compat.get_tensor_model_parallel_world_size(), padded=padded)

    def _windows(self) -> Windows:
        if self.windows is None:
            self._read()
            self.windows = Windows(self.arch, compat.model_settings().max_model_len)
        return self.windows

    def _keys(self, layer: torch.nn.Module, prefix: str) -> Keys | None:
        """The keys that a linear makes, None where it makes none that are rounded with error feedback.

        Raises:
            RotQuantError: an architecture that rotquant does not know.
        """
        assert self.format is not None
        if not (self.format.kv and self.format.kv.feedback):
            return None
        config = self._read()
        if self.arch is None:
            classes = ", ".join(config.architectures or ["this model"])
            raise RotQuantError(f"{prefix}: this build of rotquant does not run rotquant.key_feedback of {classes}")
        parts = self._parts(prefix)
        for name, maker in self.arch.key_makers.items():
            if maker in parts:
                self.startup.key_makers[name] = layer
                own = self.arch.attentions[name]
                return Keys(own.kv_heads, own.head_dim)
        return None

    def _begin(self) -> None:
        """Before the first layer of a model: refuses what cannot be served, and notes what to do once it is loaded."""
        if self.startup.when_loaded is not None or self.startup.collector.done:
            return
        assert self.format is not None
        head = self.format.linear("lm_head")
        stated = self.format.extension.basis
        asked = compat.asked()
        checkpoint = Checkpoint(
            rotated=lambda: self.basis() is not None,
            basis_sha256=stated.sha256 if stated else None,
            kv4=self.format.kv is not None,
            packed_head=head is not None,
        )
        check(asked, checkpoint)
        self.startup.model = "the draft model" if asked.is_draft else ""
        self.startup.when_loaded = self._loaded

    def _loaded(self, model: Any) -> None:
        """Holds what config.json says against what was built, and puts the boundary's turns in."""
        assert self.names is not None
        layers = compat.vllm_config().model_config.hf_text_config.num_hidden_layers
        self.names.check_all_built(compat.holds_some_layers(), layers)
        asked = compat.asked()
        basis = self.basis() if asked.pools or asked.prompt_embeds else None
        if basis is None:
            return
        if asked.pools and not asked.classifier_tokens:  # whose weights are rows of lm_head, and so turned as well
            boundary.restore_outputs(model, basis)
        if asked.prompt_embeds:
            boundary.turn_inputs(model, basis)

    def basis(self) -> Basis | None:
        """What turns between the original and this checkpoint, None where the residual stream is not rotated.

        Raises:
            RotQuantError: it is, and the checkpoint does not say how.
        """
        assert self.format is not None
        extension = self.format.extension
        rotations = (extension.provenance.get("recipe") or {}).get("rotations") or {}
        if extension.basis is None and rotations.get("r1", "none") == "none":
            return None
        found = basis_of(compat.vllm_config())
        return None if found.matrix is None else found

    def _parts(self, prefix: str) -> list[str]:
        """The checkpoint's layers that vLLM runs as the one of this name."""
        assert self.names is not None
        return parts_of(self.names.own(prefix), self.packed_modules_mapping)

    def linear_format(self, prefix: str) -> LinearFormat | None:
        """Format of the layer `prefix`, which may be several checkpoint layers in one (qkv_proj, gate_up_proj).

        Raises:
            RotQuantError: where the parts of a fused layer differ.
        """
        assert self.format is not None
        assert self.names is not None
        parts = self._parts(prefix)
        self.names.built.update(parts)
        formats = {part: self.format.linear(part) for part in parts}
        first = formats[parts[0]]
        for part, other in formats.items():
            if other != first:
                raise RotQuantError(
                    f"{prefix}: vLLM runs {', '.join(parts)} as one layer, but their formats differ: "
                    f"{parts[0]} has {first}, {part} has {other}"
                )
        return first

    def get_name(self) -> Any:
        return "rotquant"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []


class Embedding(compat.UnquantizedEmbeddingMethod):
    """vLLM's own method. A pipeline stage may hold an embedding or lm_head and no layer of rotquant; the proof must
    come to its end there as well, since the other ranks wait for its word."""

    def __init__(self, collector: Collector) -> None:
        super().__init__()
        self.waiting = collector  # not `collector`: by that name a reload knows the layers of rotquant

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        self.waiting.loaded(layer)
