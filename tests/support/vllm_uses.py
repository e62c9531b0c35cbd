"""What the plugin uses of vLLM: most of it read off the plugin's own sources, the rest one table.

Read off: the names that it imports, the arguments that it calls them with, the methods of vLLM's classes that it
overrides, the models that `compat` knows. `complaints` says what of all that a vLLM does not have as it is used.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from vllm_api import Facts, Name, accepts, assigned, has, lineage, method, parameters, signature

PLUGIN = Path(__file__).resolve().parents[2] / "vllm_rotquant"
LAYERS, ATTENTION = "vllm.model_executor.layers.", "vllm.v1.attention."

# Attributes that the plugin reads, sets or replaces.
ATTRIBUTES = {
    Name("vllm.config", "ModelConfig"): (
        "convert_type dtype enable_prompt_embeds hf_config hf_overrides max_model_len model revision runner_type"
    ),
    Name("vllm.config", "VllmConfig"): (
        "additional_config compilation_config kv_transfer_config load_config lora_config model_config parallel_config "
        "speculative_config"
    ),
    Name("vllm.config", "LoadConfig"): "download_dir load_format",
    Name("vllm.config", "CompilationConfig"): "static_forward_context",
    Name("vllm.config", "KVTransferConfig"): "kv_connector",
    Name("vllm.config", "LoRAConfig"): "max_lora_rank",
    Name("vllm.config", "ParallelConfig"): "pipeline_parallel_size",
    Name("vllm.config", "SpeculativeConfig"): "draft_model_config method",
    Name("vllm.distributed.parallel_state", "GroupCoordinator"): "cpu_group rank_in_group ranks world_size",
    Name("vllm.lora.lora_model", "LoRAModel"): "from_lora_tensors loras",
    Name("vllm.lora.lora_weights", "LoRALayerWeights"): "scaling",
    Name("vllm.lora.request", "LoRARequest"): "lora_path",
    Name("vllm.lora.worker_manager", "WorkerLoRAManager"): "_load_adapter _lora_model_cls lora_config",
    Name("vllm.v1.core.sched.output", "NewRequestData"): "prompt_embeds",
    Name("vllm.v1.core.sched.output", "SchedulerOutput"): "scheduled_new_reqs",
    Name("vllm.v1.worker.worker_base", "WorkerBase"): "get_model",
    Name("vllm.v1.worker.worker_base", "WorkerWrapperBase"): "execute_model worker",
    Name(f"{LAYERS}rotary_embedding.phi3_long_rope_scaled_rope", "Phi3LongRoPEScaledRotaryEmbedding"): (
        "original_max_position_embeddings use_long_rope"
    ),
    Name(f"{LAYERS}attention", "Attention"): (
        "attn_backend attn_type dtype has_sink head_size head_size_v impl kv_cache_dtype kv_sharing_target_layer_name "
        "kv_cache num_heads num_kv_heads quant_method sliding_window"
    ),
    Name(f"{LAYERS}fused_moe", "RoutedExperts"): (
        "apply_router_weight_on_input e_score_correction_bias expert_map local_num_experts moe_config quant_method "
        "scoring_func swiglu_limit use_grouped_topk"
    ),
    Name(f"{LAYERS}fused_moe", "MoERunner"): "router",
    Name(f"{LAYERS}fused_moe.config", "FusedMoEConfig"): "activation has_bias moe_parallel_config",
    Name(f"{LAYERS}fused_moe.config", "FusedMoEParallelConfig"): (
        "all2all_backend dp_size enable_eplb tp_rank tp_size use_all2all_kernels"
    ),
    Name(f"{LAYERS}fused_moe.router.fused_moe_router", "FusedMoERouter"): "select_experts",
    Name(f"{LAYERS}layernorm", "RMSNorm"): "has_weight variance_epsilon variance_size_override weight",
    Name(f"{LAYERS}linear", "LinearBase"): "quant_method",
    Name(f"{LAYERS}quantization.base_config", "QuantizationConfig"): "packed_modules_mapping",
    Name(f"{LAYERS}vocab_parallel_embedding", "ParallelLMHead"): "quant_method",
    Name("vllm.model_executor.models.utils", "WeightsMapper"): "apply_dict apply_list",
    Name("vllm.model_executor.model_loader.reload.types", "LayerReloadingInfo"): (
        "can_load load_numel load_numel_total reset restore_device restore_metadata"
    ),
    Name("vllm.platforms.interface", "Platform"): "device_type is_cpu is_cuda",
    Name(f"{ATTENTION}backend", "AttentionCGSupport"): "UNIFORM_BATCH",
    Name(f"{ATTENTION}backend", "AttentionType"): "DECODER",
    Name(f"{ATTENTION}backend", "AttentionMetadataBuilder"): "reorder_batch_threshold",
    Name(f"{ATTENTION}backend", "CommonAttentionMetadata"): (
        "block_table_tensor causal max_seq_len query_start_loc query_start_loc_cpu seq_lens slot_mapping"
    ),
    Name("vllm.v1.kv_cache_interface", "AttentionSpec"): "block_size dtype head_size state_content_bytes",
    Name("vllm.v1.kv_cache_interface", "KVCacheLayout"): "LBHNC",
    **{  # vLLM's own implementations, which an attention layer holds until it gets ours
        Name(f"{ATTENTION}backends.{module}", name): "alibi_slopes logits_soft_cap scale"
        for module, name in (
            ("cpu_attn", "CPUAttentionBackendImpl"),
            ("flash_attn", "FlashAttentionImpl"),
            ("flashinfer", "FlashInferImpl"),
            ("flex_attention", "FlexAttentionImpl"),
            ("triton_attn", "TritonAttentionImpl"),
        )
    },
}

# What the forward of a known model reads of itself. Nothing but the layer in question may read the output of
# input_layernorm, post_attention_layernorm or act_fn, so another name here wants a look at the forward.
HEADS = "q_size kv_size head_dim num_heads num_kv_heads q_norm k_norm qk_norm rotary_emb"
LLAMA_4 = "do_llama_4_scaling _get_llama_4_attn_scale"
# Of layers of several kinds; their norms are none that quantize.
MIXED = "layer_type linear_attn layer_scale attn_layer_scale ffn_layer_scale use_attn_reduce_scatter_for_moe"
SHARED = "v_norm is_kv_shared_layer q_proj"  # of Gemma 4, whose supported models share no keys and values
# Of Gemma 4, the last of parts that the supported models do not have.
GEMMA_4 = """
    layer_scalar per_layer_input_gate per_layer_projection post_per_layer_input_norm enable_moe_block router experts moe
    post_feedforward_layernorm_1 post_feedforward_layernorm_2 pre_feedforward_layernorm_2
