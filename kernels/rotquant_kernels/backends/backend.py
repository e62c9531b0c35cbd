"""What a backend is: kernels of some ops for one type of device, and what they can do.

Whoever has to choose, to join ops or to report asks a backend; names are for people and decide nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotquant_kernels.formats import RowFormat, WeightFormat

KEYS = {"cpu": "CPU", "cuda": "CUDA"}  # torch's dispatch key of each type of device that has kernels


@dataclass(frozen=True)
class Layer:
    """What decides which backend runs a linear layer.

    dtype: of the rows that it will be given; low_rank: whether it has a branch in full precision.
    """

    channels: int
    columns: int
    weights: WeightFormat
    rows: RowFormat
    bias: bool
    low_rank: bool
    dtype: torch.dtype


class Backend:
    """The contract, and what holds where a backend says nothing else.

    name: in reports. device: the type of device it is for, of KEYS.
    reads_quantized: whether `quantized_linear` reads its weights as fast as `int_linear`, so that a norm may quantize.
    turns_positions: whether its kernels of the 4-bit KV cache can turn q and k to their positions (`cuda.rope`).
    takes_any: whether it runs every layer that its device's ops take at all, so that no backend behind it is asked.
    """

    name: str
    device: str
    reads_quantized = True
    turns_positions = False
    takes_any = True

    def has(self, op: str) -> bool:
        """Whether it runs an op in this process: whether a kernel is registered."""
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"rotquant::{op}", KEYS[self.device])

    def kernel(self, op: str) -> str:
        """What runs an op that it has, for reports."""
        return self.name

    def stages(self) -> tuple[str, ...]:
        """Kinds of online transforms that its `online_stage` has a kernel of; the reference runs the others."""
        return ()

    def misfit(self, layer: Layer, device: torch.device) -> str:
        """Why it cannot run a layer, or nothing."""
        return ""

    def prepare(self, packed: Tensor, weight_scale: Tensor, layer: Layer) -> Tensor:
        """The layer's weight as it reads it, on the device of `packed`.

        Args:
            packed: int32 [N, words] as the checkpoint has it; weight_scale: float32 [N, G].
        Raises:
            ValueError: a weight that its layout cannot hold.
        """
        packed = packed.contiguous()
        return torch.ops.rotquant.pack_weight(packed, layer.weights.bits, layer.columns, weight_scale.shape[1])

    def distinct_tokens(self, columns: int, channels: int, groups: int, device: torch.device) -> tuple[int, ...]:
        """Numbers of tokens that between them run every kernel that any number runs: of a linear layer [channels,
        columns] with so many scales a channel, and of a norm before it.

        Empty where nothing is compiled at run time.
        """
        return ()

    def distinct_mixture_tokens(
        self, hidden: int, width: int, groups: int, experts: int, top: int, device: torch.device
    ) -> list[int]:
        """The same of a layer's experts on this rank, each of `width` channels, `top` of them for a token."""
        return []

    def distinct_batches(self, group: int, page: int) -> list[tuple[int, int]]:
        """The same of attention over the 4-bit cache: batches of one sequence as (new tokens, pages of the table).

        Args:
            group: query heads of a KV head; page: tokens of a page.
        """
        return []
