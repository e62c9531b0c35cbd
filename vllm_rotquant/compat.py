"""Every vLLM name that the plugin uses and that vLLM does not promise to keep. vLLM 0.28 to 0.33.

When a new vLLM moves something, this is the file to change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    get_world_group,
    model_parallel_is_initialized,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo
from vllm.model_executor.models.utils import PPMissingLayer, StageMissingLayer
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.worker.worker_base import WorkerWrapperBase

from vllm_rotquant.features import Asked

__all__ = [
    "HAS_TRITON",
    "MISSING_LAYERS",
    "Attention",
    "AttentionBackend",
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionLayerBase",
    "AttentionMetadataBuilder",
    "AttentionSpec",
    "BaseKVCacheMethod",
    "BasevLLMParameter",
    "ChannelQuantScaleParameter",
    "CommonAttentionMetadata",
    "FusedMoEMethodBase",
    "GroupQuantScaleParameter",
    "LinearBase",
    "LinearMethodBase",
    "MultipleOf",
    "PackedvLLMParameter",
    "ParallelLMHead",
    "RoutedExperts",
    "UnquantizedEmbeddingMethod",
    "UnquantizedLinearMethod",
    "VocabParallelEmbedding",
    "additional_config",
    "asked",
    "attention_refusals",
    "built_layers",
    "checkpoint",
    "checkpoint_file",
    "checkpoint_folder",
    "decoder_output",
    "device_type",
    "experts_here",
    "experts_refusals",
    "experts_share",
    "final_norm_holder",
    "from_all",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "has_final_norm",
    "head_major_layouts",
    "holds_some_layers",
    "is_decoder",
    "let_attention_use_amx",
    "load_adapters_with",
    "logger",
    "logits_changed",
    "lora_is_on",
    "model_settings",
    "norm_before",
    "on_cpu",
    "opaque_pages",
    "outermost",
    "own_config",
    "pipeline_stage",
    "ranks_of_model",
    "register_weight_loader_v2_supported_method",
    "rotary_rows",
    "routed",
    "silu_mul_before",
    "stays_out_of_reloads",
    "tell_compiled_graphs_apart",
    "turn_prompt_embeds",
    "vllm_config",
    "wait_for_all",
    "watch_reloads",
    "weights_are_dummy",
]

# Models whose forward is known. An MLP runs down_proj(act_fn(gate_up_proj(x))). A decoder layer passes the output of
# input_layernorm to its attention, which runs qkv_proj on it, and that of post_attention_layernorm to its MLP; nothing
# else reads them.
MODELS = "vllm.model_executor.models."
MLPS = ("granite.GraniteMLP", "llama.LlamaMLP", "mistral.MistralMLP", "qwen2.Qwen2MLP")
ATTENTIONS = (
    "granite.GraniteAttention",
    "llama.LlamaAttention",
    "mistral.MistralAttention",
    "qwen2.Qwen2Attention",
    "qwen3.Qwen3Attention",
)
STREAMS = ("granite.GraniteDecoderLayer",)  # those whose blocks add to the residual stream themselves
DECODERS = (
    "granite.GraniteDecoderLayer",
    "llama.LlamaDecoderLayer",
    "mistral.MistralDecoderLayer",
    "qwen2.Qwen2DecoderLayer",
    "qwen3.Qwen3DecoderLayer",
)
# Models that end in the RMSNorm `norm`, which everything but the next pipeline stage reads.
STACKS = ("granite.GraniteModel", "llama.LlamaModel", "mistral.MistralModel", "qwen2.Qwen2Model", "qwen3.Qwen3Model")

# What stands in a pipeline stage for modules of the others.
MISSING_LAYERS = (PPMissingLayer, StageMissingLayer)

# vLLM shows only the loggers below its own name.
logger: Any = init_logger("vllm.rotquant")


def opaque_pages(spec: AttentionSpec, token_bytes: int) -> AttentionSpec:
    """The layer's cache spec with `token_bytes` bytes for each (token, KV head) instead of K and V numbers."""
    return replace(spec, dtype=torch.uint8, state_content_bytes=token_bytes)