"""
FORWARD = {
    "MLPS": {"gate_up_proj", "act_fn", "down_proj"},
    "ATTENTIONS": {"qkv_proj", "attn", "o_proj"},
    "DECODERS": {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"},
    "SANDWICHES": {
        "input_layernorm", "self_attn", "post_attention_layernorm", "pre_feedforward_layernorm", "mlp",
        "post_feedforward_layernorm",
    },
}  # fmt: skip
FORWARD_MAY = {
    "MLPS": {"expert_gate"},  # of a shared expert, behind down_proj
    "ATTENTIONS": {*HEADS.split(), *LLAMA_4.split(), *SHARED.split(), "use_rope", "_project_qkv_gate"},
    "DECODERS": {"ada_rms_norm_t_cond", "residual_multiplier", *MIXED.split()},
    "SANDWICHES": set(GEMMA_4.split()),
}

# Methods that vLLM calls without declaring them in the base class: a class of its own that has the same.
UNDECLARED = {
    "do_kv_cache_update": Name(f"{ATTENTION}backends.triton_attn", "TritonAttentionImpl"),
    "tie_weights": Name(f"{LAYERS}vocab_parallel_embedding", "UnquantizedEmbeddingMethod"),
}
# Of these a vLLM has one: the shape of the cache, asked for in two ways.
EITHER = ("get_kv_cache_shape", "supported_kv_cache_layouts")
# Methods that vLLM does not know: ours alone, or constructors that only the plugin calls.
OWN = {
    "Embedding.__init__",
    "KV4Impl.__init__",
    "KV4Impl.attend",
    "KV4Impl.attend_part",
    "KV4Impl.feedback",
    "KV4Impl.limits",
    "KV4Impl.store",
    "KVCacheMethod.__init__",
    "RotQuantConfig.__reduce__",
    "RotQuantConfig.basis",
    "RotQuantConfig.from_state",
    "RotQuantConfig.linear_format",
    "RotQuantExpertsMethod.__init__",
    "RotQuantExpertsMethod.take",
    "RotQuantLinearMethod.__init__",
    "RotQuantLinearMethod.check_loaded",
    "RotQuantLinearMethod.declare",
    "RotQuantLinearMethod.prepare",
}


class Method(NamedTuple):
    """A method of a class of the plugin that derives from one of vLLM's."""

    owner: str
    base: Name
    node: ast.FunctionDef


