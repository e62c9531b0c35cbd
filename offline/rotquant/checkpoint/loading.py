"""`rotquant.load`: a quantized checkpoint as a transformers model that runs the served ops.

The plain model is built from config.json with its parameters on the meta device, its quantized
`nn.Linear`s become `QuantLinear` (packed weights, `rotquant_kernels.linear`), and a checkpoint
with a 4-bit KV cache gets an attention function that rotates and quantizes K and V as the cache
would. Every tensor then comes from the files: one that is missing, unknown or of the wrong shape is
an error, so no random weight and no ignored transform can hide.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask

from rotquant.checkpoint.content import check_content
from rotquant.checkpoint.experts_format import experts_format
from rotquant.checkpoint.format import CheckpointFormat, claims
from rotquant.checkpoint.hub import fetch
from rotquant.checkpoint.layers import in_files
from rotquant.checkpoint.quant_experts import QuantExperts, Router
from rotquant.checkpoint.quant_linear import QuantLinear, StoredInput
from rotquant.checkpoint.sizes import check_sizes
from rotquant.checkpoint.source import Source
from rotquant.checkpoint.targets import check_targets
from rotquant.errors import RotQuantError
from rotquant.models import Architecture, read_config, torch_attention
from rotquant.models.attention import Attention
from rotquant_kernels import calls
from rotquant_kernels.formats import KVFormat

KV4_ATTENTION = "rotquant_kv4"
PAGE = 128  # tokens of a page


def load(path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> PreTrainedModel:
    """Loads a checkpoint that `rotquant quantize` wrote, of any profile.

    Args:
        path: the checkpoint's folder, or its hub id.
        dtype: of activations, embeddings and norms; None takes the one that config.json names.
        device: where the model runs. Load it there: packed weights are laid out for the device's kernel.
    Returns:
        A transformers causal language model in eval mode: forward, `generate` and padded batches work.
    Raises:
        RotQuantError: not such a checkpoint, a feature this build lacks, or a bad file or tensor.
    """
    folder = fetch(str(path))
    config = _config(folder)
    if not claims(getattr(config, "quantization_config", None), getattr(config, "rotquant", None)):
        raise RotQuantError(f"{folder}/config.json: not a rotquant checkpoint (it has no int4 weights and activations)")
    source = Source(folder)
    arch = check_sizes(config, source)
    model, checkpoint = _build(folder, arch, dtype)
    makers = _key_makers(model, arch) if checkpoint.kv and checkpoint.kv.feedback else {}
    _fill(model, arch, source, torch.device(device))
    for together in [module for module in model.modules() if isinstance(module, QuantExperts)]:
        together.prepare()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.prepare()
    for name, own in arch.attentions.items():
        attention: Any = model.get_submodule(name)
        attention.rotquant_kv, attention.rotquant_own = checkpoint.attention(name), own
        attention.rotquant_feedback = makers[name].key_feedback.unflatten(0, (own.kv_heads, -1)) if makers else None
    if (folder / "generation_config.json").exists():
        with _one_line(folder / "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _config(folder: Path) -> PreTrainedConfig:
    with _one_line(folder / "config.json"):
        return read_config(folder)


@contextmanager
def _one_line(file: Path) -> Iterator[None]:
    """Whatever transformers raises over a file, in one line."""
    try:
        yield
    except RotQuantError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise RotQuantError(f"{file}: transformers does not read it: {type(error).__name__}: {reason}") from error


# ---- attention over a 4-bit KV cache ----------------------------------------------------------------


def kv4_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, through the ops that serve: K and V go to pages of 4 bits and are read there.

    transformers' cache holds K and V unquantized, so that pages are written anew at every call. Quantization looks
    at one (token, head) only: it gives the same codes as writing each token once.

    Args:
        query: [B, heads, T, d]; key, value: [B, kv_heads, L, d].
        attention_mask: additive [B, 1, T, L], causal, with the layer's window, with padding on one side or none; None
            if all is visible.
    Returns:
        [B, T, heads, d] in query's dtype, 0 for padding; no attention weights.
    Raises:
        RotQuantError: another kind of mask, another soft cap than the architecture's, or sinks.
    """
    kv: KVFormat = module.rotquant_kv  # type: ignore[assignment]
    own: Attention = module.rotquant_own  # type: ignore[assignment]
    feedback: Tensor | None = module.rotquant_feedback  # type: ignore[assignment]
    if softcap != own.cap or s_aux is not None:
        raise RotQuantError("attention with sinks, or another soft cap than config.json's, has no 4-bit KV cache")
    window = own.window
    batch, heads, steps, dim = query.shape
    out = torch.zeros(batch, steps, heads, dim, dtype=query.dtype, device=query.device)
    scale = dim**-0.5 if scaling is None else scaling
    for b in range(batch):
        first, last = visible_range(attention_mask, b, steps, key.shape[2], window)
        skipped = max(0, first - (key.shape[2] - steps))  # queries of padding on the left
        rows = slice(skipped, skipped + min(steps - skipped, last - max(first, key.shape[2] - steps)))
        q, k, v = (x.transpose(0, 1) for x in (query[b, :, rows], key[b, :, first:last], value[b, :, first:last]))
        out[b, rows] = attend_pages(q, k, v, scale, kv, window, own.cap, feedback)
    return out, None


