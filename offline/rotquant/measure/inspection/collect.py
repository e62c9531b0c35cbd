"""Where the rows come from: hooks on a running model.

    h                   input of attention's norm: the residual stream (not quantized)
    attn_in, mlp_in     input of the linears of queries, keys and values; of gate and up
    o_in, down_in       input of attention's output linear; of down, which in a mixture of experts none has alone
    k, v                as attention gets them, K after RoPE

A `QuantLinear` quantizes its input after its online transforms, so its rows are transformed here by the same ops. K and
V are seen by an attention function of our own that stands in the place of the model's and then calls it: transformers
looks it up by name, for full-precision models and for `rotquant.load`'s 4-bit cache alike. R3 is applied to K as
`kv4_write` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rotquant.checkpoint.quant_linear import QuantLinear
from rotquant.measure.inspection.routing import Choices, choices_watched
from rotquant.measure.inspection.statistics import SiteFormat, SiteStatistics
from rotquant.models import Architecture, Layer
from rotquant.models.mlp import Experts
from rotquant.weights.low_rank import without
from rotquant_kernels import transform
from rotquant_kernels.reference import hadamard

ATTENTION = "rotquant_inspected"

Formats = dict[tuple[int, str], SiteFormat]
Statistics = dict[tuple[int, str], SiteStatistics]


def watched_modules(kind: Layer) -> dict[str, str]:
    """The module of a layer at which each site is seen; K and V inside the one that calls attention."""
    first = {site: kind.stored_at(site)[0] for site in kind.sites}
    cached = {"k": kind.attention.module, "v": kind.attention.module} if kind.attends else {}
    behind = {"mlp_in": first["mlp"], "down_in": first["down"]}
    if isinstance(kind.mlp, Experts):  # the router reads what they read
        behind = {"mlp_in": f"{kind.mlp.module}.gate"}
    return {
        "h": kind.attention.norm, "attn_in": first["attn"], **cached, "o_in": first["o"], **behind,
    }  # fmt: skip


@torch.no_grad()
def collect(
    model: PreTrainedModel, arch: Architecture, formats: Formats, tokens: Tensor, step: Callable[[], object]
) -> tuple[Statistics, Choices]:
    """Runs the model over token windows and watches every site.

    Args:
        model: full precision or from `rotquant.load`; arch: its architecture.
        formats: of each (layer, site).
        tokens: int64 [windows, T]; step: called after each window.
    Returns:
        statistics of each (layer, site), and the experts that routers choose.
    """
    found: Statistics = {key: SiteStatistics(row_format) for key, row_format in formats.items()}
    decoder = model.get_decoder()
    hooks = [
        layer.get_submodule(path).register_forward_pre_hook(_watch(found[index, site]))
        for index, (kind, layer) in enumerate(zip(arch.kinds, decoder.layers, strict=True))
        for site, path in watched_modules(kind).items()
        if site not in ("k", "v")
    ]
    try:
        with _attention_watched(model, found), choices_watched(model, arch) as choices:
            for window in tokens:
                decoder(window[None].to(model.device), use_cache=False)
                step()
    finally:
        for hook in hooks:
            hook.remove()
    return found, choices


def quantized_input(module: nn.Module, x: Tensor) -> Tensor:
    """The rows that a linear quantizes: x float [..., K] after its online transform."""
    if not isinstance(module, QuantLinear):
        return x
    y, down = transform(x, module.stages), module.low_rank_down
    return without(y, down) if down is not None and module.format.subtracts else y


def _watch(statistics: SiteStatistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        statistics.add(quantized_input(module, inputs[0]).flatten(0, -2).unsqueeze(1))

    return hook


@contextmanager
def _attention_watched(model: PreTrainedModel, found: Statistics) -> Iterator[None]:
    """Puts a function that looks at K and V in front of the model's attention."""
    original = model.config._attn_implementation
    attend, mask = AttentionInterface()[original], AttentionMaskInterface()[original]

    def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
        for site, rows in (("k", key), ("v", value)):
            statistics = found[module.layer_idx, site]
            rows = rows[0].movedim(0, 1).float()  # [T, heads, d]
            statistics.add(hadamard(rows, statistics.format.rotate) if statistics.format.rotate else rows)
        return attend(module, query, key, value, *rest, **named)

    AttentionInterface.register(ATTENTION, watched)
    AttentionMaskInterface.register(ATTENTION, mask)
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(original)
