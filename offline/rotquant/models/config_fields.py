"""Every field of a full-precision model's config.json: known, off, harmless, or refused by name before any work.

transformers (which measures) and vLLM (which serves) read the same file with code of their own. A field that only
one of them honours makes what is served differ from what was measured, and nothing else would notice. So:

    KNOWN      changes what is computed, is read here or by transformers' own config class; its value is checked
    OFF        changes what is computed in one of the readers; accepted with the values that change nothing
    HARMLESS   training, generation, metadata: neither reader computes a logit with it

Any other field is refused. What an architecture has of its own is stated in its family's file (`config_rules.Known`).
"""

from __future__ import annotations

import json
from typing import Any

from rotquant.common.json_files import short
from rotquant.errors import RotQuantError
from rotquant.models.config_rope import ROPE_FIELDS, check_rope
from rotquant.models.config_rules import Known, Rule, boolean, number, one_of, texts, tokens, whole
from rotquant.models.registry import BY_CLASS, KNOWN_BY_CLASS
from rotquant.models.unsupported import REASONS
from rotquant.models.windows import SLIDING

Fields = dict[str, Any]


DTYPE = one_of("float32", "float16", "bfloat16", "torch.float32", "torch.float16", "torch.bfloat16")
LENGTH = whole(2, 2**25)  # positions; vLLM keeps a table of cosines for each of them
KNOWN: dict[str, Rule] = {
    "hidden_act": lambda value: None if isinstance(value, str) else "the name of an activation",
    "vocab_size": whole(2, 2**24),
    "hidden_size": whole(2, 2**17),
    "intermediate_size": whole(2, 2**20),
    "num_hidden_layers": whole(1, 1024),
    "num_attention_heads": whole(1, 1024),
    "num_key_value_heads": whole(1, 1024, null=True),
    "head_dim": whole(2, 1024, null=True),
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": number(0, 0.1, above=True),
    "tie_word_embeddings": boolean,
    "attention_bias": boolean,
    "mlp_bias": boolean,
    "attention_dropout": number(0, 1, null=True),
    "initializer_range": number(0, 1),
    "use_sliding_window": boolean,
    "sliding_window": whole(0, 2**31, null=True),  # Qwen2-MoE's config class writes 0 for none
    "max_window_layers": whole(0, 2**31, null=True),
    "layer_types": texts,
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
    "pad_token_id": tokens,
    "bos_token_id": tokens,
    "eos_token_id": tokens,
} | dict.fromkeys(  # vLLM takes the least of them as the longest context
    ("max_sequence_length", "max_seq_length", "max_seq_len", "model_max_length", "seq_length", "seq_len",
     "n_positions", "max_target_positions"),
    whole(2, 2**63, null=True),
)  # fmt: skip

# Names and the values with which they change nothing, then what they do otherwise.
OFF: dict[str, tuple[tuple[Any, ...], str]] = {
    "partial_rotary_factor": ((None, 1), "vLLM would turn a part of each head, transformers turns all of it"),
    "rotary_pct": ((None, 1), "vLLM would turn a part of each head, transformers turns all of it"),
    "dual_chunk_attention_config": ((None,), "vLLM would attend in chunks, transformers does not"),
    "attention_chunk_size": ((None,), "chunked attention is not supported"),
    "use_mrope": ((None, False), "positions of several axes are not supported"),
    "rope_interleaved": ((None, False), "neither transformers nor vLLM turns neighbouring channels in this model"),
    "no_rope_layers": ((None, []), "layers without rotary embedding are not supported"),
    "no_rope_layer_interval": ((None, 0), "layers without rotary embedding are not supported"),
    "is_causal": ((None, True), "attention in both directions is not supported"),
    "use_bidirectional_attention": ((None, False), "attention in both directions is not supported"),
    "llama_4_scaling": ((None,), "vLLM would scale the queries, transformers does not"),
    "attn_logit_softcapping": ((None,), "soft caps are not supported"),
    "final_logit_softcapping": ((None,), "soft caps are not supported"),
    "logit_scale": ((None, 1), "vLLM would scale the logits, transformers does not"),
    "logits_scaling": ((None, 1), "scaled logits are not supported"),
    "embedding_multiplier": ((None, 1), "scaled embeddings are not supported"),
    "residual_multiplier": ((None, 1), "scaled residuals are not supported"),
    "attention_multiplier": ((None,), "another scale of attention is not supported"),
    "bias": ((None, False), "vLLM would give the attention biases"),
    "qkv_bias": ((None, False), "vLLM would take it in place of attention_bias"),
    "use_bias": ((None, False), "this architecture has no such biases"),
    "qk_norm": ((None, False), "vLLM would normalize queries and keys, transformers does not"),
    "use_qk_norm": ((None, False), "norms of queries and keys are not supported in this architecture"),
    "ada_rms_norm_t_cond": ((None, False), "vLLM would condition the norms, transformers does not"),
    "quantization_config": ((None, {}), "the model is already quantized; start from the original"),
    "compression_config": ((None, {}), "the model is already quantized; start from the original"),
    "num_nextn_predict_layers": ((None, 0), "layers that predict further tokens are not supported"),
    "is_encoder_decoder": ((None, False), "only decoders are supported"),
    "add_cross_attention": ((None, False), "only decoders are supported"),
    "pruned_heads": ((None, {}), "pruned heads are not supported"),
    "chunk_size_feed_forward": ((None, 0), "it is not supported"),
    "return_dict": ((None, True), "transformers would return tuples"),
    "torchscript": ((None, False), "transformers would return tuples"),
}

