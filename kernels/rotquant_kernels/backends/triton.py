"""The Triton kernels of CUDA devices (`rotquant_kernels.cuda`); Triton itself is imported when one is asked about."""

from __future__ import annotations

import torch

from rotquant_kernels.backends.backend import Backend, Layer

GEMM = ("int_linear", "quantized_linear", "moe_experts")


class Triton(Backend):
    name = "triton"
    device = "cuda"
    turns_positions = True

    def kernel(self, op: str) -> str:
        if op not in GEMM:
            return self.name
        from rotquant_kernels.cuda import scaled_mm

        server = scaled_mm.provided()
        return "triton (int8 tensor cores)" + (f", {server.name} for many tokens" if server else "")

    def stages(self) -> tuple[str, ...]:
        from rotquant_kernels.cuda import rows

        return rows.STAGES

    def misfit(self, layer: Layer, device: torch.device) -> str:
        from rotquant_kernels.cuda import layout

        return layout.misfit(layer.columns, layer.weights.groups(layer.columns))

    def distinct_tokens(self, columns: int, channels: int, groups: int, device: torch.device) -> tuple[int, ...]:
        from rotquant_kernels.cuda import gemm, tiles

        return tiles.distinct_tokens(tiles.Shape(columns, channels, groups), gemm.device_of(device))

    def distinct_mixture_tokens(
        self, hidden: int, width: int, groups: int, experts: int, top: int, device: torch.device
    ) -> list[int]:
        from rotquant_kernels.cuda import experts as mixture

        return mixture.distinct_tokens(hidden, width, groups, experts, top, device)

    def distinct_batches(self, group: int, page: int) -> list[tuple[int, int]]:
        from rotquant_kernels.cuda import kv4

        return kv4.distinct_batches(group, page)