def head_major_layouts() -> Sequence[Any] | None:
    """The cache layouts that keep a (block, head) plane of a page contiguous; None before vLLM had a choice."""
    try:
        from vllm.v1.kv_cache_interface import KVCacheLayout
    except ImportError:
        return None
    return (KVCacheLayout.LBHNC,)


def known(module: Any, names: Sequence[str]) -> bool:
    """Whether a module is of exactly one of these classes of vLLM's models."""
    return f"{type(module).__module__}.{type(module).__qualname__}" in [MODELS + name for name in names]


def silu_mul_before(layer: Any, mlp: Any) -> bool:
    """Whether `layer` is the down_proj of an MLP and reads silu(gate) * up, which its act_fn makes."""
    return known(mlp, MLPS) and mlp.down_proj is layer and type(mlp.act_fn) is SiluAndMul


def norm_before(layer: Any, decoder: Any) -> str | None:
    """Name of the RMSNorm in a decoder layer whose output `layer` reads and nothing else does."""
    if not known(decoder, DECODERS) or getattr(decoder, "ada_rms_norm_t_cond", None) is not None:
        return None
    attention, mlp = decoder.self_attn, decoder.mlp
    if known(attention, ATTENTIONS) and attention.qkv_proj is layer:
        name = "input_layernorm"
    elif known(mlp, MLPS) and mlp.gate_up_proj is layer:
        name = "post_attention_layernorm"
    else:
        return None
    norm = getattr(decoder, name)
    plain = type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None
    return name if plain else None


def tell_compiled_graphs_apart(key: str, value: Any) -> None:
    """Makes `value`, which decides how a model runs, part of what vLLM's cache of compiled graphs goes by.

    To be called while a model is loaded.
    """
    extra = get_current_vllm_config().additional_config
    if isinstance(extra, dict):
        extra[key] = value


def built_layers(vllm_config: Any, names: Sequence[str]) -> list[Any]:
    """The attention layers of these names in the model that this process has built."""
    return [vllm_config.compilation_config.static_forward_context[name] for name in names]


def additional_config(key: str) -> Any:
    """A key of --additional-config, None where there is none; to be asked while a model is built."""
    extra = get_current_vllm_config().additional_config
    return extra.get(key) if isinstance(extra, dict) else None


def checkpoint_folder() -> Callable[[], Path | None]:
    """Finds the folder of the model that is being built, once it is loaded; None where vLLM keeps it elsewhere."""
    config = get_current_vllm_config()
    model, revision = config.model_config.model, config.model_config.revision
    cache = config.load_config.download_dir

    def find() -> Path | None:
        from huggingface_hub import snapshot_download

        if Path(model).is_dir():
            return Path(model)
        try:
            return Path(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))
        except Exception:  # it is not of the hub, or not in its cache
            return None

    return find


def device_type() -> str:
    """The device that vLLM serves on, in torch's words."""
    return str(current_platform.device_type)


def ranks_of_model() -> Any:
    """The group of all ranks that load the model that is being built, None where this is the only one.

    The last pipeline stage alone loads a draft.
    """
    if not torch.distributed.is_initialized() or not model_parallel_is_initialized():
        return None
    draft = get_current_vllm_config().model_config.runner_type == "draft"
    group = get_tp_group() if draft else get_world_group()
    return group if group.world_size > 1 else None


def wait_for_all(group: Any, seconds: float) -> None:
    """Returns when all ranks have called it; raises RuntimeError, naming a missing one where it is known, if not.

    Under VLLM_DISTRIBUTED_USE_SPLIT_GROUP, whose groups have no such barrier, `from_all` is the first to wait.
    """
    if torch.distributed.get_backend(group.cpu_group) == "gloo":
        torch.distributed.monitored_barrier(group.cpu_group, timedelta(seconds=seconds), wait_all_ranks=True)


