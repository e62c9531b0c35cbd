"""Classes that are asked for and not supported, each with what it has that would have to be exact and is not."""

from __future__ import annotations

_UNIFIED = "vLLM has no class of this name: give the text half that of Gemma4ForCausalLM, model_type 'gemma4_text'"
_HYBRID_MIXTURE = "mixtures of experts beside linear attention are not supported"
_GEMMA3N = "several residual streams and embeddings for each layer are not supported"

REASONS: dict[str, str] = {
    "Gemma4UnifiedForCausalLM": _UNIFIED,
    "Gemma3nForCausalLM": _GEMMA3N,
    "Gemma3nForConditionalGeneration": _GEMMA3N,
    "GptOssForCausalLM": "attention sinks, and experts with biases, are not supported",
    "Phi3SmallForCausalLM": "vLLM has dropped this model, and attention in sparse blocks is not supported",
    "Qwen3NextForCausalLM": _HYBRID_MIXTURE,
    "Qwen3_5MoeForCausalLM": _HYBRID_MIXTURE,
    "Qwen3_5MoeForConditionalGeneration": _HYBRID_MIXTURE,
}