OF_THE_FILE = """
    architectures model_type transformers_version _name_or_path _model_name_or_path _commit_hash name_or_path
    auto_map tokenizer_class
    transformers.js_config unsloth_version unsloth_fixed _attn_implementation_autoset _attn_implementation
    attn_implementation is_llama_config base_model license finetuning_task task_specific_params problem_type id2label
    label2id num_labels
"""
OF_TRAINING = """
    use_cache pretraining_tp attention_probs_dropout_prob hidden_dropout hidden_dropout_prob resid_pdrop embd_pdrop
    attn_pdrop resid_dropout embedding_dropout gradient_checkpointing use_flash_attention use_flash_attn
    _flash_attn_2_enabled output_attentions output_hidden_states return_dict_in_generate output_scores use_bfloat16
    tf_legacy_loss tie_encoder_decoder is_decoder cross_attention_hidden_size prefix
"""
OF_GENERATION = """
    do_sample temperature top_k top_p typical_p repetition_penalty length_penalty diversity_penalty early_stopping
    max_length min_length max_new_tokens num_beams num_beam_groups num_return_sequences no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    remove_invalid_values suppress_tokens begin_suppress_tokens decoder_start_token_id sep_token_id
    unk_token_id mask_token_id cls_token_id
"""
HARMLESS = frozenset((OF_THE_FILE + OF_TRAINING + OF_GENERATION).split())


# ---- the check --------------------------------------------------------------------------------------


def check_values(where: str, raw: Fields) -> None:
    """Refuses values that cannot be meant, in a config.json of a known architecture.

    Args:
        where: the file, for messages; raw: its content.
    Raises:
        RotQuantError: naming the field.
    """
    for name, value in raw.items():
        if name in KNOWN and (expected := KNOWN[name](value)):
            raise RotQuantError(f"{where}: {name} is {short(repr(value), 60)}, expected is {expected}")


def check_fields(where: str, raw: Fields) -> None:
    """Refuses a config.json that transformers and vLLM would not compute alike, or that is not supported.

    Args, Raises: as `check_values`.
    """
    known = check_architecture(where, raw)
    if raw.get("quantization_config"):
        raise RotQuantError(f"{where}: quantization_config: {OFF['quantization_config'][1]}")
    check_values(where, raw)
    field, name = known.activation
    if raw.get(field, name) != name:
        raise RotQuantError(f"{where}: {field} is {short(repr(raw[field]), 60)}, the supported activation is {name!r}")
    check_windows(where, raw, known)
    for name, value in raw.items():
        if name in known.fields:
            if expected := known.fields[name](value):
                raise RotQuantError(f"{where}: {name} is {short(repr(value), 60)}, expected is {expected}")
        elif name in OFF:
            check_off(where, name, raw)
        elif name not in KNOWN and name not in HARMLESS | known.harmless and name not in ROPE_FIELDS:
            raise RotQuantError(
                f"{where}: {short(name, 60)} is a field that rotquant does not know, and it may change what the model"
                " computes; remove it if it does not"
            )
    check_relations(where, raw, known)
    check_rope(where, raw, known)


