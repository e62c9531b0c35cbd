"""Fields of config.json: what published models have is taken, what two readers would compute differently is refused."""

import json
import re

import pytest
import torch

from real_configs import CONFIGS, GEMMA3, GEMMA4_31B, LLAMA31, QWEN35, REFUSED, llama, mistral, qwen
from rotquant.errors import RotQuantError
from rotquant.models import read_architecture, rotary
from rotquant.models.config_fields import HARMLESS, KNOWN, OFF, check_fields
from rotquant.models.registry import KNOWN_BY_CLASS

LLAMA, QWEN2, QWEN3 = CONFIGS["Meta-Llama-3-8B"], CONFIGS["Qwen2-7B"], CONFIGS["Qwen3-8B"]
PHI3 = CONFIGS["Phi-3-mini-4k-instruct"]
LINEAR = {"rope_type": "linear", "factor": 2.0}
SECTIONS = QWEN35["rope_parameters"]


def read(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_published_models_are_taken(tmp_path, name):
    text = CONFIGS[name].get("text_config", CONFIGS[name])
    assert read(tmp_path, CONFIGS[name]).layers == text["num_hidden_layers"]


@pytest.mark.parametrize("name", REFUSED)
def test_published_models_that_are_refused_are_so_in_one_line(tmp_path, name):
    config, message = REFUSED[name]
    with pytest.raises(RotQuantError, match=rf"^\S+config.json: {re.escape(message)}") as caught:
        read(tmp_path, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", KNOWN_BY_CLASS)
def test_what_transformers_itself_writes_is_known(tmp_path, name):
    """Every field of the config class, as `save_pretrained` writes it."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(KNOWN_BY_CLASS[name].model_type, architectures=[name])
    if name.startswith("Qwen2"):
        config.head_dim = None
    if name.startswith("Gemma4"):
        config.hidden_size_per_layer_input = 0
    if name.startswith("GraniteMoeHybrid"):  # the dense one
        config.num_local_experts, config.layer_types = 0, ["full_attention"] * config.num_hidden_layers
    config.save_pretrained(tmp_path)
    assert read_architecture(tmp_path).layers == config.num_hidden_layers
    assert not (KNOWN.keys() & OFF.keys()) | (KNOWN.keys() & HARMLESS) | (OFF.keys() & HARMLESS)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LLAMA, {"my_own_scale": 2.0}, "my_own_scale is a field that rotquant does not know"),
        (LLAMA, {"scale_emb": 12}, "scale_emb is a field"),
        (LLAMA, {"num_experts": 8}, "num_experts is a field"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: vLLM would turn a part"),
        (LLAMA, {"logit_scale": 0.0625}, "logit_scale is 0.0625: vLLM would scale"),
        (LLAMA, {"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
        (LLAMA, {"residual_multiplier": 0.22}, "residual_multiplier"),
        (LLAMA, {"attention_multiplier": 0.01}, "attention_multiplier"),
        (LLAMA, {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        (LLAMA, {"attention_chunk_size": 8192}, "attention_chunk_size"),
        (LLAMA, {"is_causal": False}, "is_causal is False: attention in both directions"),
        (LLAMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (LLAMA, {"bias": True}, "bias is True"),
        (LLAMA, {"qkv_bias": True}, "qkv_bias is True"),
        (LLAMA, {"attention_bias": True, "qkv_bias": False}, "qkv_bias: vLLM would take it in place"),
        (LLAMA, {"sliding_window": 4096, "use_sliding_window": False}, "sliding_window is 4096"),  # vLLM's is on
        (LLAMA, {"layer_types": ["sliding_attention"] * 32}, "layer_types has layers other than 'full_attention', "),
        (QWEN2, {"layer_types": ["linear_attention"] * 28}, "other than 'full_attention' or 'sliding_attention', "),
        (QWEN2, {"layer_types": ["sliding_attention"] * 28}, "has 'sliding_attention' layers, but use_sliding_window"),
        (mistral(), {"layer_types": ["sliding_attention"] * 32}, "layers, but sliding_window is None"),
        (mistral(), {"sliding_window": 0}, "sliding_window is 0: a token would not even see itself"),
        (PHI3, {"layer_types": ["full_attention"] * 32}, "layer_types: .* gives all layers the window of 2047"),
        (PHI3, {"layer_types": ["sliding_attention"] * 32}, "layer_types has layers other than 'full_attention', such"),
        (LLAMA, {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        (LLAMA, {"model_type": "mistral"}, "model_type is 'mistral', but 'llama' belongs to"),
        (LLAMA, {"architectures": ["LlamaForCausalLM", "X"]}, "architectures is"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (QWEN35, {"attn_output_gate": False}, "attn_output_gate is False, expected is True"),
        (QWEN35, {"attention_bias": True}, "attention_bias is true"),
        (QWEN35, {"layer_types": ["sliding_attention"] * 64}, "layer_types has layers other than"),
        (GEMMA3, {"hidden_activation": "silu"}, "hidden_activation is 'silu', the supported activation is"),
        (GEMMA3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0: soft caps are not supported"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention is True: attention in both dir"),
        (GEMMA3, {"torch_dtype": "float16"}, "torch_dtype is 'float16', expected is 'float32' or 'bfloat16'"),
        (GEMMA3, {"rope_parameters": {"sliding_attention": {"rope_type": "dynamic"}}}, "sliding_attention.rope_type"),
        (GEMMA3, {"rope_parameters": {"chunked_attention": {}}}, "rope_parameters.chunked_attention is no kind of la"),
        (GEMMA3, {"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}}}, "rope_local_base_freq is 10000, but"),
        (GEMMA4_31B, {"num_kv_shared_layers": 2}, "num_kv_shared_layers is 2, expected is 0: layers that share keys"),
        (GEMMA4_31B, {"num_experts": 4}, "num_experts is 4, expected is None: mixtures of experts beside the MLP are"),
        (GEMMA4_31B, {"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all', expected is None"),
        (GEMMA4_31B, {"per_layer_config": {"5": {"sliding_window": 8}}}, "per_layer_config is .* with head_dim and"),
        (GEMMA4_31B, {"rope_parameters": {"full_attention": {"rope_type": "proportional", "factor": 2.0}}},
         "rope_parameters.full_attention.factor does not belong to rope_type 'proportional'"),
        (GEMMA4_31B, {"rope_parameters": {"full_attention": {
            "rope_type": "proportional", "partial_rotary_factor": 1.5}}}, "partial_rotary_factor is 1.5, expected is"),
        (GEMMA3, {"rope_parameters": {"full_attention": {"rope_type": "proportional"}}}, "full_attention.rope_type is"),
        (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps is 0, expected is a number above 0"),
        (LLAMA, {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected is true or false"),
        (LLAMA, {"pad_token_id": 128256}, "pad_token_id 128256 is outside the vocabulary"),
        (LLAMA, {"eos_token_id": [2, 999999]}, "eos_token_id 999999 is outside"),
        (LLAMA, {"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, expected is a whole number"),
        (LLAMA, {"vocab_size": 2**40}, "vocab_size is"),
        (LLAMA, {"num_key_value_heads": 5}, "num_attention_heads 32 is not divisible by num_key_value_heads 5"),
        (LLAMA, {"dtype": "float32"}, "dtype is 'float32', but torch_dtype is 'bfloat16'"),
        (LLAMA, {"torch_dtype": "float64"}, "torch_dtype is 'float64', expected is 'float32' or"),
        (mistral(), {"attention_bias": True}, "attention_bias is true; with MistralForCausalLM"),
        (mistral(), {"mlp_bias": True}, "mlp_bias is true; with Mistral"),
        (mistral(), {"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling"),
        (QWEN2, {"head_dim": 64}, "head_dim is 64, but vLLM's Qwen2ForCausalLM takes"),
        (QWEN2, {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
        (QWEN2, {"qk_norm": True}, "qk_norm is True: vLLM would normalize"),
        (QWEN2, {"use_mrope": True}, "use_mrope"),
        (QWEN3, {"attention_bias": True}, "attention_bias is true; with Qwen3ForCausalLM"),
        (QWEN3, {"mlp_bias": True}, "mlp_bias is true; with Qwen3"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'; the same"),
        (LLAMA, {"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling.rope_type is 'su'"),
        (LLAMA, {"rope_scaling": {"type": "longrope"}}, "rope_type is 'longrope'"),
        (LLAMA, {"rope_scaling": {"rope_type": "default", "mrope_section": [16]}}, "mrope_section does not belong"),
        (LLAMA, {"rope_scaling": LINEAR | {"factor": 0.5}}, "rope_scaling.factor is 0.5, expected is a number of at"),
        (LLAMA, {"rope_scaling": LINEAR | {"type": "default"}}, "rope_type is 'linear', but its type is 'default'"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor is missing"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling is 'linear', expected is an object"),
        (LLAMA, {"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 500000.0, but rope_parameters.rope_theta is"),
        (LLAMA, {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}, "rope_scaling differ"),
        (LLAMA, {"rope_theta": None}, "rope_theta is None"),
        (LLAMA, LLAMA31 | {"original_max_position_embeddings": 4096}, "original_max_position_embeddings is 4096, but"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention does not belong"),
        (QWEN2, {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32768}},
         "max_position_embeddings is 131072, beyond"),
    ],
)  # fmt: skip
def test_what_would_be_served_differently_is_refused(config, change, message):
    with pytest.raises(RotQuantError, match=f"^config.json: .*{message}"):
        check_fields("config.json", config | change)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QWEN35 | {"rope_parameters": SECTIONS | {"mrope_section": [11, 11, 9]}}, "does not sum to 32"),
        (QWEN35 | {"linear_num_key_heads": 10}, "linear_num_value_heads 48 is no multiple of linear_num_key_heads"),
        ({key: value for key, value in GEMMA4_31B.items() if key != "hidden_size_per_layer_input"},
         "hidden_size_per_layer_input is 256, expected is 0: embeddings for each layer are not supported"),
        (GEMMA4_31B | {"num_global_key_value_heads": 5}, "32 is not divisible by the 5 KV heads of full_attention"),
        (GEMMA4_31B | {"per_layer_config": {"5": {"head_dim": 512}}}, "full_attention' is not homogeneous"),
        (GEMMA3 | {"sliding_window": None}, "sliding_window is None, and transformers makes a mask of it"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(tmp_path, config, message):
    with pytest.raises(RotQuantError, match=message):
        read(tmp_path, config)


def test_duplicate_fields_and_numbers_that_are_none(tmp_path):
    text = json.dumps(LLAMA)
    for wrong, message in (
        (text[:-1] + ', "rope_theta": 1.0}', "'rope_theta' stands twice"),
        (text.replace("1e-05", "NaN"), "NaN is not a JSON number"),
        ("[]", "a JSON object is expected"),
        ("\ufeff" + text, "no valid JSON"),
        ("[" * 100000, "no valid JSON"),
    ):
        (tmp_path / "config.json").write_text(wrong)
        with pytest.raises(RotQuantError, match=message):
            read_architecture(tmp_path)


ROPE = {
    "default": ({"rope_theta": 500000.0}, 131072),
    "linear": ({"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
    "llama3": ({"rope_theta": 500000.0, "rope_scaling": LLAMA31["rope_scaling"]}, 131072),
    "yarn": ({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 16.0, "truncate": False,
              "original_max_position_embeddings": 32768}}, 131072),
    "yarn by max_position_embeddings": ({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 2.0,
                                         "attention_factor": 1.2}}, 32768),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPE)
@pytest.mark.parametrize("kind", [llama, lambda *sizes, **more: qwen("Qwen3", *sizes, head_dim=64, **more)])
def test_accepted_rotary_settings_are_the_same_in_vllm(tmp_path, kind, name):
    """cos and sin of transformers and of vLLM, near 0 and near the longest position."""
    pytest.importorskip("vllm")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.transformers_utils.config import patch_rope_parameters

    more, longest = ROPE[name]
    arch = read(tmp_path, kind(256, 512, 1, 4, 2, max_position_embeddings=longest, **more))
    cos, sin = (table[0] for table in rotary(arch.config, longest))
    patch_rope_parameters(arch.config)
    with set_current_vllm_config(VllmConfig()):
        served = get_rope(arch.head_dim, longest, rope_parameters=arch.config.rope_parameters, dtype=torch.float32)
    assert len(served.cos_sin_cache) >= longest
    for at in (slice(0, 64), slice(longest - 64, longest)):
        mine = torch.cat((cos[at, : arch.head_dim // 2], sin[at, : arch.head_dim // 2]), dim=-1)
        assert (served.cos_sin_cache[at] - mine).abs().max() < 1e-3