def from_all(group: Any, mine: Any) -> list[Any]:
    """The objects that the ranks of a group have brought, by rank."""
    answers: list[Any] = [None] * group.world_size
    with torch.device("cpu"):  # vLLM loads under its device
        torch.distributed.all_gather_object(answers, mine, group=group.cpu_group)
    return answers


def pipeline_stage() -> tuple[int, int]:
    """Pipeline stage of this rank and how many there are."""
    group = get_pp_group()
    return group.rank_in_group, group.world_size


def checkpoint() -> Callable[[], str]:
    """Where the weights of the model being built come from; a reload from elsewhere changes the answer.

    To be called while a model is loaded.
    """
    config = get_current_vllm_config().model_config
    return lambda: str(config.model)


def lora_is_on() -> bool:
    """True under --enable-lora; to be asked while a model is built."""
    return get_current_vllm_config().lora_config is not None


def vllm_config() -> Any:
    """vLLM's configuration of the model that is being built or loaded, and of its server."""
    return get_current_vllm_config()


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


def holds_some_layers() -> bool:
    """Whether the model that is being loaded is one stage of a pipeline."""
    return get_current_vllm_config().parallel_config.pipeline_parallel_size > 1


def final_norm_holder(model: Any) -> Any:
    """The module of a causal language model whose `norm` is the final RMSNorm, None where that is not known."""
    return model.model if known(getattr(model, "model", None), STACKS) else None