def visible_range(mask: Tensor | None, b: int, steps: int, length: int, window: int | None = None) -> tuple[int, int]:
    """First position of sequence b that any query sees, and the one after the last; the mask must be causal there."""
    if mask is None:
        if steps > 1:
            raise RotQuantError("attention over a 4-bit KV cache is causal: an attention mask is needed")
        return 0, length
    visible = mask[b, 0, :, :length] > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask[b, 0]
    seen = visible.any(0).nonzero()
    first, last = int(seen[0]), int(seen[-1]) + 1
    positions = torch.arange(length - steps, length, device=mask.device)[:, None]
    columns = torch.arange(length, device=mask.device)
    real = ((positions >= first) & (positions < last))[:, 0]
    expected = (columns >= first) & (columns <= positions)
    if window is not None:
        expected &= columns > positions - window
    if not torch.equal(visible[real], expected[real]):
        raise RotQuantError(
            "attention over a 4-bit KV cache runs causal masks with padding on one side only"
            + (f", here with a window of {window} positions" if window else "")
        )
    return first, last


def attend_pages(
    query: Tensor, key: Tensor, value: Tensor, scale: float, kv: KVFormat, window: int | None = None,
    cap: float | None = None, key_feedback: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of one sequence by the served ops.

    Args:
        query: [T, heads, d], the last T of L tokens; key, value: [L, kv_heads, d].
    Returns:
        [T, heads, d].
    """
    (length, kv_heads, dim), device = key.shape, key.device
    blocks = -(-length // PAGE)
    shape = (blocks, kv_heads, PAGE, kv.token_bytes(dim))
    pages = torch.zeros(shape, dtype=torch.uint8, device=device)
    calls.kv_write(key, value, pages, torch.arange(length, device=device), kv, key_feedback)
    starts, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, len(query)], [length]))
    table = torch.arange(blocks, dtype=torch.int32, device=device)[None]
    out = torch.empty(query.shape, dtype=query.dtype, device=device)
    calls.kv_attention(query, pages, starts, lengths, table, out, scale, kv, window, cap)
    return out


AttentionInterface.register(KV4_ATTENTION, kv4_attention)
AttentionMaskInterface.register(KV4_ATTENTION, eager_mask)


# ---- building ---------------------------------------------------------------------------------------


def _build(folder: Path, arch: Architecture, dtype: torch.dtype | None) -> tuple[PreTrainedModel, CheckpointFormat]:
    """The model without weights: parameters and QuantLinear's buffers on the meta device."""
    config = arch.config
    checkpoint = CheckpointFormat.of(config)
    check_targets(checkpoint, arch)
    del config.quantization_config
    implementation = KV4_ATTENTION if checkpoint.kv else torch_attention(arch)
    with _one_line(folder / "config.json"), _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype or config.dtype or torch.float32, attn_implementation=implementation
        )
    for name, layer in list(model.named_modules()):
        layer_format = checkpoint.linear(name) if isinstance(layer, nn.Linear) else None
        if layer_format is not None:
            model.set_submodule(name, QuantLinear(name, layer, layer_format))
    for index, block in arch.mixtures.items():
        prefix = arch.layer_prefix(index)
        router: Any = model.get_submodule(f"{prefix}{block.module}.gate")
        form = experts_format(checkpoint, prefix, block)
        made = QuantExperts(prefix, block, form, arch.hidden_size, router.weight.dtype)
        model.set_submodule(f"{prefix}{block.module}.experts", made)
        model.set_submodule(f"{prefix}{block.module}.gate", Router(block, router.weight))
    return model, checkpoint


