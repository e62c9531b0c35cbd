"""config.json of published models, as their repositories have them."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv: int, **more: Any) -> Config:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "hidden_act": "silu",
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "initializer_range": 0.02, "rms_norm_eps": 1e-05, "pretraining_tp": 1,
        "torch_dtype": "bfloat16", "use_cache": True, "tie_word_embeddings": False, "vocab_size": 32000,
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096, "transformers_version": "4.31.0",
    } | more  # fmt: skip


LLAMA3 = {
    "vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": 128001, "rope_theta": 500000.0,
    "attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 8192, "rope_scaling": None,
    "transformers_version": "4.40.0.dev0",
}  # fmt: skip
LLAMA31 = LLAMA3 | {
    "max_position_embeddings": 131072, "mlp_bias": False, "eos_token_id": [128001, 128008, 128009],
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip


def mistral(**more: Any) -> Config:
    return {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "transformers_version": "4.42.0.dev0", "vocab_size": 32768,
    } | more  # fmt: skip


def qwen(kind: str, hidden: int, intermediate: int, layers: int, heads: int, kv: int, **more: Any) -> Config:
    return {
        "architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower(), "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": hidden,
        "initializer_range": 0.02, "intermediate_size": intermediate, "max_position_embeddings": 32768,
        "max_window_layers": layers, "num_attention_heads": heads, "num_hidden_layers": layers,
        "num_key_value_heads": kv, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936,
    } | more  # fmt: skip


QWEN3 = {"attention_bias": False, "head_dim": 128, "max_position_embeddings": 40960, "rope_scaling": None,
         "sliding_window": None}  # fmt: skip
# Ministral 8B as its parameters describe it: one layer sees everything, three a window.
INTERLEAVED = ["full_attention", *["sliding_attention"] * 3] * 9


def phi3(hidden: int, intermediate: int, layers: int, heads: int, kv: int, **more: Any) -> Config:
    return {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 1, "embd_pdrop": 0.0,
        "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": hidden, "initializer_range": 0.02,
        "intermediate_size": intermediate, "max_position_embeddings": 4096, "num_attention_heads": heads,
        "num_hidden_layers": layers, "num_key_value_heads": kv, "original_max_position_embeddings": 4096,
        "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.2", "use_cache": True, "vocab_size": 32064,
    } | more  # fmt: skip


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}

QWEN35 = {
    "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "attention_bias": False,
    "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16", "eos_token_id": 248044,
    "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 5120,
    "initializer_range": 0.02, "intermediate_size": 17408,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 16, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 48,
    "linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [],
    "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "num_attention_heads": 24,
    "num_hidden_layers": 64, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
    "use_cache": True, "vocab_size": 248320, "mamba_ssm_dtype": "float32",
    "rope_parameters": {
        "mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default", "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
    },
}  # fmt: skip

GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256, "hidden_size": 1152,
    "hidden_activation": "gelu_pytorch_tanh", "intermediate_size": 6912, "max_position_embeddings": 32768,
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6, "cache_implementation": "hybrid", "use_cache": True,
    "bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0, "attention_dropout": 0.0, "initializer_range": 0.02,
    "torch_dtype": "bfloat16", "vocab_size": 262144,
}  # fmt: skip
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
    "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32", "transformers_version": "4.42.0.dev0",
    "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
GEMMA4_31B = {
    "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "attention_bias": False,
    "attention_dropout": 0.0, "attention_k_eq_v": True, "bos_token_id": 2, "dtype": "bfloat16",
    "enable_moe_block": False, "eos_token_id": 1, "final_logit_softcapping": 30.0, "global_head_dim": 512,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 5376, "hidden_size_per_layer_input": 0,
    "initializer_range": 0.02, "intermediate_size": 21504,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10, "max_position_embeddings": 262144,
    "moe_intermediate_size": None, "num_attention_heads": 32, "num_experts": None, "num_global_key_value_heads": 4,
    "num_hidden_layers": 60, "num_key_value_heads": 16, "num_kv_shared_layers": 0, "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "sliding_window": 1024, "tie_word_embeddings": True, "top_k_experts": None,
    "use_bidirectional_attention": "vision", "use_cache": True, "use_double_wide_mlp": False, "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
}  # fmt: skip
GEMMA4_26B = GEMMA4_31B | {
    "enable_moe_block": True, "hidden_size": 2816, "intermediate_size": 2112, "moe_intermediate_size": 704,
    "num_attention_heads": 16, "num_experts": 128, "num_global_key_value_heads": 2, "num_hidden_layers": 30,
    "num_key_value_heads": 8, "top_k_experts": 8,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
}  # fmt: skip
GEMMA4_E2B = GEMMA4_31B | {
    "attention_k_eq_v": False, "hidden_size": 1536, "hidden_size_per_layer_input": 256, "intermediate_size": 6144,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7, "max_position_embeddings": 131072,
    "num_attention_heads": 8, "num_global_key_value_heads": None, "num_hidden_layers": 35, "num_key_value_heads": 1,
    "num_kv_shared_layers": 20, "sliding_window": 512, "use_bidirectional_attention": None,
    "use_double_wide_mlp": True,
}  # fmt: skip


def qwen35(hidden: int, intermediate: int, layers: int, heads: int, kv: int, **more: Any) -> Config:
    kinds = (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4)
    return QWEN35 | {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "layer_types": kinds,
        "num_attention_heads": heads, "num_key_value_heads": kv,
    } | more  # fmt: skip


def whole(text: Config, name: str, model_type: str, **more: Any) -> Config:
    """A model of text and images around a model of text."""
    text = {key: value for key, value in text.items() if key != "architectures"}
    return {"architectures": [name], "model_type": model_type, "text_config": text, "vision_config": {}} | more


GEMMA3_4B = GEMMA3 | {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8,
                      "num_hidden_layers": 34, "num_key_value_heads": 4, "sliding_window": 1024,
                      "max_position_embeddings": 131072, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                      "vocab_size": 262208}  # fmt: skip
CONFIGS: dict[str, Config] = {
    "Llama-2-7b-hf": llama(4096, 11008, 32, 32, 32, _name_or_path="meta-llama/Llama-2-7b-hf", torch_dtype="float16",
                           rope_scaling=None, max_length=4096, pad_token_id=0),
    "Llama-2-70b-hf": llama(8192, 28672, 80, 64, 8, torch_dtype="float16", rope_scaling=None),
    "llama-7b": llama(4096, 11008, 32, 32, 32, max_position_embeddings=2048, max_sequence_length=2048, pad_token_id=0,
                      rms_norm_eps=1e-06),
    "vicuna-7b-v1.5-16k": llama(4096, 11008, 32, 32, 32, rope_scaling={"factor": 4.0, "type": "linear"},
                                max_sequence_length=16384, pad_token_id=0),
    "Meta-Llama-3-8B": llama(4096, 14336, 32, 32, 8, **LLAMA3),
    "Llama-3-8B-Gradient-1048k": llama(4096, 14336, 32, 32, 8, **LLAMA3 | {
        "rope_theta": 3580165449.0, "max_position_embeddings": 1048576}),
    "Llama-3.1-8B-Instruct": llama(4096, 14336, 32, 32, 8, **LLAMA31),
    "Llama-3.2-1B": llama(2048, 8192, 16, 32, 8, **LLAMA31 | {
        "head_dim": 64, "tie_word_embeddings": True, "eos_token_id": 128001,
        "rope_scaling": LLAMA31["rope_scaling"] | {"factor": 32.0}}),
    "Llama-3.3-70B-Instruct": llama(8192, 28672, 80, 64, 8, **LLAMA31 | {"head_dim": 128}),
    "unsloth-llama-3-8b": llama(4096, 14336, 32, 32, 8, **LLAMA3 | {
        "pad_token_id": 128255, "unsloth_version": "2024.9", "unsloth_fixed": True}),
    "TinyLlama-1.1B-Chat": llama(2048, 5632, 22, 32, 4, max_position_embeddings=2048, rope_theta=10000.0,
                                 attention_bias=False, rope_scaling=None),
    "SmolLM2-135M": llama(576, 1536, 30, 9, 3, attention_bias=False, attention_dropout=0.0, bos_token_id=0,
                          eos_token_id=0, initializer_range=0.041666666666666664, is_llama_config=True,
                          max_position_embeddings=8192, mlp_bias=False, rope_interleaved=False, rope_theta=100000,
                          tie_word_embeddings=True, vocab_size=49152, rope_scaling=None),
    "SmolLM2-135M-Instruct": llama(576, 1536, 30, 9, 3, pad_token_id=2, rope_interleaved=False, rope_theta=100000,
                                   **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}),
    "SmolLM2-135M-Instruct, read from GGUF": llama(
        576, 1536, 30, 9, 3, pad_token_id=2, unk_token_id=0, tie_word_embeddings=True, vocab_size=49152,
        _model_name_or_path="Smollm2 135M 8k Lc100K Mix1 Ep2",
        rope_parameters={"rope_theta": 1e5, "rope_type": "default"},
    ),
    "Yi-6B": llama(4096, 11008, 32, 32, 4, pad_token_id=0, rope_theta=5000000.0, vocab_size=64000, rope_scaling=None),
    "Yi-34B-200K": llama(7168, 20480, 60, 56, 8, max_position_embeddings=200000, rope_theta=10000000.0,
                         vocab_size=64000, pad_token_id=0),
    "deepseek-coder-6.7b": llama(4096, 11008, 32, 32, 32, max_position_embeddings=16384, rope_theta=100000,
                                 rope_scaling={"factor": 4.0, "type": "linear"}, vocab_size=32256, bos_token_id=32013,
                                 eos_token_id=32014, rms_norm_eps=1e-06),
    "DeepSeek-R1-Distill-Llama-8B": llama(4096, 14336, 32, 32, 8, **LLAMA31 | {"eos_token_id": 128001}),
    "phi-as-llama": llama(3072, 8192, 32, 32, 32, attention_bias=False, mlp_bias=False, vocab_size=32064,
                          original_max_position_embeddings=4096, eos_token_id=32000, pad_token_id=32000),
    "Smaug-72B": llama(8192, 24576, 80, 64, 64, attention_bias=True, max_position_embeddings=32768,
                       rope_theta=1000000, vocab_size=152064, seq_length=32768),
    "saved-by-transformers-5": llama(2048, 8192, 16, 32, 8, head_dim=64, dtype="bfloat16", torch_dtype="bfloat16",
                                     rope_parameters=LLAMA31["rope_scaling"] | {"rope_theta": 500000.0},
                                     attention_bias=False, mlp_bias=False, pad_token_id=None,
                                     max_position_embeddings=131072),
    "Mistral-7B-v0.1-full": mistral(vocab_size=32000, rope_theta=10000.0, transformers_version="4.34.0.dev0"),
    "Mistral-7B-v0.1": mistral(vocab_size=32000, rope_theta=10000.0, sliding_window=4096,
                               transformers_version="4.34.0.dev0"),
    "Mistral-7B-Instruct-v0.3": mistral(),
    "Ministral-8B-Instruct-2410": mistral(head_dim=128, intermediate_size=12288, num_hidden_layers=36,
                                          rope_theta=100000000.0, sliding_window=32768, vocab_size=131072),
    "Ministral-8B-Instruct-2410, windows by layer": mistral(
        head_dim=128, intermediate_size=12288, num_hidden_layers=36, rope_theta=100000000.0, sliding_window=32768,
        vocab_size=131072, max_position_embeddings=131072, layer_types=INTERLEAVED),
    "Ministral-8B, saved by transformers 5": mistral(
        head_dim=128, intermediate_size=12288, num_hidden_layers=36, sliding_window=32768, vocab_size=131072,
        max_position_embeddings=131072, layer_types=INTERLEAVED) | {
            "architectures": ["MinistralForCausalLM"], "model_type": "ministral"},
    "Phi-3-mini-4k-instruct": phi3(3072, 8192, 32, 32, 32),
    "Mistral-Nemo-Instruct-2407": mistral(hidden_size=5120, head_dim=128, num_hidden_layers=40, vocab_size=131072,
                                          max_position_embeddings=131072),
    "Zephyr-7B": mistral(vocab_size=32000, pad_token_id=2, rope_theta=10000.0, use_cache=True),
    "Qwen2-7B": qwen("Qwen2", 3584, 18944, 28, 28, 4, max_position_embeddings=131072, sliding_window=131072,
                     vocab_size=152064),
    "Qwen2-7B-Instruct, windows on": qwen("Qwen2", 3584, 18944, 28, 28, 4, use_sliding_window=True, vocab_size=152064,
                                          sliding_window=131072),
    "Qwen2-7B, windows from layer 14 on": qwen("Qwen2", 3584, 18944, 28, 28, 4, use_sliding_window=True,
                                               max_window_layers=14, sliding_window=4096, vocab_size=152064),
    "Qwen2.5-0.5B-Instruct": qwen("Qwen2", 896, 4864, 24, 14, 2, max_window_layers=21, tie_word_embeddings=True),
    "Qwen2.5-7B-Instruct": qwen("Qwen2", 3584, 18944, 28, 28, 4, vocab_size=152064),
    "Qwen2.5-7B-Instruct, 128K": qwen("Qwen2", 3584, 18944, 28, 28, 4, vocab_size=152064,
                                      rope_scaling=YARN | {"type": "yarn"}),
    "Qwen2.5-32B": qwen("Qwen2", 5120, 27648, 64, 40, 8, max_position_embeddings=131072, vocab_size=152064),
    "DeepSeek-R1-Distill-Qwen-1.5B": qwen("Qwen2", 1536, 8960, 28, 12, 2, bos_token_id=151646, eos_token_id=151643,
                                          max_window_layers=21, sliding_window=4096, use_mrope=False,
                                          max_position_embeddings=131072, rope_theta=10000),
    "Qwen3.5-27B, the text alone": QWEN35,
    "Qwen3.5-0.8B, the text alone": qwen35(1024, 3584, 24, 8, 2, linear_num_value_heads=16, tie_word_embeddings=True),
    "Qwen3.5-4B, the text alone": qwen35(2560, 9216, 32, 16, 4, linear_num_value_heads=32, tie_word_embeddings=True),
    "Qwen3.5-9B": whole(qwen35(4096, 12288, 32, 16, 4, linear_num_value_heads=32), "Qwen3_5ForConditionalGeneration",
                        "qwen3_5", image_token_id=248056, tie_word_embeddings=False),
    "Qwen3.5-0.8B": whole(
        qwen35(1024, 3584, 24, 8, 2, linear_num_value_heads=16, tie_word_embeddings=True),
        "Qwen3_5ForConditionalGeneration", "qwen3_5", image_token_id=248056, video_token_id=248057,
        vision_end_token_id=248054, vision_start_token_id=248053, tie_word_embeddings=True,
        transformers_version="4.57.0.dev0"),
    "Qwen3.6-27B": whole(
        QWEN35 | {"bos_token_id": 248044, "pad_token_id": None, "output_gate_type": "swish",
                  "partial_rotary_factor": 0.25},
        "Qwen3_5ForConditionalGeneration", "qwen3_5", language_model_only=False, image_token_id=248056,
        tie_word_embeddings=False),
    "gemma-2-2b": GEMMA2,
    "gemma-2-9b-it": GEMMA2 | {
        "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16, "num_hidden_layers": 42,
        "num_key_value_heads": 8, "sliding_window_size": 4096, "torch_dtype": "bfloat16"},
    "gemma-2-27b-it": GEMMA2 | {
        "head_dim": 128, "hidden_size": 4608, "intermediate_size": 36864, "num_attention_heads": 32,
        "num_hidden_layers": 46, "num_key_value_heads": 16, "query_pre_attn_scalar": 144, "torch_dtype": "bfloat16",
        "_attn_implementation": "eager", "sliding_window_size": 4096},
    "gemma-3-1b-it": GEMMA3,
    "gemma-3-4b-it": whole(GEMMA3_4B, "Gemma3ForConditionalGeneration", "gemma3", mm_tokens_per_image=256),
    "gemma-3-12b-it": whole(GEMMA3_4B | {
        "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16, "num_hidden_layers": 48,
        "num_key_value_heads": 8}, "Gemma3ForConditionalGeneration", "gemma3"),
    "gemma-3-27b-it": whole(GEMMA3_4B | {
        "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32,
        "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168},
        "Gemma3ForConditionalGeneration", "gemma3"),
    "gemma-3-270m": GEMMA3 | {
        "_sliding_window_pattern": 6, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "use_bidirectional_attention": False},
    "gemma-4-31B-it": whole(GEMMA4_31B, "Gemma4ForConditionalGeneration", "gemma4", audio_config=None),
    "gemma-4-31B-it, the text alone": GEMMA4_31B,
    "gemma-4-12B-it": whole(GEMMA4_31B | {
        "hidden_size": 3840, "intermediate_size": 15360, "layer_types": GEMMA4_31B["layer_types"][:48],
        "model_type": "gemma4_unified_text", "num_attention_heads": 16, "num_global_key_value_heads": 1,
        "num_hidden_layers": 48, "num_key_value_heads": 8, "vocab_size_per_layer_input": 0},
        "Gemma4UnifiedForConditionalGeneration", "gemma4_unified"),
    "Qwen3-0.6B": qwen("Qwen3", 1024, 3072, 28, 16, 8, tie_word_embeddings=True, **QWEN3),
    "Qwen3-8B": qwen("Qwen3", 4096, 12288, 36, 32, 8, **QWEN3),
    "Qwen3-8B, 128K": qwen("Qwen3", 4096, 12288, 36, 32, 8, **QWEN3 | {
        "rope_scaling": YARN | {"rope_type": "yarn"}, "max_position_embeddings": 131072}),
    "Qwen3-4B, transformers 5": qwen("Qwen3", 2560, 9728, 36, 32, 8, tie_word_embeddings=True, **QWEN3 | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "layer_types": ["full_attention"] * 36, "max_position_embeddings": 262144}),
}  # fmt: skip

GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2880, "intermediate_size": 2880, "max_position_embeddings": 131072,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "num_attention_heads": 64, "num_hidden_layers": 24,
    "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 4, "rms_norm_eps": 1e-05,
    "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "vocab_size": 201088,
    "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
# Models with windows that are refused, and what the line says.
REFUSED: dict[str, tuple[Config, str]] = {
    "gemma-2-2b, untied": (GEMMA2 | {"tie_word_embeddings": False}, "tie_word_embeddings is False, expected is True"),
    "gemma-4-26B-A4B-it": (
        whole(GEMMA4_26B, "Gemma4ForConditionalGeneration", "gemma4"),
        "enable_moe_block is True, expected is False: mixtures of experts beside the MLP are not supported",
    ),
    "gemma-4-E2B-it": (
        whole(GEMMA4_E2B, "Gemma4ForConditionalGeneration", "gemma4"),
        "hidden_size_per_layer_input is 256, expected is 0: embeddings for each layer are not supported",
    ),
    "gemma-4-E4B-it": (
        whole(GEMMA4_E2B | {
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42, "num_key_value_heads": 2,
            "num_kv_shared_layers": 18, "use_double_wide_mlp": False,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 7,
        }, "Gemma4ForConditionalGeneration", "gemma4"),
        "hidden_size_per_layer_input is 256, expected is 0: embeddings for each layer are not supported",
    ),
    "gemma-4-12B-it, the text alone": (
        GEMMA4_31B | {"architectures": ["Gemma4UnifiedForCausalLM"], "model_type": "gemma4_unified_text"},
        "architectures is ['Gemma4UnifiedForCausalLM']: vLLM has no class of this name",
    ),
    "Qwen3.6-27B, another gate": (
        QWEN35 | {"output_gate_type": "sigmoid"}, "output_gate_type is 'sigmoid', expected is 'silu' or 'swish'"
    ),
    "gemma-3n-E4B": (
        whole(GEMMA3 | {"model_type": "gemma3n_text"}, "Gemma3nForConditionalGeneration", "gemma3n"),
        "architectures is ['Gemma3nForConditionalGeneration']: several residual streams",
    ),
    "Qwen3.5-35B-A3B": (
        whole(qwen35(2048, 512, 40, 16, 2, num_experts=256), "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe"),
        "architectures is ['Qwen3_5MoeForConditionalGeneration']: mixtures of experts beside linear attention",
    ),
    "Qwen3-Next-80B-A3B": (
        qwen35(2048, 5120, 48, 16, 2) | {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"},
        "architectures is ['Qwen3NextForCausalLM']: mixtures of experts beside linear attention are not supported",
    ),
    "Phi-3-small-8k-instruct": (
        phi3(4096, 14336, 32, 32, 8, model_type="phi3small") | {"architectures": ["Phi3SmallForCausalLM"]},
        "architectures is ['Phi3SmallForCausalLM']: vLLM has dropped this model",
    ),
    "gpt-oss-20b": (GPT_OSS, "architectures is ['GptOssForCausalLM']: attention sinks, and experts with biases,"),
    "Ministral-as-mistral": (
        mistral(head_dim=128, vocab_size=131072, layer_types=["full_attention"] * 32),
        "layer_types: transformers reads this as a Ministral, which does not run without a sliding_window",
    ),
    "Phi-4-mini-instruct": (
        phi3(3072, 8192, 32, 24, 8, max_position_embeddings=131072, partial_rotary_factor=0.75, sliding_window=262144,
             rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 24 + [32.0] * 24},
             tie_word_embeddings=True, vocab_size=200064),
        "rope_scaling.rope_type is 'longrope'",
    ),
}  # fmt: skip