def turn_prompt_embeds(model: Any, turn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """From now on, prompt embeddings [T, hidden] of requests for this loaded model pass through `turn`.

    They come to every kind of worker in `scheduler_output`, before a model runner, V1 or V2, mixes rows.
    """
    model.turn_prompt_embeds = turn
    worker: Any = WorkerWrapperBase
    execute = worker.execute_model
    if hasattr(execute, "__wrapped__"):
        return

    @functools.wraps(execute)
    def execute_model(wrapper: Any, scheduler_output: Any) -> Any:
        requests = [r for r in scheduler_output.scheduled_new_reqs if r.prompt_embeds is not None]
        turn = getattr(wrapper.worker.get_model(), "turn_prompt_embeds", None) if requests else None
        if turn is not None:
            for request in requests:
                request.prompt_embeds = turn(request.prompt_embeds)
        return execute(wrapper, scheduler_output)

    worker.execute_model = execute_model


def let_attention_use_amx() -> None:
    """Asks Linux for the tile registers, which vLLM's attention in bfloat16 uses on CPUs with AMX.

    vLLM leaves that to the first matrix product of oneDNN, and a quantized model has none.
    """
    if current_platform.is_cpu():
        getattr(torch.cpu, "_init_amx", bool)()


def load_adapters_with(reader: Callable[[Any], Callable[[Path, int], dict[str, torch.Tensor]] | None]) -> None:
    """Lets rotquant read the LoRA adapters of its models, at start and at run time; call it while a model is built.

    vLLM makes a manager of adapters for each model after that has been built, and asks it to load each adapter.

    Args:
        reader: asked once for each model. `reader(vllm_config)` is None where vLLM shall read the adapters itself, else
            `read(folder, max_rank)`, which gives an adapter's tensors under PEFT's names, their scaling in `lora_B`.
    """
    from vllm.lora.utils import get_adapter_absolute_path
    from vllm.lora.worker_manager import WorkerLoRAManager

    manager_class: Any = WorkerLoRAManager
    if hasattr(manager_class, "rotquant_read"):
        return
    make, load = manager_class.__init__, manager_class._load_adapter

    @functools.wraps(make)
    def made(manager: Any, vllm_config: Any, *arguments: Any, **options: Any) -> None:
        make(manager, vllm_config, *arguments, **options)
        manager.rotquant_read = reader(vllm_config)

    @functools.wraps(load)
    def loaded(manager: Any, request: Any) -> Any:
        folder, read = Path(get_adapter_absolute_path(request.lora_path)), manager.rotquant_read
        if read is None or not folder.is_dir():  # vLLM has its own words for an adapter that is not there
            return load(manager, request)
        tensors, kind = read(folder, manager.lora_config.max_lora_rank), manager._lora_model_cls
        manager._lora_model_cls = _holding(kind, tensors)
        try:
            return load(manager, request)
        finally:
            manager._lora_model_cls = kind

    manager_class.rotquant_read, manager_class.__init__, manager_class._load_adapter = None, made, loaded


def _holding(kind: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """vLLM's class of a loaded adapter, holding these tensors whatever the file has; `lora_B` scaled already."""
    taken = ("device", "dtype", "model_vocab_size", "weights_mapper", "skip_prefixes")

    class Held(kind):  # type: ignore[misc]
        @classmethod
        def from_local_checkpoint(
            cls, folder: str, expected: set[str], peft_helper: Any, *, lora_model_id: int, **options: Any
        ) -> Any:
            given = {name: options[name] for name in taken}
            adapter = kind.from_lora_tensors(lora_model_id, tensors, peft_helper, **given)
            for weights in adapter.loras.values():
                weights.scaling = 1.0
            return adapter

    return Held


def checkpoint_file(config: Any, name: str) -> Path:
    """Local path of a file of the checkpoint that a `VllmConfig` serves; from the hub where the model is."""
    model = config.model_config.model
    if Path(model).is_dir():
        return Path(model) / name
    from huggingface_hub import hf_hub_download

    where = {"revision": config.model_config.revision, "cache_dir": config.load_config.download_dir}
    return Path(hf_hub_download(model, name, **where))


def on_cpu() -> bool:
    """True where models run on the CPU."""
    return bool(current_platform.is_cpu())


def weights_are_dummy() -> bool:
    """True under --load-format dummy, which reads no file; to be asked while a model is built."""
    return get_current_vllm_config().load_config.load_format == "dummy"


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


def rotary_rows(rotary: Any) -> int | None:
    """How many positions a rotary embedding has a table for; None where it computes them."""
    if (table := getattr(rotary, "long_short_cos_sin_cache", None)) is not None:
        short = rotary.original_max_position_embeddings
        return len(table) - short if rotary.use_long_rope else short
    table = getattr(rotary, "cos_sin_cache", None)
    return None if table is None else len(table)


def is_decoder(module: Any) -> bool:
    """Whether a module is a decoder layer that `decoder_output` runs, with what it calls."""
    if not known(module, DECODERS) or getattr(module, "ada_rms_norm_t_cond", None) is not None:
        return False
    return known(module.self_attn, ATTENTIONS) and known(module.mlp, MLPS)


def decoder_output(decoder: Any, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The residual stream [T, hidden] behind a decoder layer that `is_decoder`."""
    if known(decoder, STREAMS):
        return decoder(positions, hidden)
    out, residual = decoder(positions, hidden, None)
    return out + residual


def has_final_norm(module: Any) -> bool:
    """Whether a module is a model up to lm_head that ends with an RMSNorm on this rank."""
    return hasattr(module, "embed_tokens") and type(getattr(module, "norm", None)) is RMSNorm


def logits_changed(model: Any, divisor: float) -> str:
    """What a causal language model does to its logits beyond W h / divisor; "" for nothing."""
    logits = getattr(model, "logits_processor", None)
    if logits is None:
        return ""
    scale, cap = getattr(logits, "scale", 1.0), getattr(logits, "soft_cap", None)
    if scale != 1 / divisor:
        return f"multiplies logits by {scale} (logit_scale)"
    return f"caps logits at {cap}" if cap else ""


class _StaysOut(LayerReloadingInfo):
    """What vLLM knows about a module in a reload: taken apart already, nothing to process."""

    def can_load(self) -> bool:
        return True

    def reset(self) -> None:
        pass


def stays_out_of_reloads(module: torch.nn.Module) -> None:
    """Has vLLM's reload of weights pass over the module: its tensors stay and are loaded by their own loaders."""
    LAYERWISE_INFO[module] = _StaysOut(({}, {}), torch.device("cpu"), load_numel=1, load_numel_total=1)


def outermost(module: torch.nn.Module) -> torch.nn.Module | None:
    """The model that a module is part of; vLLM notes all modules of a model, it first, before it loads them."""
    return next((model for model in LAYERWISE_INFO if any(part is module for part in model.modules())), None)


def watch_reloads(model: torch.nn.Module, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Has vLLM call `begin` before it takes a model apart to reload its weights, and `end` when it is done.

    vLLM goes through all modules twice, the model itself first: to ask whether they are taken apart already, and to
    put them together, attention last.
    """

    class First(LayerReloadingInfo):
        def can_load(self) -> bool:
            if not super().can_load():
                begin()
            return super().can_load()

    class Last(LayerReloadingInfo):
        def reset(self) -> None:
            super().reset()
            end()

    attention = [module for module in model.modules() if isinstance(module, AttentionLayerBase)]
    for module, kind in ((model, First), (attention[-1], Last)) if attention else ():
        known = LAYERWISE_INFO[module]
        LAYERWISE_INFO[module] = kind(known.restore_metadata, known.restore_device)


def experts_refusals(layer: RoutedExperts, moe: Any) -> dict[str, bool]:
    """What the experts of a layer, or a server of them, ask for beyond a weighted sum of gated MLPs."""
    parallel = moe.moe_parallel_config
    activation = getattr(moe.activation, "value", moe.activation)
    return {
        "--enable-eplb (experts that move between ranks)": parallel.enable_eplb,
        "mixtures of experts under data parallelism": parallel.dp_size > 1,
        f"--all2all-backend {parallel.all2all_backend} (experts that get their tokens by messages)": (
            parallel.use_all2all_kernels
        ),
        "experts under --enable-lora": lora_is_on(),
        "experts on a GPU": not on_cpu(),
        f"experts with the activation {activation}": activation != "silu",
        "experts with biases": moe.has_bias,
        "router weights on the experts' input": layer.apply_router_weight_on_input,
        "experts in groups, of which a router chooses first": layer.use_grouped_topk,
        f"a router of {layer.scoring_func}": layer.scoring_func != "softmax",
        "a router with a bias for each expert": layer.e_score_correction_bias is not None,
        "experts with limits": layer.swiglu_limit is not None,
    }


def experts_here(layer: RoutedExperts) -> dict[int, int]:
    """The experts that this rank holds, by their numbers in the model, and where in its tensors they are."""
    table = layer.expert_map
    if table is None:
        return {expert: expert for expert in range(layer.local_num_experts)}
    return {expert: place for expert, place in enumerate(map(int, table)) if place >= 0}


def experts_share(moe: Any) -> tuple[int, int]:
    """This rank's part of every expert's channels, and how many parts there are: one under expert parallelism."""
    return moe.moe_parallel_config.tp_rank, moe.moe_parallel_config.tp_size


def routed(runner: Any, hidden: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts that vLLM's router chooses by its logits [T, experts], and their weights; [T, top_k] each."""
    weights, chosen = runner.router.select_experts(hidden_states=hidden, router_logits=logits)
    return chosen, weights


def attention_refusals(layer: Attention) -> dict[str, bool]:
    """What an attention layer asks for beyond plain causal attention: name of the feature, whether it is used.

    `layer.impl` is still vLLM's own implementation, which has kept the constructor's arguments.
    """
    impl: Any = layer.impl
    return {
        f"attention of type {layer.attn_type}": layer.attn_type != AttentionType.DECODER,
        "sliding window attention": layer.sliding_window is not None,
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap on attention logits": bool(impl.logits_soft_cap),
        "attention sinks": bool(layer.has_sink),
        "a KV cache shared between layers": layer.kv_sharing_target_layer_name is not None,
        "V heads of another size than K heads": layer.head_size_v != layer.head_size,
        f"--kv-cache-dtype {layer.kv_cache_dtype} (the checkpoint sets 4 bits; leave the flag out)": (
            layer.kv_cache_dtype != "auto"
        ),
        f"the attention layer {type(layer).__name__}": type(layer) is not Attention,
    }
