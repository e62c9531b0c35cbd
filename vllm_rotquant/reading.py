"""Whether vLLM's model code makes of config.json what transformers makes of it.

Two programs read one file, and a field that only one of them knows changes the computation without a word: vLLM's
Llama turns the part of a head that `partial_rotary_factor` says, transformers' always the whole; vLLM's Mistral
multiplies queries by `llama_4_scaling`. So the decoder layers that vLLM built are run beside transformers' own from the
checkpoint's config.json, before anything is fused. Both get the loaded norms and biases, and the same stand-ins for
what the rest of the start-up check is about, so that it costs next to nothing whatever the model's size and needs no
other rank:

    a linear layer   out[j] = x[perm(j)] * f(row) + bias[j]: a gather by a fixed permutation
    attention        softmax in float32 over a few tokens, with the scale that the engine passes

Rows are of common and of tiny size, where a norm's epsilon decides. Positions lie near 0 and near the served limit:
once in a short sequence and once in one of full length, since transformers' scalings of long contexts look at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from rotquant.errors import RotQuantError
from rotquant.models import describe, head_size, layer_configs
from vllm_rotquant import compat
from vllm_rotquant.witness import trial

STAND_IN = "rotquant_stand_in"
TINY = 1e-3  # its square is a usual epsilon
ROWS = 12
# vLLM's linear layers, and the sites of `rotquant.models` whose linears each of them is.
SITES = {"self_attn.qkv_proj": "attn", "self_attn.o_proj": "o", "mlp.gate_up_proj": "mlp", "mlp.down_proj": "down"}


@dataclass(frozen=True)
class Reading:
    """Largest distance of one comparison over rows and sequences, and where it was."""

    what: str
    layers: int
    error: float
    limit: float
    where: str
    meaning: str


def compare_readings(
    decoders: list[Any], final_norms: list[Any], config: Any, length: int, dtype: torch.dtype
) -> list[Reading]:
    """Compares one layer of each sort.

    Args:
        final_norms: vLLM's norm before lm_head, where this rank holds it.
        decoders: vLLM's decoder layers of this rank, of classes that `compat` knows, loaded and not yet fused.
        config: transformers' own reading of config.json; length: tokens that the server accepts in a sequence.
        dtype: of the served model.
    Raises:
        RotQuantError: the two differ in more than numbers.
    """
    sorts: dict[Any, list[Any]] = {}
    for decoder in decoders:
        attention = decoder.self_attn
        sorts.setdefault((id(attention.rotary_emb), attention.attn.impl.scale), []).append(decoder)
    found = []
    for layers in sorts.values():
        with float32_by_default():
            own = Own(layers[0], config)
            sequences = {tuple(range(min(ROWS, length))), spread(length)}
            rotary, whole = zip(*(own.distances(torch.tensor(s), dtype) for s in sorted(sequences)), strict=True)
        rounding = max(8 * torch.finfo(dtype).eps, 1e-4) + length * torch.finfo(torch.float32).eps
        whole += tuple(own.norm_distance(norm, dtype) for norm in final_norms)
        name = str(layers[0].self_attn.attn.layer_name).removesuffix(".self_attn.attn")
        rope = getattr(config, "rope_parameters", None)
        meaning = (
            f"because vLLM and transformers read config.json differently (rope_parameters {rope}, for sequences of up "
            f"to {length} tokens): mend config.json, or serve shorter ones with --max-model-len"
        )
        found.append(Reading("rotary", len(layers), worst(rotary), rounding, f"{name}.self_attn.rotary_emb", meaning))
        meaning = "because vLLM and transformers read some field of config.json differently: take out what one ignores"
        found.append(Reading("decoder layer", len(layers), worst(whole), rounding, name, meaning))
    return found


def spread(length: int) -> tuple[int, ...]:
    """Positions of a sequence of `length` tokens, near its start and its end and between."""
    wanted = (0, 1, 2, 3, 5, 17, 130, length // 3, length // 2, length - 3, length - 2, length - 1)
    return tuple(sorted({p for p in wanted if 0 <= p < length}))


@contextmanager
def float32_by_default() -> Iterator[None]:
    """vLLM loads models with another default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Own:
    """A decoder layer of vLLM and transformers' of the same config, norms and biases, in float32 on the CPU."""

    def __init__(self, decoder: Any, config: Any) -> None:
        self.decoder, attention = decoder, decoder.self_attn
        index = layer_number(decoder)
        kind, own = describe(config).kinds[index], layer_configs(config)
        config = deepcopy(own[index] if len(own) > 1 else config)
        rope = kind.attends and kind.attends.rope
        self.entry = {"layer_type": rope} if rope else {}
        self.parts = {name: kind.stored_at(site) for name, site in SITES.items()}
        for field in ("quantization_config", "rotquant"):
            if hasattr(config, field):
                delattr(config, field)
        kinds = getattr(config, "layer_types", None)
        if kinds:
            config.layer_types = kinds[index : index + 1]
        config.num_hidden_layers = 1
        # This rank's part: attention and MLP are the same function of fewer heads and channels.
        config.head_dim = head_size(config)
        config.num_attention_heads, config.num_key_value_heads = attention.num_heads, attention.num_kv_heads
        config.intermediate_size = decoder.mlp.down_proj.input_size_per_partition
        try:
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=STAND_IN)
        except Exception as error:
            raise RotQuantError(f"config.json: transformers does not build this model: {error}") from error
        self.layer, self.rotary = model.model.layers[0], type(model.model.rotary_emb)(config=config)
        self.norm = model.model.norm
        self.head_dim, self.hidden = config.head_dim, config.hidden_size
        self.apply_rotary: Any = __import__(type(self.layer).__module__, fromlist=["_"]).apply_rotary_pos_emb
        if attention.head_dim != self.head_dim:
            raise RotQuantError(f"vLLM builds heads of {attention.head_dim}, transformers of {self.head_dim}")
        self._take_parameters()

    def _take_parameters(self) -> None:
        """Gives transformers' layer vLLM's norms and biases."""
        theirs = dict(self.decoder.named_parameters())
        biases: dict[str, Tensor] = {}
        for fused, parts in self.parts.items():
            bias = theirs.get(f"{fused}.bias")
            sizes = [self.layer.get_submodule(part).out_features for part in parts]
            if bias is not None:
                biases |= dict(zip((f"{part}.bias" for part in parts), bias.split(sizes), strict=True))
        for name, own in list(self.layer.named_parameters()):
            module, _, leaf = name.rpartition(".")
            linear = isinstance(self.layer.get_submodule(module), nn.Linear)
            if linear and leaf == "weight":
                continue
            value = biases.pop(name, None) if linear else theirs.get(name)
            if value is None:
                raise RotQuantError(f"transformers reads {name} from config.json, vLLM builds its layers without it")
            if value.shape != own.shape:
                raise RotQuantError(f"{name} has shape {list(own.shape)} in transformers, {list(value.shape)} in vLLM")
            parameter = nn.Parameter(value.detach().float().cpu(), requires_grad=False)
            setattr(self.layer.get_submodule(module), leaf, parameter)
        for name in dict(self.layer.named_buffers()):
            module, _, leaf = name.rpartition(".")
            value = dict(self.decoder.named_buffers()).get(name)
            if value is None:
                raise RotQuantError(f"transformers reads {name} from config.json, vLLM builds its layers without it")
            setattr(self.layer.get_submodule(module), leaf, value.detach().float().cpu())
        norms = {name for name in theirs if "norm" in name} - {name for name, _ in self.layer.named_parameters()}
        if biases or norms:
            raise RotQuantError(f"vLLM builds its layers with {min({*biases, *norms})}, transformers without it")

    @torch.no_grad()
    def distances(self, positions: Tensor, dtype: torch.dtype) -> tuple[float, float]:
        """Of queries and keys after the rotary embedding, and of the layer's output; infinite where it has no table.

        Args:
            positions: int64 [T], ascending: of one sequence that ends with the last of them.
        """
        length, device = len(positions), next(self.decoder.parameters()).device
        rows = compat.rotary_rows(self.decoder.self_attn.rotary_emb)
        if rows is not None and rows <= int(positions[-1]):
            raise RotQuantError(
                f"config.json: vLLM has a rotary table of {rows} positions for sequences of up to {positions[-1] + 1} "
                f"tokens: serve with --max-model-len {rows}"
            )
        cos_sin = self.rotary(torch.zeros(1), positions[None], **self.entry)
        hidden = trial(length, self.hidden, dtype=dtype, device=device, seed=3)
        hidden[1::2] *= TINY
        served = self._served(positions.to(device), hidden)
        own = self._own(positions, hidden.float().cpu(), cos_sin)
        return self._rotary_distance(positions, cos_sin, dtype), row_distance(served, own)

    def _rotary_distance(self, positions: Tensor, cos_sin: tuple[Tensor, Tensor], dtype: torch.dtype) -> float:
        attention, device = self.decoder.self_attn, next(self.decoder.parameters()).device
        q, k = (
            trial(len(positions), heads * self.head_dim, dtype=dtype, device=device, seed=seed)
            for seed, heads in ((1, attention.num_heads), (2, attention.num_kv_heads))
        )
        heads = (x.float().cpu().unflatten(1, (-1, self.head_dim)).transpose(0, 1)[None] for x in (q, k))
        single = "q" not in signature(self.apply_rotary).parameters  # of queries and of keys for themselves
        both = [self.apply_rotary(x, *cos_sin) for x in heads] if single else self.apply_rotary(*heads, *cos_sin)
        own = (x[0].transpose(0, 1).flatten(1) for x in both)
        served = attention.rotary_emb(positions.to(device), q.clone(), k.clone())
        return worst([row_distance(a.flatten(1), b) for a, b in zip(served, own, strict=True)])

    @torch.no_grad()
    def norm_distance(self, norm: Any, dtype: torch.dtype) -> float:
        """Of the final norm, on rows of common and of tiny size."""
        rows = trial(4, self.hidden, dtype=dtype, device=norm.weight.device, seed=4)
        rows[1::2] *= TINY
        self.norm.weight = nn.Parameter(norm.weight.detach().float().cpu(), requires_grad=False)
        return row_distance(norm(rows), self.norm(rows.float().cpu()))

    def _served(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """vLLM's layer on hidden [T, hidden]."""
        attention = self.decoder.self_attn

        def attend(query: Tensor, key: Tensor, value: Tensor, *more: Any, **others: Any) -> Tensor:
            q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1).float() for x in (query, key, value))
            impl = attention.attn.impl
            cap = impl.cap if hasattr(impl, "cap") else impl.logits_soft_cap
            out = causal_attention(q, k, v, float(impl.scale), cap)
            return out.transpose(0, 1).flatten(1).to(query.dtype)

        with ExitStack() as stack:
            stack.enter_context(forward_of(attention.attn, attend))
            for fused, parts in self.parts.items():
                layer = self.decoder.get_submodule(fused)
                sizes = {part: self.layer.get_submodule(part).out_features for part in parts}
                stack.enter_context(forward_of(layer, served_stand_in(layer, sizes)))
            return compat.decoder_output(self.decoder, positions, hidden.clone())

    def _own(self, positions: Tensor, hidden: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        """transformers' layer on hidden float32 [T, hidden]."""
        with ExitStack() as stack:
            for part in (part for parts in self.parts.values() for part in parts):
                layer = self.layer.get_submodule(part)
                stack.enter_context(forward_of(layer, own_stand_in(layer, part)))
            takes = signature(self.layer.forward).parameters
            shared: dict[str, Any] = {"shared_kv_states": {}} if "shared_kv_states" in takes else {}
            out = self.layer(
                hidden[None], attention_mask=None, position_ids=positions[None], position_embeddings=cos_sin, **shared
            )
        return (out[0] if isinstance(out, tuple) else out)[0]


def layer_number(decoder: Any) -> int:
    """Which layer of its model a decoder layer is."""
    return int(decoder.self_attn.attn.layer_name.split(".layers.")[1].split(".")[0])


def gather(x: Tensor, part: str, outputs: int) -> Tensor:
    """The stand-in of a linear layer: x [..., T, K] to [..., T, outputs], every third and fourth row made tiny."""
    generator = torch.Generator("cpu").manual_seed(sum(map(ord, part)))
    order = torch.randperm(x.shape[-1], generator=generator, device="cpu")
    out = x[..., order.repeat(-(-outputs // len(order)))[:outputs].to(x.device)]
    rows = torch.arange(x.shape[-2], device=x.device) % 4 >= 2
    return torch.where(rows[:, None], out * TINY, out)


def own_stand_in(layer: nn.Linear, part: str) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        out = gather(x, part, layer.out_features)
        return out if layer.bias is None else out + layer.bias

    return forward


def served_stand_in(layer: Any, sizes: dict[str, int]) -> Callable[..., Any]:
    """Of a layer of vLLM that is several of the checkpoint's in one: name and outputs of each."""

    def forward(x: Tensor, *more: Any) -> Any:
        out = torch.cat([gather(x, part, outputs) for part, outputs in sizes.items()], -1)
        bias = getattr(layer, "bias", None)
        return (out if bias is None else out + bias), None

    return forward


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, cap: float | None = None) -> Tensor:
    """query float32 [..., heads, T, d]; key, value: [..., KV heads, T, d]; cap: on scores, None or 0 for none."""
    key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    scores = query @ key.mT * scale
    scores = (scores / cap).tanh() * cap if cap else scores
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value


def own_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scale, softcap).transpose(1, 2), None


AttentionInterface.register(STAND_IN, own_attention)


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Runs `module` with another forward for a while."""
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


def worst(errors: Sequence[float]) -> float:
    """The largest, NaN where there is one."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def row_distance(got: Tensor, expected: Tensor) -> float:
    """Largest distance of a row [T, n] relative to what was expected."""
    got = got.double().cpu()
    return float(((got - expected).norm(dim=-1) / expected.double().norm(dim=-1)).max())
