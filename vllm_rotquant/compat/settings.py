"""What vLLM was asked to serve: its configuration while a model is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform

from vllm_rotquant.features import Asked
from vllm_rotquant.origin import Origin


def vllm_config() -> Any:
    """vLLM's configuration of the model that is being built or loaded, and of its server."""
    return get_current_vllm_config()


def origin() -> Callable[[], Origin]:
    """Where the weights of the model being built come from; a reload from elsewhere changes the answer.

    To be called while a model is loaded.
    """
    config = get_current_vllm_config()
    return lambda: origin_of(config)


def origin_of(config: Any) -> Origin:
    """Where the checkpoint is that a `VllmConfig` serves."""
    model = config.model_config
    return Origin(model.model, model.revision, config.load_config.download_dir)


def model_settings() -> Any:
    """vLLM's settings of the model that is being built: `max_model_len`, `dtype` and what `own_config` reads."""
    return get_current_vllm_config().model_config


def own_config(settings: Any) -> PreTrainedConfig:
    """transformers' own reading of the model's config.json, with the user's --hf-overrides; vLLM edits its copy.

    Args:
        settings: from `model_settings`.
    """
    if callable(settings.hf_overrides):
        return settings.hf_config
    folder = getattr(settings, "hf_config_path", None) or settings.model
    data, _ = PreTrainedConfig.get_config_dict(folder, revision=settings.revision)
    for key, value in settings.hf_overrides.items():
        both = isinstance(value, dict) and isinstance(data.get(key), dict)
        data[key] = data[key] | value if both else value
    return CONFIG_MAPPING[data["model_type"]].from_dict(data)


def asked() -> Asked:
    """What the configuration asks of the model that is being built."""
    config = get_current_vllm_config()
    model, speculative, transfer = config.model_config, config.speculative_config, config.kv_transfer_config
    draft = speculative.draft_model_config if speculative else None
    weights = getattr(config, "weight_transfer_config", None)
    return Asked(
        speculative=speculative.method if speculative else None,
        draft=draft.hf_config.to_dict() if draft else {},
        pools=model.runner_type == "pooling",
        prompt_embeds=bool(model.enable_prompt_embeds),
        classifies=model.runner_type == "pooling" and model.convert_type == "classify",
        classifier_tokens=getattr(model.hf_config, "classifier_from_token", None) is not None,
        load_format=str(config.load_config.load_format),
        weight_transfer=weights.backend if weights else None,
        kv_connector=transfer.kv_connector if transfer else None,
        is_draft=model.runner_type == "draft",
    )


def additional_config(key: str) -> Any:
    """A key of --additional-config, None where there is none; to be asked while a model is built."""
    extra = get_current_vllm_config().additional_config
    return extra.get(key) if isinstance(extra, dict) else None


def tell_compiled_graphs_apart(key: str, value: Any) -> None:
    """Makes `value`, which decides how a model runs, part of what vLLM's cache of compiled graphs goes by.

    To be called while a model is loaded.
    """
    extra = get_current_vllm_config().additional_config
    if isinstance(extra, dict):
        extra[key] = value


def lora_is_on() -> bool:
    """True under --enable-lora; to be asked while a model is built."""
    return get_current_vllm_config().lora_config is not None


def weights_are_dummy() -> bool:
    """True under --load-format dummy, which reads no file; to be asked while a model is built."""
    return get_current_vllm_config().load_config.load_format == "dummy"


def holds_some_layers() -> bool:
    """Whether the model that is being loaded is one stage of a pipeline."""
    return get_current_vllm_config().parallel_config.pipeline_parallel_size > 1


def on_cpu() -> bool:
    """True where models run on the CPU."""
    return bool(current_platform.is_cpu())


def device_type() -> str:
    """The device that vLLM serves on, in torch's words."""
    return str(current_platform.device_type)


def let_attention_use_amx() -> None:
    """Asks Linux for the tile registers, which vLLM's attention in bfloat16 uses on CPUs with AMX.

    vLLM leaves that to the first matrix product of oneDNN, and a quantized model has none.
    """
    if current_platform.is_cpu():
        getattr(torch.cpu, "_init_amx", bool)()
