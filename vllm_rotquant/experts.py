"""Mixtures of experts: the packed weights of a layer's experts in, one op out.

A layer keeps `w13_weight_packed`, gate over up of each expert on this rank, and `w2_weight_packed`, down, in the layout
of the op, with `w13_weight_scale` and `w2_weight_scale`. Under tensor parallelism each rank has a part of every
expert's channels, under expert parallelism some experts whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rotquant.checkpoint import stored
from rotquant.checkpoint.experts_format import ExpertsFormat
from rotquant.checkpoint.format import LinearFormat
from rotquant.errors import RotQuantError
from rotquant.models.mlp import Experts
from rotquant_kernels import calls, kernel_of, prepare_experts
from vllm_rotquant import compat, rotation
from vllm_rotquant.collector import Collector

SHARDS = {"w1": "w13", "w3": "w13", "w2": "w2"}  # vLLM's names for gate, up, down: the tensors that hold them


class RotQuantExpertsMethod(compat.FusedMoEMethodBase):
    """Weights, loading and forward of the experts of one layer.

    Args:
        block: the mixture as the architecture describes it; form: how its experts are stored and run.
        prefix: name of the experts in the checkpoint.
    """

    def __init__(self, layer: Any, block: Experts, form: ExpertsFormat, prefix: str, collector: Collector) -> None:
        super().__init__(layer.moe_config)
        self.block, self.form, self.prefix, self.collector = block, form, prefix, collector
        self.names = {"w1": block.gate, "w3": block.up, "w2": block.down}
        self.loaded: set[str] = set()  # of the checkpoint's tensors
        self.declared: tuple[str, ...] = ()  # parameters of the layer
        self.ready = False
        for what, asked in compat.experts_refusals(layer, self.moe).items():
            if asked:
                raise RotQuantError(f"{prefix}: this build of rotquant does not run {what}")

    # ---- the tensors --------------------------------------------------------------------------------------------

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Declares the tensors of the checkpoint, each expert's in its place."""
        self.hidden, self.width, self.dtype = hidden_size, intermediate_size_per_partition, params_dtype
        self.part, self.parts = compat.experts_share(self.moe)
        self.dummy = compat.weights_are_dummy()
        self.here = compat.experts_here(layer)
        self._check_sizes()
        for name, rows, columns, linear in (
            ("w13", 2 * self.width, self.hidden, self.form.up),
            ("w2", self.hidden, self.width, self.form.down),
        ):
            words, groups = linear.weights.words(columns), linear.weights.groups(columns)
            tensors = {
                "weight_packed": torch.zeros(num_experts, rows, words, dtype=torch.int32),
                "weight_scale": torch.zeros(num_experts, rows, groups, dtype=torch.float32),
                "weight_shape": torch.zeros(num_experts, 2, dtype=torch.int64),
            }
            for leaf, data in tensors.items():
                parameter = Parameter(data, requires_grad=False)
                parameter.weight_loader = Loader(self, leaf)  # type: ignore[attr-defined]
                layer.register_parameter(f"{name}_{leaf}", parameter)
                self.declared += (f"{name}_{leaf}",)
        for transform in self.form.down.transforms:  # vLLM asks for a tensor by its whole name
            layer.__dict__[f"w2_{transform.name}_input.weight"] = Marker(self)
        absent = set(range(self.block.count)) - set(self.here)
        self.collector.expect_experts(layer, {f"{self.prefix}.{expert}." for expert in absent})

    def _check_sizes(self) -> None:
        down, wide = self.form.down, self.width * self.parts
        for transform in down.transforms:
            rotation.check_shard(self.prefix, transform, self.width, wide)
        for what, size in (
            ("packed words of", down.weights.per_word),
            ("scale groups of", down.weights.group_size or 1),
        ):
            if self.width % size:
                raise RotQuantError(
                    f"{self.prefix}: {what} {size} inputs do not divide the {self.width} channels of an expert "
                    f"on a rank at --tensor-parallel-size {self.parts}: use a smaller one, or --enable-expert-parallel"
                )
        if wide != self.block.width:
            raise RotQuantError(f"{self.prefix}: vLLM's experts have {wide} channels, config.json's {self.block.width}")

    def take(self, parameter: Tensor, leaf: str, loaded: Tensor, shard: str, expert: int) -> bool:
        """Takes a tensor of the checkpoint, or this rank's part of it; False where another rank has the expert."""
        if expert not in self.here:
            return False
        name, place = f"{self.prefix}.{expert}.{self.names[shard]}.{leaf}", parameter.data[self.here[expert]]
        wide, linear = self.width * self.parts, self.form.down if shard == "w2" else self.form.up
        outputs, inputs = (self.hidden, wide) if shard == "w2" else (wide, self.hidden)
        if leaf == "weight_shape":
            if loaded.tolist() != [outputs, inputs]:
                raise RotQuantError(f"{name} is {loaded.tolist()}, config.json asks for {[outputs, inputs]}")
        else:
            columns = columns_of(leaf, inputs, linear)
            if tuple(loaded.shape) != (outputs, columns):
                raise RotQuantError(
                    f"tensor {name} has shape {list(loaded.shape)}, config.json asks for {[outputs, columns]}"
                )
            if shard == "w2":
                place.copy_(loaded.chunk(self.parts, 1)[self.part] if columns > 1 else loaded)
            else:
                rows = slice(0, self.width) if shard == "w1" else slice(self.width, None)
                place[rows].copy_(loaded.chunk(self.parts, 0)[self.part])
        self.loaded.add(name)
        return True

    def process_weights_after_loading(self, layer: Any) -> None:
        """Checks that every expert was loaded, and brings the weights into the layout of the op."""
        if self.ready:
            return
        if self.dummy:
            self._fill_at_random(layer)
        self._check_loaded()
        self.collector.keep_experts(layer, self._two_experts(layer))
        for name, columns in (("w13", self.hidden), ("w2", self.width)):
            packed, scale = getattr(layer, f"{name}_weight_packed"), getattr(layer, f"{name}_weight_scale")
            bits = self.form.up.weights.bits
            try:
                made = prepare_experts(packed.data, bits, columns, scale.shape[2])
            except ValueError as error:  # what the kernels of this device do not read
                raise RotQuantError(f"{self.prefix}: {error}") from None
            setattr(layer, f"{name}_weight_packed", Parameter(made, requires_grad=False))
            setattr(layer, f"{name}_weight_scale", Parameter(scale.data, requires_grad=False))
            delattr(layer, f"{name}_weight_shape")
        self.kernel = kernel_of("moe_experts", layer.w13_weight_packed.device)
        self.ready = True
        self.collector.loaded(layer)

    def _two_experts(self, layer: Any) -> dict[int, tuple[Tensor, ...]]:
        """The loaded weights of the first and the last expert on this rank, by their numbers."""
        names = ("w13_weight_packed", "w13_weight_scale", "w2_weight_packed", "w2_weight_scale")
        chosen = {min(self.here), max(self.here)}
        return {e: tuple(getattr(layer, name).data[self.here[e]] for name in names) for e in chosen}

    def _check_loaded(self) -> None:
        leaves = ("weight_packed", "weight_scale", "weight_shape")
        expected = [
            f"{self.prefix}.{e}.{name}.{leaf}" for e in self.here for name in self.names.values() for leaf in leaves
        ]
        missing = [name for name in expected if name not in self.loaded]
        if missing and not self.dummy:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise RotQuantError(f"{missing[0]}{more} is missing from the checkpoint")

    def _fill_at_random(self, layer: Any) -> None:
        """Weights of about unit gain; vLLM's --load-format dummy leaves integers as they are."""
        low, high = self.form.up.weights.rows.bounds
        for name, inputs in (("w13", self.hidden), ("w2", self.width)):
            getattr(layer, f"{name}_weight_packed").data.random_(-(1 << 31), (1 << 31) - 1)
            getattr(layer, f"{name}_weight_scale").data.fill_((inputs / 12) ** -0.5 / (high - low))

    # ---- the forward --------------------------------------------------------------------------------------------

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """What this rank's experts add up to, [T, hidden]; x as the router has seen it, quantized once for all."""
        form = self.form
        return calls.experts(
            x, topk_ids, topk_weights.float(), layer.expert_map, layer.w13_weight_packed, layer.w13_weight_scale,
            layer.w2_weight_packed, layer.w2_weight_scale, form.up.weights, form.block, form.up.rows, form.down.rows,
        )  # fmt: skip

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: the experts are quantized by our op, not by one of vLLM's."""
        return

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: Any, moe_parallel_config: Any
    ) -> tuple[int, int]:
        """As they are: the op has no sizes of its own."""
        return hidden_size, intermediate_size_per_partition


class Loader:
    """vLLM's weight loader of one of the layer's tensors."""

    def __init__(self, method: RotQuantExpertsMethod, leaf: str) -> None:
        self.method, self.leaf = method, leaf

    def __call__(
        self, param: Tensor, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int,
        return_success: bool = False,
    ) -> bool | None:  # fmt: skip
        taken = self.method.take(param, self.leaf, loaded_weight, shard_id, expert_id)
        return taken if return_success else None


class Marker:
    """Receives R4's matrix, which a checkpoint holds so that engines without it fail: only compared."""

    def __init__(self, method: RotQuantExpertsMethod) -> None:
        self.method = method

    def weight_loader(self, param: Any, loaded_weight: Tensor, weight_name: str, **more: Any) -> bool:
        (transform,) = self.method.form.down.transforms
        stored.check(f"tensor {weight_name}", transform, loaded_weight.detach().cpu(), self.method.block.width)
        return True


def columns_of(leaf: str, inputs: int, linear: LinearFormat) -> int:
    """Columns of a tensor of a linear layer with so many inputs."""
    if leaf == "weight_packed":
        return linear.weights.words(inputs)
    return linear.weights.groups(inputs)
