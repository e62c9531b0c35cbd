"""A decoder layer as the checkpoint holds it, with gradients: what `tune` moves after everything else is decided.

    scales   of the weights, as logarithms; the codes stay: W = c s, and x Wᵀ = (x cᵀ) s where a row has one scale
    gains    of the norms, the ones on queries and keys among them; a shift behind one goes along (`with_gains`)
    clips    ratios of the four sites' activations, of keys and values, behind a sigmoid
             (not those of keys with error feedback, which is for the one that they have)
    branch   D and U of the low-rank branch, in units of their RMS: steps are relative, as those of the others; a D that
             is taken off the inputs stays

What moves counts as the checkpoint will hold it. Rounding passes gradients straight through, and a clip ratio r sees
how its range moves what it rounds:

    y = r s (clamp(round(x / (r s) + z)) - z);   dy/dx = 1 inside (where it did not saturate), else 0;
    dy/dr = (y - x [inside]) / r

Unlike `quantizers`, no gradient goes through a row's extremes: with them fixed a step takes half the time. Products run
in `compute`, bfloat16 where the processor has it: codes and quantized activations are small integers times a scale, so
that little is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rotquant.learn.names import dotted, key
from rotquant.models import Tensors
from rotquant.models.decoder import Cache, Decoder, bias_of, kv4_cache
from rotquant.models.layer import Layer
from rotquant.models.mlp import Experts
from rotquant.recipe import Recipe
from rotquant.transforms.hadamard import hadamard_rows, undone_rows
from rotquant.transforms.space import LayerTransforms
from rotquant_kernels import Stage, reference
from rotquant_kernels.formats import RowFormat
from rotquant_kernels.formats.feedback import fake_quantize as fed_back

LARGEST_CLIP = 0.98  # where a clip ratio of 1 starts: a sigmoid never reaches 1


class TunedLayer(nn.Module):
    """One layer.

    Args:
        decoder: how it computes; transforms: its online stages and clips; r3: block of the Hadamard on q and k.
        tensors: what `LayerQuantizer` made of it, by the names of `decoder.kind`.
        learns: names of the table above; all else stays as it is.
        dtype: of the checkpoint, to which scales are rounded; compute: of the products.
    """

    def __init__(
        self, decoder: Decoder, transforms: LayerTransforms, r3: int, tensors: Tensors, recipe: Recipe,
        learns: Sequence[str], dtype: torch.dtype, compute: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        self.decoder, self.dtype, self.compute = decoder, dtype, compute
        self.rows = {site: transforms.rows(site, recipe.activations.rows) for site in decoder.kind.sites}
        kind = decoder.kind
        self.kv = recipe.kv.form(r3, transforms.clips) if kind.attends else None
        self.stages, self.start = transforms.inputs, transforms.clips
        self.key_feedback: Tensor | None = None
        if self.kv and self.kv.feedback and (attention := kind.attends):
            passed = tensors[f"{kind.holder(attention.key)}.key_feedback"]
            self.key_feedback = passed.unflatten(0, (attention.kv_heads, -1))
        self.forms = {site: transforms.weights(site, recipe.weights) for site in kind.sites}
        self.codes: Tensors = {}  # [N, G, K / G], of the dtype of products; those of routed experts as they are packed
        self.scales, self.gains = nn.ParameterDict(), nn.ParameterDict()
        self.clips, self.branch = nn.ParameterDict(), nn.ParameterDict()
        self.units: Tensors = {}
        self.fixed = {n: t for n, t in tensors.items() if n.rpartition(".")[0] in kind.linears and n.endswith(CONSTANT)}
        for name in kind.linears:
            packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"].float()
            self.codes[name] = packed if kind.shares[name] < 1 else self._unpacked(name, packed, scale.shape[1])
            self.scales[key(name)] = nn.Parameter(scale.log().unsqueeze(-1))
            parts = ("low_rank_up",) if recipe.weights.subtracts else ("low_rank_down", "low_rank_up")
            for part in parts:
                if f"{name}.{part}" in tensors:
                    factor, named = tensors[f"{name}.{part}"].float(), key(f"{name}.{part}")
                    self.units[named] = factor.square().mean().sqrt().clamp(min=torch.finfo().tiny)
                    self.branch[named] = nn.Parameter(factor / self.units[named])
        subtracted = kind.branch_sites if recipe.weights.subtracts else ()
        self.directions = {site: tensors[f"{kind.sites[site][0]}.low_rank_down"].float() for site in subtracted}
        self.fixed |= {name: tensors[name] for name in kind.kept}
        exact = (name for names in kind.full_precision.values() for name in names)
        self.fixed |= {f"{name}.weight": tensors[f"{name}.weight"].float() for name in exact}
        for norm in kind.every_norm:
            self.gains[key(norm)] = nn.Parameter(tensors[f"{norm}.weight"].float())
        self.before = {name: tensors[name].clone() for name in kind.gains}
        for name, ratio in self._ratios().items():
            self.clips[name] = nn.Parameter(torch.tensor(ratio).clamp(max=LARGEST_CLIP).logit())
        for group in ("scales", "gains", "clips", "branch"):
            getattr(self, group).requires_grad_(group in learns)
        if "clips" not in learns:
            self.clips = nn.ParameterDict()

    def _ratios(self) -> dict[str, float]:
        known = {site: rows.clip for site, rows in self.rows.items()}
        cached = {"key": self.kv.k_clip, "value": self.kv.v_clip} if self.kv else {}
        if self.key_feedback is not None:
            del cached["key"]
        return known | cached

    def _clipped(self, name: str, rows: RowFormat) -> tuple[RowFormat, Tensor | None]:
        """The format of a site, of "key" or of "value", and the clip ratio that has a gradient."""
        if name not in self.clips:
            return rows.clipped(self.start.get(name)), None
        ratio = self.clips[name].sigmoid()
        return rows.clipped(ratio.item()), ratio

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """h' of h [..., T, hidden], float32; and the router's logits [N, experts], where there is one."""
        tensors = self.fixed | self._gains()
        stages = with_gains(self.stages, self.decoder.kind, self.before, tensors)
        # The linears of a site share its rounding, and what the branch of its inputs has taken off.
        seen: tuple[Tensor, str, Tensor, Tensor, Tensor | None] | None = None
        exact: Tensors = {}  # what linears in full precision make

        def linear(name: str, x: Tensor) -> Tensor:
            nonlocal seen
            if name not in self.decoder.kind.site_of:
                exact[name] = nn.functional.linear(x.float(), tensors[f"{name}.weight"])
                return exact[name]
            site = self.decoder.kind.site_of[name]
            if seen is None or seen[0] is not x or seen[1] != site:
                y = transformed(x.float(), stages.get(site, []))
                z = y @ self.directions[site] if site in self.directions else None
                seen = x, site, y, self._rounded(site, y if z is None else y - z @ self.directions[site].T), z
            made, (y, z) = self._product(name, seen[3]), (seen[2], seen[4])
            down, up = (key(f"{name}.low_rank_{part}") for part in ("down", "up"))
            if up in self.branch:
                along = y.to(self.compute) @ self._low(down) if z is None else z.to(self.compute)
                made = made + along @ self._low(up)
            bias = bias_of(tensors, name)
            return made if bias is None else made + bias.float()

        after = self.decoder.layer(tensors, h, linear, self._cache() if self.kv else None)
        block = self.decoder.kind.mlp
        return after, exact[block.router] if isinstance(block, Experts) else None

    def _product(self, name: str, x: Tensor) -> Tensor:
        """x Wᵀ in the dtype of products, as it is served; the scales as stored."""
        codes, scale = self.codes[name], self.scales[key(name)].exp()
        scale = as_stored(scale, scale.detach().to(self.dtype))
        unpack = partial(self._unpacked, name, groups=scale.shape[1])
        if scale.shape[1] == 1:  # no gradient of W is needed for that of s
            made = Unpacking.apply(x, codes, unpack) if codes.dim() == 2 else nn.functional.linear(x, codes.flatten(1))
            return made * scale.flatten().to(self.compute)
        codes = unpack(codes) if codes.dim() == 2 else codes
        return nn.functional.linear(x, (codes * scale.to(self.compute)).flatten(1))

    def _unpacked(self, name: str, packed: Tensor, groups: int) -> Tensor:
        """Codes [N, G, K / G]."""
        kind = self.decoder.kind
        codes = self.forms[kind.site_of[name]].unpack(packed, kind.shapes[name][1])
        return codes.to(self.compute).unflatten(1, (groups, -1))

    def _gains(self) -> Tensors:
        found = {f"{dotted(name)}.weight": gain for name, gain in self.gains.items()}
        return {name: self._stored(name, gain) for name, gain in found.items()}

    def _low(self, name: str) -> Tensor:
        return self._factor(name).to(self.compute)

    def _factor(self, name: str) -> Tensor:
        return self._stored(dotted(name), self.branch[name] * self.units[name])

    def _stored(self, name: str, value: Tensor) -> Tensor:
        """What the checkpoint holds of a tensor that moves, with the gradient of the tensor."""
        rounded = self.decoder.kind.rounded(name, value.detach(), self.dtype)
        return as_stored(value, rounded)

    def _rounded(self, site: str, y: Tensor) -> Tensor:
        rounded: Tensor = Rounded.apply(y, *self._clipped(site, self.rows[site]))
        return rounded.to(self.compute)

    def _cache(self) -> Cache:
        kv = self.kv
        assert kv is not None

        def of_key(k: Tensor) -> Tensor:
            if self.key_feedback is None:
                made: Tensor = Rounded.apply(k, *self._clipped("key", kv.key))
                return made
            rounded: Tensor = StraightThrough.apply(k, fed_back(k.detach(), kv.key, self.key_feedback))
            return rounded

        return kv4_cache(
            kv,
            of_key,
            lambda v: Rounded.apply(v, *self._clipped("value", kv.value)),
            hadamard_rows,
        )

    @torch.no_grad()
    def result(self, tensors: Tensors) -> tuple[Tensors, dict[str, float]]:
        """`tensors` with what was learned, as the checkpoint stores it, and the clip ratios."""
        out = dict(tensors)
        for name, log_scale in self.scales.items():
            out[f"{dotted(name)}.weight_scale"] = log_scale.exp().squeeze(-1).to(self.dtype).cpu()
        moved = self._gains() | {dotted(name): self._factor(name) for name in self.branch}
        out |= {name: self.decoder.kind.rounded(name, value, self.dtype).cpu() for name, value in moved.items()}
        return out, self.start | {name: logit.sigmoid().item() for name, logit in self.clips.items()}


CONSTANT = (".bias", ".shift")


def with_gains(
    stages: Mapping[str, list[Stage]], kind: Layer, before: Tensors, after: Tensors
) -> dict[str, list[Stage]]:
    """The online stages of a layer whose norms' gains have moved from g to g' = r g: the shift of what a norm makes
    goes along, where nothing but Hadamards comes before it.

    Of x = g n and a turn T, m' = ((m T⁻¹) r) T, and what m adds to the output stays:

        (x' T - m') Wᵀ + m Wᵀ = (r (x - m T⁻¹)) T Wᵀ + m Wᵀ

    so that a gain scales what differs from the mean. With m as it was, (r - 1) m would be left to round, and r has the
    steps of the checkpoint's dtype, which channels with a large mean make as large as all else.

    Args:
        before, after: `<norm>.weight` [hidden], those of `after` as they are stored.
    """
    moved = dict(stages)
    for site, norm in kind.norms.items():
        chain = stages.get(site, [])
        place = next((i for i, stage in enumerate(chain) if stage.kind == "shift"), None)
        if place is None or any(stage.kind != "hadamard" for stage in chain[:place]):
            continue
        turn, mean = chain[:place], chain[place].held.float()
        g, now = (tensors[f"{norm}.weight"].float() for tensors in (before, after))
        ratio = torch.where(g == 0, 1.0, now / g.masked_fill(g == 0, 1.0))
        for stage in reversed(turn):
            mean = undone_rows(mean, stage.block)
        mean = transformed(mean * ratio, turn)
        moved[site] = [*turn, chain[place]._replace(tensor=mean), *chain[place + 1 :]]
    return moved


def transformed(x: Tensor, stages: list[Stage]) -> Tensor:
    """x behind the online stages; Hadamards by two products, which cost less memory and time with gradients."""
    for stage in stages:
        x = hadamard_rows(x, stage.block) if stage.kind == "hadamard" else reference.stage_rows(x, *stage)
    return x


class StraightThrough(torch.autograd.Function):
    """The second, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def as_stored(value: Tensor, stored: Tensor) -> Tensor:
    """`stored` as float32, with the gradient of the float32 tensor that it was rounded from."""
    made: Tensor = StraightThrough.apply(value, stored.float())
    return made


class Unpacking(torch.autograd.Function):
    """x cᵀ of codes c that are unpacked when they are needed, and again for the gradient: experts are many."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, unpack: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.packed, ctx.unpack = packed, unpack
        return nn.functional.linear(x, unpack(packed).flatten(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] @ ctx.unpack(ctx.packed).flatten(1), None, None


class Rounded(torch.autograd.Function):
    """x as it comes back from a row format, whose clip ratio `clip` is where that is learned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: RowFormat, clip: Tensor | None) -> Tensor:
        scale, zero = rows.qparams(x)
        out, inside = rows.nearest((x / scale).add_(zero))
        out.sub_(zero).mul_(scale)
        ctx.ratio = rows.clip
        ctx.save_for_backward(inside, *((x, out) if ctx.needs_input_grad[2] else ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        grad, (inside, *kept) = grads[0], ctx.saved_tensors
        grad_x = torch.where(inside, grad, 0.0)  # a product with booleans takes three times as long
        by_clip = ((grad * kept[1]).sum() - (grad_x * kept[0]).sum()) / ctx.ratio if kept else None
        return grad_x, None, by_clip
