"""Folding: the algebra that turns a model into an equal one that is easier to quantize.

Row tokens, y = x Wᵀ, RMSNorm(x) = (x / rms(x)) diag(g). For orthogonal R, rms(x R) = rms(x), hence:

    gain   W' = W diag(g), g' = 1            (x/rms) diag(g) Wᵀ = (x/rms) W'ᵀ
    R1     E' = E R1;  W' = W R1 reading the residual stream;  W' = R1ᵀ W, b' = b R1 writing to it
                                              x R1 (W R1)ᵀ = x Wᵀ;  y (R1ᵀ W)ᵀ = (y Wᵀ) R1
    S_n    g' = g s;  W' = W diag(1/s)       (x diag(s)) (W diag(1/s))ᵀ = x Wᵀ
    S_ov   W_v' = diag(s) W_v, b_v' = b_v s;  W_o[:, h]' = W_o[:, h] diag(1/s) for each query head h of the group
    R2     per KV head: W_v' = R2ᵀ W_v, b_v' = b_v R2;  W_o[:, h]' = W_o[:, h] R2 for each query head h
                                              attention mixes tokens, not channels: both pass through it. A gate behind
                                              it lets S_ov through, (v diag(s)) ∘ g = (v ∘ g) diag(s), but not R2;
                                              a norm of each head's values, v / rms(v), lets R2 through and S_ov not
    S_ud   W_up' = diag(s) W_up;  W_down' = W_down diag(1/s)        silu(gate) up is linear in up
    order  rows p of gate and up, columns p of down
                                              of a mixture S_ud and the order hold the channels of one expert after the
                                              other; router and experts read one residual stream: gain, R1, S_n alike
    S_qk   k diag(s), q diag(1/s), the same s in both channels of a RoPE pair: then it commutes with RoPE; any s in a
           channel that RoPE leaves alone
    input  an online T before a linear (R4 among them): W' = W T⁻ᵀ                 x T (W T⁻ᵀ)ᵀ = x Wᵀ
    shift  x - b before a linear adds b Wᵀ to its output:                       (x - b) Wᵀ + b Wᵀ = x Wᵀ
    R3     nothing to fold: q R3 (k R3)ᵀ = q kᵀ, both online after RoPE

Linear attention takes the gain and R1 at its inputs and R1 at its output, nothing else (`models.delta`).
Scalars on embeddings, queries, what a block writes, or logits are left where they are: every line commutes with them.

In float64. Nothing is changed in place, so that learning can differentiate through it. A layer is a dict of tensors
by the names of its `models.Layer`; `<linear>.shift` is b Wᵀ, where there is one.

Every line above is W' = L W R: one factor on the outputs, one on the inputs. A low-rank change of a weight, W + B A,
therefore folds as its two factors do, L (W + B A) R = W' + (L B) (A R). A layer may hold them as `<linear>.lora_A`
[r, inputs] and `<linear>.lora_B` [outputs, r], with its weights or without them. They stand beside the online stages,
not behind: A reads the x that the stages read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rotquant.models import Architecture, Layer, Tensors
from rotquant.models.attention import Attention
from rotquant.models.expert_tensors import by_expert, each
from rotquant.transforms.space import LayerTransforms, Rotation, Transforms
from rotquant_kernels import KINDS, Stage

Change = Callable[[Tensor], Tensor]
VOCABULARY_ROWS = 8192  # of embeddings or lm_head, to be folded at a time: float64 is large


class Fold:
    """Folds a model's transforms into its tensors."""

    def __init__(self, arch: Architecture, transforms: Transforms) -> None:
        self.arch, self.transforms, self.r1 = arch, transforms, transforms.r1

    def embedding(self, weight: Tensor) -> Tensor:
        """E R1 for the rows of the embedding [vocab, hidden], in float64."""
        weight = weight.double()
        return self.r1.rows(weight) if self.r1 else weight

    def head(self, weight: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """lm_head [vocab, hidden] and the final norm's gain [hidden] that stays outside."""
        weight, gain = weight.double(), gain.double()
        if not self.r1:
            return weight, gain
        return self.r1.rows(weight * gain), torch.ones_like(gain)

    def layer(self, tensors: Tensors, index: int) -> Tensors:
        """The folded tensors of decoder layer `index`, float64."""
        out, kind = each(tensors, Tensor.double), self.arch.kinds[index]
        if self.r1:
            out = fold_r1(out, self.r1, kind)
        return fold_layer(out, self.transforms.layers[index], kind)


def by_rows(weight: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function over slices of rows, so that float64 copies stay small."""
    return torch.cat([function(rows) for rows in weight.split(VOCABULARY_ROWS)])


def on_inputs(out: Tensors, linear: str, change: Change) -> None:
    """Changes what holds the inputs of a linear in its last dimension."""
    for name in (f"{linear}.weight", f"{linear}.lora_A"):
        if name in out:
            out[name] = change(out[name])


def on_outputs(out: Tensors, linear: str, change: Change) -> None:
    """Changes what holds the outputs of a linear in its first dimension; a bias has no other."""
    for name in (f"{linear}.weight", f"{linear}.lora_B", f"{linear}.bias"):
        if name in out:
            out[name] = change(out[name])


def readers(kind: Layer, site: str) -> tuple[str, ...]:
    """The linears that read the norm of a site, quantized or not."""
    return kind.sites[site] + kind.full_precision[site]


@by_expert
def fold_gains(tensors: Tensors, kind: Layer) -> Tensors:
    """The norms' gains into the weights that they feed, in the dtype of the tensors."""
    out = dict(tensors)
    for site, norm in kind.norms.items():
        gain = out[f"{norm}.weight"]
        for linear in readers(kind, site):
            multiply_inputs(out, linear, gain)
        out[f"{norm}.weight"] = torch.ones_like(gain)
    return out


@by_expert
def fold_r1(tensors: Tensors, r1: Rotation, kind: Layer) -> Tensors:
    """The norms' gains and R1, in the dtype of the tensors."""
    out = fold_gains(tensors, kind)
    for site in kind.norms:
        for linear in readers(kind, site):
            on_inputs(out, linear, r1.rows)
    for linear in kind.writes:
        on_outputs(out, linear, r1.columns)
    return out


@by_expert
def fold_layer(tensors: Tensors, t: LayerTransforms, kind: Layer) -> Tensors:
    """Everything but R1, in the dtype of the tensors."""
    out = dict(tensors)
    for site in kind.norms:
        if (scale := t.norm_scale(site)) is not None:
            fold_norm_scale(out, kind, site, scale)
    if attention := kind.attends:
        fold_attention(out, t, attention)
    if t.s_ud is not None:
        for mlp, factors in zip(kind.mlp.gated, t.s_ud.split(kind.widths), strict=True):
            multiply_outputs(out, mlp.up, factors)
            divide_inputs(out, mlp.down, factors)
    if t.order is not None:
        fold_order(out, t.order, kind)
    for site, stages in t.inputs.items():
        for linear in kind.sites[site]:
            if f"{linear}.weight" in out:
                fold_stages(out, linear, stages)
    return out


def fold_attention(out: Tensors, t: LayerTransforms, attention: Attention) -> None:
    """What goes between queries and keys, and from values to the output linear."""
    if t.s_qk is not None:
        fold_qk(out, t.s_qk, attention)
    if t.s_ov is not None:
        fold_values_scale(out, t.s_ov, attention)
    if t.r2 is not None:
        fold_r2(out, t.r2, attention)


def multiply_outputs(out: Tensors, linear: str, factors: Tensor) -> None:
    on_outputs(out, linear, lambda w: w * factors.to(w).view(-1, *(1,) * (w.dim() - 1)))


def multiply_inputs(out: Tensors, linear: str, factors: Tensor) -> None:
    on_inputs(out, linear, lambda w: w * factors.to(w))


def divide_inputs(out: Tensors, linear: str, factors: Tensor) -> None:
    on_inputs(out, linear, lambda w: w / factors.to(w))


def fold_norm_scale(out: Tensors, kind: Layer, site: str, scale: Tensor) -> None:
    gain = out[f"{kind.norms[site]}.weight"]
    out[f"{kind.norms[site]}.weight"] = gain * scale.to(gain)
    for linear in readers(kind, site):
        divide_inputs(out, linear, scale)


def fold_qk(out: Tensors, s_qk: Tensor, a: Attention) -> None:
    """S_qk goes to the norms of queries and keys where the model has them: they come behind the linears, unmixed."""
    paired, single = s_qk[:, : a.rotary // 2], s_qk[:, a.rotary // 2 :]
    factors = torch.cat((paired, paired, single), dim=-1)  # RoPE turns channel i into i + rotary / 2
    if a.key_norm and a.query_norm:
        key, query = out[f"{a.key_norm}.weight"], out[f"{a.query_norm}.weight"]
        out[f"{a.key_norm}.weight"] = key * factors[0].to(key)
        out[f"{a.query_norm}.weight"] = query / factors[0].to(query)
        return
    multiply_outputs(out, a.key, factors.flatten())
    multiply_outputs(out, a.query, per_query_head(1 / factors, a).flatten())


def per_query_head(per_kv_head: Tensor, a: Attention) -> Tensor:
    """[kv_heads, ...] to [heads, ...]: query heads h share KV head h // (heads / kv_heads)."""
    return per_kv_head.repeat_interleave(a.heads // a.kv_heads, dim=0)


def fold_values_scale(out: Tensors, s_ov: Tensor, a: Attention) -> None:
    multiply_outputs(out, a.value, s_ov)
    divide_inputs(out, a.output, per_query_head(s_ov.view(a.kv_heads, a.head_dim), a).flatten())


def fold_r2(out: Tensors, r2: Tensor, a: Attention) -> None:
    def values(w: Tensor) -> Tensor:
        by_head = w.reshape(a.kv_heads, a.head_dim, -1)  # [kv_heads, d, hidden]; [kv_heads, d, 1] for a bias
        return (r2.to(w).mT @ by_head).reshape(w.shape)

    def mixed(w: Tensor) -> Tensor:
        by_head = w.unflatten(1, (-1, a.head_dim)).transpose(0, 1)  # [heads, hidden, d]
        return (by_head @ per_query_head(r2.to(w), a)).transpose(0, 1).flatten(1)

    on_outputs(out, a.value, values)
    on_inputs(out, a.output, mixed)


def fold_order(out: Tensors, order: Tensor, kind: Layer) -> None:
    for mlp, own in zip(kind.mlp.gated, order.split(kind.widths), strict=True):
        inside = own - own.min()  # each expert's channels among themselves
        for linear in (mlp.gate, mlp.up):
            on_outputs(out, linear, partial(torch.index_select, dim=0, index=inside))
        on_inputs(out, mlp.down, partial(torch.index_select, dim=1, index=inside))


def fold_stages(out: Tensors, linear: str, stages: list[Stage]) -> None:
    """W' = W T⁻ᵀ for each stage in turn; what affine ones take from the output is added up in `<linear>.shift`."""
    weight = out[f"{linear}.weight"]
    for stage in stages:
        kind = KINDS[stage.kind]
        if (moved := kind.moved(weight, stage)) is not None:
            out[f"{linear}.shift"] = out.get(f"{linear}.shift", 0) + moved
        weight = kind.weights(weight, stage)
    out[f"{linear}.weight"] = weight