def check_windows(where: str, raw: Fields, known: Known) -> None:
    """Refuses layers that are not supported, and windows that transformers and vLLM would not give to the same ones."""
    allowed = known.attention_layers + ((SLIDING,) if known.windows == "layers" else ())
    kinds, window, longest = (raw.get(name) for name in ("layer_types", "sliding_window", "max_position_embeddings"))
    if other := [kind for kind in kinds or [] if kind not in allowed]:
        raise RotQuantError(
            f"{where}: layer_types has layers other than {' or '.join(map(repr, allowed))}, such as"
            f" {short(repr(other[0]), 60)}, which is not supported in {raw['architectures'][0]}"
        )
    on = not known.window_switch or raw.get("use_sliding_window", False)
    if "sliding_window" in raw and SLIDING in (kinds or []) and not (on and window):
        off = f"sliding_window is {window}" if on else "use_sliding_window is not true"
        raise RotQuantError(f"{where}: layer_types has {SLIDING!r} layers, but {off}")
    if kinds and known.always_masks and "sliding_window" in raw and window is None:
        raise RotQuantError(
            f"{where}: layer_types: transformers reads this as a Ministral, which does not run without a"
            " sliding_window; take layer_types out"
        )
    if known.windows == "none":
        if window and not known.window_switch and (longest is None or window < longest):
            raise RotQuantError(
                f"{where}: sliding_window is {window}: vLLM would attend to a window, transformers'"
                f" {raw['architectures'][0]} does not; set it to null"
            )
    elif window == 0 and on:
        raise RotQuantError(f"{where}: sliding_window is 0: a token would not even see itself; null means no window")
    elif known.windows == "all" and kinds and window and on and (longest is None or window < longest):
        raise RotQuantError(
            f"{where}: layer_types: transformers' {raw['architectures'][0]} gives all layers the window of {window},"
            " whatever it says; take it out, or set sliding_window to null"
        )


def check_architecture(where: str, raw: Fields) -> Known:
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(BY_CLASS):
        found = short(repr(names or []), 80)
        reason = REASONS.get(str(names[0])) if isinstance(names, list) and names else None
        raise RotQuantError(
            f"{where}: architectures is {found}{f': {reason}' if reason else ''}, supported are {', '.join(BY_CLASS)}"
        )
    known = KNOWN_BY_CLASS[names[0]]
    if raw.get("model_type") != known.model_type:
        raise RotQuantError(
            f"{where}: model_type is {short(repr(raw.get('model_type')), 60)}, but {known.model_type!r} belongs to"
            f" {names[0]}: transformers goes by the one, vLLM by the other"
        )
    return known


def check_off(where: str, name: str, raw: Fields) -> None:
    """Refuses a field of `OFF` but for the values that change nothing; 1 and 1.0 are one value, 1 and True are not."""
    accepted, otherwise = OFF[name]
    value = raw[name]
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
        fine = " or ".join(json.dumps(one) for one in accepted)
        raise RotQuantError(f"{where}: {name} is {short(repr(value), 60)}: {otherwise}; it must be {fine}, or absent")


def check_relations(where: str, raw: Fields, known: Known) -> None:
    """What fields must be to each other. Fields that are absent have the default of transformers' config class."""
    for name, accepted in (("attention_bias", known.attention_bias), ("mlp_bias", known.mlp_bias)):
        if raw.get(name, accepted[0]) not in accepted:
            raise RotQuantError(
                f"{where}: {name} is true; with {raw['architectures'][0]} transformers and vLLM would have biases in"
                " different places"
            )
    if raw.get("attention_bias") and "qkv_bias" in raw:
        raise RotQuantError(f"{where}: qkv_bias: vLLM would take it in place of attention_bias; remove it")
    hidden, heads, size = (raw.get(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    if hidden and heads:
        if hidden % heads and not (size and known.own_head_dim):
            raise RotQuantError(f"{where}: hidden_size {hidden} is not divisible by num_attention_heads {heads}")
        if size and not known.own_head_dim and size * heads != hidden:
            raise RotQuantError(
                f"{where}: head_dim is {size}, but vLLM's {raw['architectures'][0]} takes hidden_size /"
                f" num_attention_heads, {hidden // heads}"
            )
        size = size or hidden // heads
    if size and size % 2:
        raise RotQuantError(f"{where}: head_dim is {size}; rotary embedding turns pairs of channels")
    if heads and (groups := raw.get("num_key_value_heads")) and heads % groups:
        raise RotQuantError(f"{where}: num_attention_heads {heads} is not divisible by num_key_value_heads {groups}")
    for one, other in known.synonyms:
        if one in raw and other in raw and raw[one] != raw[other]:
            raise RotQuantError(f"{where}: {one} is {raw[one]}, but {other} is {raw[other]}; they mean one thing")
    _check_tokens(where, raw)
    if isinstance(kinds := raw.get("layer_types"), list) and len(kinds) != raw.get("num_hidden_layers"):
        raise RotQuantError(f"{where}: layer_types has {len(kinds)} entries, not num_hidden_layers")
    if {"dtype", "torch_dtype"} <= raw.keys() and _plain(raw["dtype"]) != _plain(raw["torch_dtype"]):
        raise RotQuantError(f"{where}: dtype is {raw['dtype']!r}, but torch_dtype is {raw['torch_dtype']!r}")


def _check_tokens(where: str, raw: Fields) -> None:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = raw.get(name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and "vocab_size" in raw and token >= raw["vocab_size"]:
                raise RotQuantError(f"{where}: {name} {token} is outside the vocabulary of {raw['vocab_size']}")


def _plain(dtype: str) -> str:
    return dtype.removeprefix("torch.")