def _key_makers(model: PreTrainedModel, arch: Architecture) -> dict[str, Any]:
    """The linears that make keys, by their attention modules, each with room for F of its keys' error feedback."""
    found: dict[str, Any] = {}
    for name, linear in arch.key_makers.items():
        own, maker = arch.attentions[name], model.get_submodule(linear)
        if not isinstance(maker, QuantLinear):
            raise RotQuantError(f"config.json: rotquant.key_feedback: {linear}, which makes keys, is not quantized")
        size = own.kv_heads * own.head_dim, own.head_dim
        maker.register_buffer("key_feedback", torch.empty(size, dtype=torch.float32, device="meta"))
        found[name] = maker
    return found


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Makes parameters without memory; buffers (RoPE's frequencies) are computed as usual."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        original(self, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


# ---- filling ----------------------------------------------------------------------------------------


def _fill(model: PreTrainedModel, arch: Architecture, source: Source, device: torch.device) -> None:
    """Puts every tensor of the checkpoint where it belongs; refuses one that belongs nowhere."""
    modules = {in_files(arch, name): module for name, module in model.named_modules()}
    for name in model.state_dict().keys() & dict(model.named_buffers()).keys():  # which must not stay as they are made
        owner_name, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner_name), leaf, model.get_buffer(name).to("meta"))
    for name, file in source.files.items():
        owner, leaf = _slot(modules, name)
        if owner is None:
            if not name.endswith("rotary_emb.inv_freq") and not (arch.beside and name.startswith(arch.beside)):
                raise RotQuantError(f"{file}: tensor {name} is not part of this model; without it the result is wrong")
            continue
        tensor = source.get(name)
        check_content(f"{file}: tensor {name}", name, tensor)
        if isinstance(owner, QuantLinear) and leaf == "weight_shape":
            _expect(file, name, "value", tensor.tolist(), [owner.out_features, owner.in_features])
        elif isinstance(owner, StoredInput):
            owner.load(f"{file}: tensor {name}", tensor, device)
        else:
            _assign(file, name, tensor, owner, leaf, device)
    _tie(model, source)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            missing = in_files(arch, name)
            raise RotQuantError(f"{source.folder}: tensor {missing} is missing; config.json asks for it")
    nn.Module.to(model, device)  # what is left: RoPE's frequencies


def _slot(modules: dict[str, nn.Module], name: str) -> tuple[nn.Module | None, str]:
    """The module and attribute that a tensor's name means; None where there is none."""
    owner_name, _, leaf = name.rpartition(".")
    owner = modules.get(owner_name)
    if owner is None:
        return None, ""
    only_checked = (QuantLinear, "weight_shape"), (StoredInput, "weight")
    known = leaf in owner.state_dict() or any(isinstance(owner, kind) and leaf == slot for kind, slot in only_checked)
    return (owner, leaf) if known else (None, "")


def _assign(file: Path, name: str, tensor: Tensor, owner: nn.Module, leaf: str, device: torch.device) -> None:
    wanted = getattr(owner, leaf)
    _expect(file, name, "shape", list(tensor.shape), list(wanted.shape))
    if tensor.dtype != wanted.dtype and not (tensor.is_floating_point() and wanted.is_floating_point()):
        raise RotQuantError(f"{file}: tensor {name} has dtype {tensor.dtype}, expected {wanted.dtype}")
    precise = leaf == "A_log" and tensor.dtype == torch.float32  # of linear attention, exponentiated: as vLLM has it
    tensor = tensor.to(device=device, dtype=torch.float32 if precise else wanted.dtype)
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if isinstance(wanted, nn.Parameter) else tensor)


def _tie(model: PreTrainedModel, source: Source) -> None:
    """Shares the embedding with an output layer that the config ties to it."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    target = model.get_output_embeddings()
    # vLLM takes the embedding in this case, whatever the file holds.
    if isinstance(target, QuantLinear) or not target.weight.is_meta:
        raise RotQuantError(
            f"{source.folder}/config.json: tie_word_embeddings is true, but lm_head has its own tensors"
        )
    target.weight = model.get_input_embeddings().weight


def _expect(file: Path, name: str, what: str, found: list[int], expected: list[int]) -> None:
    if found != expected:
        raise RotQuantError(f"{file}: tensor {name} has {what} {found}, config.json asks for {expected}")
