"""A decoder layer with quantization that gradients pass through, and the parameters that learning moves.

The forward pass is the served one: transforms folded by `fold`, weights, activations, K and V rounded by the numeric
convention (`quantizers`), weights to nearest. What learning changes is the content of a `LayerTransforms`:

    s_norms, s_ov, s_ud, s_qk    factors, learned as logarithms (they stay positive, and 1 is the neutral start)
    act_clip, kv_clip            clip ratios of the four sites, of keys and values, behind a sigmoid
    weight_clip                  one ratio for each scale of each weight matrix, behind a sigmoid (LWC of OmniQuant)
    r2                           a rotation for each KV head, kept orthogonal by its optimiser
    online                       the tensors of stages whose kind is learned (`rotquant_kernels.stages`)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rotquant.learn.names import dotted, key
from rotquant.learn.quantizers import fake_quantize, fake_quantize_weight
from rotquant.models import Layer, Tensors
from rotquant.models.decoder import Cache, Decoder, bias_of, kv4_cache
from rotquant.recipe import Recipe
from rotquant.transforms.fold import fold_layer
from rotquant.transforms.space import LayerTransforms
from rotquant.weights import rtn
from rotquant_kernels import KINDS, Stage, reference

Group = dict[str, Any]


class LayerParameters(nn.Module):
    """The learned part of one layer's transforms.

    Args:
        start: where learning begins; what is not learned stays as it is.
        learns: names of the table above.
        kind: the layer; where it has norms on queries and keys, s_qk is one row.
    """

    def __init__(self, start: LayerTransforms, learns: list[str], recipe: Recipe, kind: Layer):
        super().__init__()
        self.start, self.learns = start, learns
        hidden = kind.hidden
        sizes: dict[str, tuple[int, ...]] = {"s_attn": (hidden,), "s_mlp": (hidden,), "s_ud": (sum(kind.widths),)}
        if a := kind.attends:
            sizes |= {"s_qk": (1 if a.key_norm else a.kv_heads, a.qk_factors)}
            sizes |= {} if a.normed_values else {"s_ov": (a.kv_heads * a.head_dim,)}
        kinds = {"s_attn": "s_norms", "s_mlp": "s_norms"}
        self.scales, self.clips, self.stages = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for name, size in sizes.items():
            if kinds.get(name, name) in learns:
                first = getattr(start, name)
                self.scales[name] = nn.Parameter(torch.zeros(size) if first is None else first.float().log())
        clips: dict[str, dict[str, float]] = {
            "act_clip": dict.fromkeys(kind.sites, recipe.activations.clip),
            "kv_clip": {"key": recipe.kv.key_clip, "value": recipe.kv.value_clip} if kind.attends else {},
        }
        for group, defaults in clips.items():
            for name, default in defaults.items() if group in learns else ():
                ratio = start.clips.get(name, default)
                self.clips[name] = nn.Parameter(torch.tensor(ratio).clamp(max=0.98).logit())
        self.r2 = nn.Parameter(start.r2.float().clone()) if "r2" in learns and start.r2 is not None else None
        if "online" in learns:
            for site, stages in start.inputs.items():
                for i, stage in enumerate(stages):
                    if KINDS[stage.kind].learned:
                        first = KINDS[stage.kind].start(stage.held.float().clone())
                        self.stages[f"{site}-{i}"] = nn.Parameter(first)
        self.weight_clips = nn.ParameterDict()  # filled by `QuantizedLayer`, which knows the weights

    def transforms(self) -> LayerTransforms:
        """The transforms as they are now, with gradients; clips are left to `clip`."""
        now = LayerTransforms(**{name: getattr(self.start, name) for name in ("r2", "order", "bits")}, inputs={})
        for name in ("s_attn", "s_mlp", "s_ov", "s_ud", "s_qk"):
            setattr(now, name, self.scales[name].exp() if name in self.scales else getattr(self.start, name))
        if self.r2 is not None:
            now.r2 = self.r2
        for site, stages in self.start.inputs.items():
            now.inputs[site] = [self._stage(stage, f"{site}-{i}") for i, stage in enumerate(stages)]
        return now

    def _stage(self, stage: Stage, key: str) -> Stage:
        if key not in self.stages:
            return stage
        return stage._replace(tensor=KINDS[stage.kind].value(self.stages[key]))

    def clip(self, name: str, default: float) -> Tensor | float:
        """Clip ratio of a site, of "key" or of "value"."""
        if name in self.clips:
            return self.clips[name].sigmoid()
        return self.start.clips.get(name, default)

    @torch.no_grad()
    def result(self) -> LayerTransforms:
        """What was learned, for folding: on the CPU."""
        made = LayerTransforms.from_tensors({k: t.cpu().clone() for k, t in self.transforms().tensors().items()})
        made.clips = self.start.clips | {name: logit.sigmoid().item() for name, logit in self.clips.items()}
        made.weight_clips = {dotted(name): clip.sigmoid().cpu() for name, clip in self.weight_clips.items()}
        return made

    def groups(self, lr: float, clip_lr: float, rotation_lr: float) -> tuple[list[Group], list[Group]]:
        """Parameter groups for AdamW, and for an optimiser of rotations."""
        plain = [{"params": [*self.scales.values(), *self.stages.values()], "lr": lr}]
        plain += [{"params": [*self.clips.values(), *self.weight_clips.values()], "lr": clip_lr}]
        rotations = [{"params": [self.r2], "lr": rotation_lr}] if self.r2 is not None else []
        return [group for group in plain if group["params"]], rotations


class QuantizedLayer:
    """The forward pass of a layer as it will be served.

    Args:
        parameters: what is learned; decoder: how a layer computes; r3: Hadamard block on queries and keys.
        weight_bits: 16 leaves weights as they are; dtype: of the checkpoint's scales.
    """

    def __init__(
        self, parameters: LayerParameters, recipe: Recipe, decoder: Decoder, r3: int, weight_bits: int,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.parameters, self.recipe, self.decoder = parameters, recipe, decoder
        self.weights = replace(recipe.weights.form, bits=weight_bits) if weight_bits < 16 else None
        self.kv = recipe.kv.form(r3)
        self.dtype = dtype
        self.ratios: dict[str, Tensor] = {}

    def search_clips(self, base: Tensors) -> None:
        """Starts each weight scale's clip ratio at the one that `weights.rtn` would choose."""
        form = self.weights
        if form is None:
            return
        with torch.no_grad():
            folded = fold_layer(base, self.parameters.transforms(), self.decoder.kind)
        search = self.recipe.weights.clip_search
        for name in self.decoder.kind.linears:
            weight = folded[f"{name}.weight"]
            best = rtn.weight_scale(weight, form, torch.float32, clip_search=search)
            full = form.scale(form.grouped(weight)).squeeze(-1)
            self.ratios[name] = (best / full).clamp(max=1)
        if "weight_clip" in self.parameters.learns:
            for name, ratio in self.ratios.items():
                logit = ratio.clamp(max=0.98).logit()
                self.parameters.weight_clips[key(name)] = nn.Parameter(logit)

    def __call__(self, base: Tensors, h: Tensor) -> Tensor:
        """h' of h [..., T, hidden]; base: the layer's tensors, R1 folded."""
        transforms = self.parameters.transforms()
        kind = self.decoder.kind
        tensors = fold_layer(base, transforms, kind)
        for name in kind.linears:
            tensors[f"{name}.weight"] = self._weight(name, tensors[f"{name}.weight"])
        seen: tuple[Tensor, str, Tensor] | None = None  # the linears of a site that read one input share its rounding

        def linear(name: str, x: Tensor) -> Tensor:
            nonlocal seen
            if name not in kind.site_of:  # a router
                return nn.functional.linear(x, tensors[f"{name}.weight"])
            site = kind.site_of[name]
            if seen is None or seen[0] is not x or seen[1] != site:
                y = x
                for stage in transforms.inputs.get(site, []):
                    y = reference.online_stage(y, *stage)
                rows = self.parameters.start.rows(site, self.recipe.activations.rows)
                seen = x, site, fake_quantize(y, rows, self.parameters.clip(site, rows.clip))
            return nn.functional.linear(seen[2], tensors[f"{name}.weight"], bias_of(tensors, name))

        return self.decoder.layer(tensors, h, linear, self._cache() if self.kv else None)

    def _weight(self, name: str, weight: Tensor) -> Tensor:
        if self.weights is None:
            return weight
        learned = self.parameters.weight_clips
        ratio = learned[key(name)].sigmoid() if key(name) in learned else self.ratios[name]
        return fake_quantize_weight(weight, self.weights, ratio, self.dtype)

    def _cache(self) -> Cache:
        kv, clip = self.kv, self.parameters.clip
        assert kv is not None
        return kv4_cache(
            kv,
            lambda k: fake_quantize(k, kv.key, clip("key", kv.k_clip)),
            lambda v: fake_quantize(v, kv.value, clip("value", kv.v_clip)),
        )
