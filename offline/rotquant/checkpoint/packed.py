"""A quantized linear as the checkpoint stores it: compressed-tensors' `pack-quantized`, and the branch beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rotquant.models import Layer, Tensors
from rotquant_kernels import prepare_weight
from rotquant_kernels.formats import WeightFormat

LEAVES = (".weight_packed", ".weight_scale", ".weight_shape", ".low_rank_down", ".low_rank_up")


@dataclass(frozen=True)
class PackedLinear:
    """A quantized linear as the checkpoint stores it: packed codes int32, scale, shape; low-rank factors D, U."""

    packed: Tensor
    scale: Tensor
    shape: tuple[int, int]
    form: WeightFormat
    down: Tensor | None = None  # [K, r], in the checkpoint's dtype
    up: Tensor | None = None  # [r, N]

    @cached_property
    def prepared(self) -> Tensor:
        """The weights as they run; made when they first do, which lm_head, for one, never does."""
        return prepare_weight(self.packed, self.form.bits, self.shape[1], self.scale.shape[1])

    def on(self, device: torch.device) -> PackedLinear:
        """The same on another device, itself where it is there."""
        if self.packed.device == device:
            return self
        down, up = (t if t is None else t.to(device) for t in (self.down, self.up))
        return replace(self, packed=self.packed.to(device), scale=self.scale.to(device), down=down, up=up)

    def tensors(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        stored = {
            f"{name}.weight_packed": self.packed.cpu(),
            f"{name}.weight_scale": self.scale.to(dtype).cpu(),
            f"{name}.weight_shape": torch.tensor(self.shape),
        }
        if self.down is not None and self.up is not None:
            stored |= {f"{name}.low_rank_down": self.down.cpu(), f"{name}.low_rank_up": self.up.cpu()}
        return stored

    @classmethod
    def of(cls, tensors: Tensors, name: str, form: WeightFormat) -> PackedLinear:
        """The inverse of `tensors`."""
        rows, columns = tensors[f"{name}.weight_shape"].tolist()
        packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
        branch = (tensors.get(f"{name}.low_rank_{part}") for part in ("down", "up"))
        return cls(packed, scale, (rows, columns), form, *branch)

    @classmethod
    def stacked(cls, parts: list[PackedLinear], subtracts: bool = False) -> PackedLinear:
        """Linears of one input as one, their outputs one below the other.

        Of low rank [D_1 ...], diag(U_1, ...); where the branch takes D off the inputs they share it: D, [U_1 ...].
        """
        first, rows = parts[0], sum(part.shape[0] for part in parts)
        if len(parts) == 1:
            return first
        downs = [part.down for part in parts if part.down is not None]
        ups = [part.up for part in parts if part.up is not None]
        if subtracts:
            downs = downs[:1]
        ups = [torch.cat(ups, dim=1) if subtracts else torch.block_diag(*ups)] if ups else []
        return cls(
            torch.cat([part.packed for part in parts]), torch.cat([part.scale for part in parts]),
            (rows, first.shape[1]), first.form,
            torch.cat(downs, dim=1) if downs else None, *ups,
        )  # fmt: skip


def joined(tensors: Tensors, kind: Layer, forms: Mapping[str, WeightFormat], subtracts: bool = False) -> Tensors:
    """A quantized layer's tensors as a checkpoint names them: those of fused linears as `PackedLinear.stacked` says.

    Linears that are not among them, such as experts that wait elsewhere, are left out; forms: by site.
    """
    there = [name for name in kind.linears if f"{name}.weight_packed" in tensors]
    parts = {name: PackedLinear.of(tensors, name, forms[kind.site_of[name]]) for name in there}
    stored = kind.join({name: t for name, t in tensors.items() if not name.endswith(LEAVES)})
    stored |= {name: stored[name].to(parts[kind.linears[0]].scale.dtype) for name in kind.gains if name in stored}
    for name, held in kind.stored.items():
        if held[0] not in parts:
            continue
        whole = PackedLinear.stacked([parts[part] for part in held], subtracts)
        stored |= whole.tensors(name, whole.scale.dtype)
    return stored


def pack(
    codes: Tensor, scale: Tensor, form: WeightFormat, down: Tensor | None = None, up: Tensor | None = None
) -> PackedLinear:
    return PackedLinear(form.pack(codes), scale, (codes.shape[0], codes.shape[1]), form, down, up)