class Call(NamedTuple):
    """A call of something of vLLM's. `method` is "" for a function, "__init__" for a class."""

    target: Name
    method: str
    node: ast.Call


@cache
def plugin() -> dict[str, ast.Module]:
    """The plugin's modules; those of `compat` as one."""
    found = {path.stem: ast.parse(path.read_text()) for path in sorted(PLUGIN.glob("*.py"))}
    parts = [ast.parse(path.read_text()) for path in sorted((PLUGIN / "compat").glob("*.py"))]
    return found | {"compat": ast.Module([node for part in parts for node in part.body], [])}


def imports(tree: ast.AST) -> dict[str, Name]:
    """The names that a module imports from vLLM, by what it calls them."""
    return {
        alias.asname or alias.name: Name(node.module or "", alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }


def optional() -> set[Name]:
    """Names whose import the plugin tries, and can do without."""
    tried = [node for tree in plugin().values() for node in ast.walk(tree) if isinstance(node, ast.Try)]
    return {name for node in tried for name in imports(node).values()}


def models() -> dict[Name, str]:
    """The classes of vLLM's models whose forward `compat` knows, and the list that names them."""
    lists = {
        name: node.value for node in plugin()["compat"].body if isinstance(node, ast.Assign) for name in assigned(node)
    }
    prefix = ast.literal_eval(lists["MODELS"])
    return {Name(*f"{prefix}{path}".rsplit(".", 1)): kind for kind in FORWARD for path in ast.literal_eval(lists[kind])}


def wanted() -> set[Name]:
    """Every name of vLLM's that a comparison needs."""
    names = {name for tree in plugin().values() for name in imports(tree).values()}
    return {*names, *models(), *ATTRIBUTES, *UNDECLARED.values()}


def named(node: ast.expr, module: ast.Module) -> Name | None:
    """What an expression such as `compat.Attention` or `RMSNorm` means, if it is a name of vLLM's."""
    node = node.value if isinstance(node, ast.Subscript) else node
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "compat":
        return imports(plugin()["compat"]).get(node.attr)
    return imports(module).get(node.id) if isinstance(node, ast.Name) else None


def subclasses() -> Iterator[tuple[ast.ClassDef, Name]]:
    """The plugin's classes that derive from one of vLLM's, and that one."""
    for module in plugin().values():
        for node in ast.walk(module):
            bases = [named(base, module) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            for base in filter(None, bases):
                assert isinstance(node, ast.ClassDef)
                yield node, base


def methods() -> Iterator[Method]:
    for node, base in subclasses():
        yield from (Method(node.name, base, item) for item in node.body if isinstance(item, ast.FunctionDef))


def calls() -> Iterator[Call]:
    """Calls of vLLM's functions and constructors, and those of `super()` in classes that derive from vLLM's."""
    for module in plugin().values():
        for node in ast.walk(module):
            target = named(node.func, module) if isinstance(node, ast.Call) else None
            if isinstance(node, ast.Call) and target is not None:
                yield Call(target, "__init__", node)
    for _, base, method_node in methods():
        for node in ast.walk(method_node):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super":
                    yield Call(base, node.func.attr, node)


# ---- comparison --------------------------------------------------------------------------------------------


def complaints(facts: Facts) -> list[str]:
    """What the plugin uses and this vLLM has not, or has in another shape; empty where it fits."""
    unknown = sorted(str(name) for name in wanted() if str(name) not in {*facts.places, *facts.absent})
    if unknown:
        return [f"not recorded: {', '.join(unknown)}. Run tools/record_vllm_api.py for every supported version"]
    missing = [str(name) for name in wanted() - optional() if str(name) in facts.absent]
    if missing:
        return [f"{name} does not exist" for name in sorted(missing)]
    checks = (wrong_calls, wrong_overrides, left_out, missing_attributes, other_forwards)
    return [line for check in checks for line in check(facts)]


def wrong_calls(facts: Facts) -> Iterator[str]:
    for target, name, node in calls():
        place = facts.places.get(str(target), "")
        if place in facts.functions:
            texts, bound = [facts.functions[place]], False
        else:
            owners = lineage(facts, place) if place in facts.classes else []
            texts, bound = [t for o in owners if (t := facts.classes[o]["methods"].get(name))], True
        keywords = [keyword.arg for keyword in node.keywords if keyword.arg]
        if not texts and name != "__init__":
            yield f"{target} has no method {name}, which `{ast.unparse(node)}` calls"
        elif texts and not accepts(texts, len(node.args), keywords, bound):
            yield f"{target} takes {texts}, the plugin calls `{ast.unparse(node)}`"


def wrong_overrides(facts: Facts) -> Iterator[str]:
    """Methods of ours that vLLM does not call, or calls with what they do not take."""
    for owner, base, node in methods():
        name, own = node.name, f"{owner}.{node.name}"
        place = facts.places[str(UNDECLARED.get(name, base))]
        theirs = method(facts, place, name)
        if theirs is None:
            private = name.startswith("_") and not name.startswith("__")
            if not (private or own in OWN or name in EITHER):
                yield f"{own}: {place} has no such method, so vLLM does not call it; if it is ours alone, say so in OWN"
        elif own not in OWN and not takes_over(signature(node), theirs):
            yield f"{own} takes {signature(node)}, vLLM's is {theirs}"
    backend = facts.places[f"{ATTENTION}backend:AttentionBackend"]
    if sum(method(facts, backend, name) is not None for name in EITHER) != 1:
        yield f"AttentionBackend should have one of {EITHER}"


def takes_over(our_text: str, their_text: str) -> bool:
    """Whether a method can be called as the one that it overrides: the same names in the same order, no more."""
    ours, theirs = parameters(our_text), parameters(their_text)
    our_names, their_names = (
        [item.arg for item in (*given.posonlyargs, *given.args)]["static" not in text.split() :]
        for given, text in ((ours, our_text), (theirs, their_text))
    )
    shared = min(len(our_names), len(their_names))
    more, fewer = our_names[shared:], their_names[shared:]
    kept = not fewer or (ours.vararg is not None and ours.kwarg is not None)
    same = our_names[:shared] == their_names[:shared]
    return same and kept and len(more) <= len(ours.defaults) and (theirs.kwarg is None or ours.kwarg is not None)


def left_out(facts: Facts) -> Iterator[str]:
    """Abstract methods of vLLM's that the plugin's class does not implement."""
    for node, base in subclasses():
        place = facts.places[str(base)]
        done = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        names = {name for owner in lineage(facts, place) for name in facts.classes[owner]["methods"]}
        for name in sorted(names - done):
            if "abstract" in (method(facts, place, name) or ""):
                yield f"{node.name} does not implement {place}.{name}"


def missing_attributes(facts: Facts) -> Iterator[str]:
    for name, attributes in ATTRIBUTES.items():
        place = facts.places.get(str(name))
        if place is not None:
            yield from (f"{place} has no {item}" for item in attributes.split() if not has(facts, place, item))


def other_forwards(facts: Facts) -> Iterator[str]:
    for name, kind in models().items():
        place = facts.places[str(name)]
        owners = (facts.classes[owner].get("forward_reads") for owner in lineage(facts, place))
        reads = set(next((found for found in owners if found), []))
        if not FORWARD[kind] <= reads <= FORWARD[kind] | FORWARD_MAY[kind]:
            yield f"{place}: forward reads {sorted(reads)}, so what runs in front of a layer may have changed"
