"""The experts of a layer of a transformers model on packed integer weights, and the router that chooses them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rotquant.checkpoint.experts_format import ExpertsFormat
from rotquant.checkpoint.quant_linear import QuantLinear
from rotquant.models.mixture import route
from rotquant.models.mlp import Experts, GatedMLP
from rotquant_kernels import calls, prepare_experts


class Router(nn.Module):
    """Chooses the experts of each token as the server does: weights stay in float32."""

    def __init__(self, block: Experts, weight: nn.Parameter) -> None:
        super().__init__()
        self.block, self.weight = block, weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [..., hidden] to logits [N, experts], weights float32 [N, top_k] and experts int64 [N, top_k]."""
        logits = nn.functional.linear(x.flatten(0, -2), self.weight)
        routing = route(self.block, logits)
        return logits, routing.weights, routing.chosen


class QuantExperts(nn.Module):
    """All experts of a layer; the forward is the op that is served.

    Modules: `<j>.gate_proj` and so on (`QuantLinear`) until `prepare`, which puts them together in the layout of the
    device's kernel: up, down uint8 or int32 [experts, ...], up_scale, down_scale float32 [experts, N, G].
    """

    up: Tensor
    up_scale: Tensor
    down: Tensor
    down_scale: Tensor

    def __init__(self, prefix: str, block: Experts, form: ExpertsFormat, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.block, self.form, self.hidden = block, form, hidden
        for j, mlp in enumerate(block.routed):
            self.add_module(str(j), self._expert(prefix, mlp, dtype))

    def _expert(self, prefix: str, mlp: GatedMLP, dtype: torch.dtype) -> nn.Module:
        made, form, hidden = nn.Module(), self.form, self.hidden
        for name, inputs, outputs, linear in (
            (mlp.gate, hidden, mlp.width, form.up),
            (mlp.up, hidden, mlp.width, form.up),
            (mlp.down, mlp.width, hidden, form.down),
        ):
            plain = nn.Linear(inputs, outputs, bias=False, dtype=dtype, device="meta")
            made.add_module(name.rpartition(".")[2], QuantLinear(prefix + name, plain, linear))
        return made

    def prepare(self) -> None:
        """Puts the loaded experts together; their own modules go."""
        experts = [self.get_submodule(str(j)) for j in range(self.block.count)]
        gates, ups, downs = (
            [expert.get_submodule(leaf) for expert in experts]
            for leaf in (self.block.gate, self.block.up, self.block.down)
        )
        for j in range(self.block.count):
            delattr(self, str(j))
        bits, width = self.form.up.weights.bits, self.block.width
        up, up_scale = (
            torch.stack([torch.cat((getattr(g, leaf), getattr(u, leaf))) for g, u in zip(gates, ups, strict=True)])
            for leaf in ("weight_packed", "weight_scale")
        )
        down, down_scale = (
            torch.stack([getattr(d, leaf) for d in downs]) for leaf in ("weight_packed", "weight_scale")
        )
        self.register_buffer("up", prepare_experts(up, bits, self.hidden, up_scale.shape[2]))
        self.register_buffer("down", prepare_experts(down, bits, width, down_scale.shape[2]))
        self.register_buffer("up_scale", up_scale)
        self.register_buffer("down_scale", down_scale)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Float rows [N, hidden]; chosen, weights [N, top_k]."""
        form = self.form
        return calls.experts(
            x, chosen, weights.float(), None, self.up, self.up_scale, self.down, self.down_scale, form.up.weights,
            form.block, form.up.rows, form.down.rows,
        )  # fmt: skip
