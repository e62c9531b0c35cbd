"""Linear layers: packed int4 (or int8) weights in, one op out, behind a chain of online transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rotquant.checkpoint.format import LinearFormat
from rotquant.errors import RotQuantError
from rotquant_kernels import calls, online, ops
from rotquant_kernels.backends import Layer
from vllm_rotquant import adapters, compat, key_feedback, low_rank, rotation
from vllm_rotquant.collector import Collector

# What `weight_packed` holds until it is loaded: eight irregular codes that no whole row of weights repeats.
UNLOADED = 0x1F2E3D4C


@compat.register_weight_loader_v2_supported_method
class RotQuantLinearMethod(compat.LinearMethodBase):
    """Weights, loading and forward of one quantized linear layer, lm_head included.

    The layer keeps `weight_packed` (LoRA finds the layer's device through this name), `weight_scale`,
    `low_rank_down` and `low_rank_up` (or None), `key_feedback` where it makes keys that are rounded so, the tensors of
    its transforms (`rotation.stages`) and `shift_correction`, float32 [N] or None, which is added like a bias.
    """

    def __init__(
        self, linear: LinearFormat, prefix: str, collector: Collector, pieces: int = 1,
        keys: key_feedback.Keys | None = None,
    ) -> None:  # fmt: skip
        """`pieces`: layers of the checkpoint that vLLM runs as this one; `keys`: that it makes, where these are rounded
        with error feedback."""
        self.format, self.prefix, self.collector, self.pieces = linear, prefix, collector, pieces
        self.keys = keys
        self.silu_mul, self.norm = False, None  # what runs in front inside the same op: `fusion`
        self.ready, self.biased = False, False  # loaded, and in the form that serves; whether the layer has a bias

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Declares the tensors of the checkpoint on the layer."""
        inputs = input_size_per_partition
        self.inputs, self.dtype = inputs, params_dtype  # lm_head of vLLM 0.28 does not keep them
        self.dummy = compat.weights_are_dummy()
        # Only a row-parallel layer splits its inputs; its ranks' outputs are summed.
        first = compat.get_tensor_model_parallel_rank() * inputs if inputs < input_size else 0
        self.adds_correction = first == 0
        self._check_shard(inputs, input_size)
        if compat.lora_is_on():
            compat.load_adapters_with(adapters.reader)
            if isinstance(layer, compat.ParallelLMHead):  # vLLM's LoRA takes the device and dtype of the head from it
                layer.register_buffer("weight", torch.empty(0, dtype=params_dtype), persistent=False)
        self.all_inputs, self.parts, self.loader = input_size, output_partition_sizes, attributes["weight_loader"]
        if self.pieces < len(self.parts):  # a layer that the checkpoint, too, holds as one
            self._check_one_piece(sum(self.parts), output_size)
        self.span = slice(first, first + inputs)
        self.declare(layer)
        self.declared = tuple(name for name, _ in layer.named_parameters())
        self.collector.expect(layer)

    def declare(self, layer: torch.nn.Module) -> None:
        """Gives a module the parameters of the checkpoint's tensors (compressed-tensors' `pack-quantized`).

        Args:
            layer: the layer while a model is built, a bare module when its weights are loaded anew (`reload`).
        """
        inputs, outputs, loader = self.inputs, sum(self.parts), self.loader
        weights = self.format.weights
        packed = compat.PackedvLLMParameter(
            data=torch.full((outputs, weights.words(inputs)), UNLOADED, dtype=torch.int32),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=weights.per_word,
            weight_loader=loader,
        )
        # The op reads float32 scales; NaN shows after loading which rows the checkpoint did not fill.
        scales = torch.full((outputs, weights.groups(inputs)), torch.nan, dtype=torch.float32)
        scale = (
            compat.GroupQuantScaleParameter(data=scales, input_dim=1, output_dim=0, weight_loader=loader)
            if weights.group_size
            else compat.ChannelQuantScaleParameter(data=scales, output_dim=0, weight_loader=loader)
        )
        shape = compat.BasevLLMParameter(data=torch.zeros(2, dtype=torch.int64), weight_loader=loader)
        layer.register_parameter("weight_packed", packed)
        layer.register_parameter("weight_scale", scale)
        layer.register_parameter("weight_shape", shape)
        transforms, rank, dtype = self.format.transforms, self.format.rank, self.dtype
        rotation.expect_tensors(
            layer, self.prefix, transforms, self.all_inputs, self.span, outputs, self.pieces, loader
        )
        factors = self.prefix, rank, self.all_inputs, self.span, self.parts, self.pieces, dtype, self.format.subtracts
        low_rank.expect_factors(layer, *factors)
        key_feedback.expect(layer, self.prefix, self.keys, self.parts)

    def _check_one_piece(self, outputs: int, all_outputs: int) -> None:
        if self.format.rank and outputs < all_outputs:
            raise RotQuantError(
                f"{self.prefix}: this build of rotquant does not split the low-rank branch of a layer that the "
                "checkpoint holds in one piece: use --tensor-parallel-size 1"
            )

    def _check_shard(self, inputs: int, all_inputs: int) -> None:
        """Refuses a split of the inputs over ranks that would cut a word, a group or a transform's block."""
        tp_size = all_inputs // inputs
        for transform in self.format.transforms:
            rotation.check_shard(self.prefix, transform, inputs, all_inputs)
        per_word, group = self.format.weights.per_word, self.format.weights.group_size
        for what, size in (("packed words of", per_word if tp_size > 1 else 1), ("scale groups of", group or 1)):
            if inputs % size:
                raise RotQuantError(
                    f"{self.prefix}: {what} {size} inputs do not divide the {inputs} inputs of a rank at "
                    f"--tensor-parallel-size {tp_size}: use a smaller one"
                )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Checks that everything was loaded and brings the weights into the kernel's layout.

        vLLM may call it again for weights that it has not touched, as under sleep mode: nothing is left to do then.
        """
        if self.ready:
            return
        if self.dummy:
            self._fill_at_random(layer)
        self.check_loaded(layer)
        self.collector.keep(layer, layer.weight_packed.data)
        self.biased = getattr(layer, "bias", None) is not None
        self.prepare(layer)
        self.ready = True
        self.collector.loaded(layer)

    def check_loaded(self, layer: Any) -> None:
        """Refuses weights that the checkpoint left out, in part or as a whole.

        Args:
            layer: what was declared, with what was loaded into it.
        """
        unloaded = (layer.weight_packed == UNLOADED).all(dim=1)
        for name, missing in (("weight_packed", unloaded), ("weight_scale", layer.weight_scale.isnan().any(dim=1))):
            if missing.any():
                raise RotQuantError(
                    f"{self.prefix}.{name} is missing from the checkpoint ({int(missing.sum())} of {len(missing)} rows)"
                )
        if not self.dummy and int(layer.weight_shape[1]) != self.all_inputs:
            shape = layer.weight_shape.tolist()
            raise RotQuantError(
                f"{self.prefix}: weight_shape is {shape}, config.json asks for {self.all_inputs} inputs"
            )
        low_rank.check_loaded(layer, self.prefix)
        key_feedback.check_loaded(layer, self.prefix)
        rotation.check_loaded(layer, self.prefix, self.format.transforms, self.dummy)

    def prepare(self, layer: Any) -> None:
        """Brings what was loaded into the form that serves."""
        packed, device = layer.weight_packed.data, layer.weight_packed.device
        correction = rotation.take_tensors(layer, self.format.transforms, device, self.dummy)
        layer.register_buffer("shift_correction", correction if self.adds_correction else None, persistent=False)
        layer.weight_scale = Parameter(layer.weight_scale.data, requires_grad=False)
        layer.weight_packed = Parameter(self._prepare(layer, packed), requires_grad=False)
        del layer.weight_shape

    def _prepare(self, layer: Any, packed: Tensor) -> Tensor:
        """The weight in the layout of the layer's kernel, which is chosen here."""
        linear = self.format
        bias = layer.shift_correction is not None or self.biased
        before, _ = online.split(rotation.stages(layer, linear.transforms))
        dtype = torch.float32 if before else self.dtype
        known = Layer(len(packed), self.inputs, linear.weights, linear.rows, bias, bool(linear.rank), dtype)
        try:
            weight, self.backend, self.kernel = ops.prepare_linear(packed, layer.weight_scale, known)
        except ValueError as error:  # what the kernels of this device do not read
            raise RotQuantError(f"{self.prefix}: {error}") from None
        return weight

    def _fill_at_random(self, layer: Any) -> None:
        """Weights of about unit gain; vLLM's --load-format dummy leaves integers as they are."""
        layer.weight_packed.data.random_(-(1 << 31), (1 << 31) - 1)
        low, high = self.format.weights.rows.bounds
        layer.weight_scale.data.fill_((self.inputs / 12) ** -0.5 / (high - low))  # uniform codes

    def apply(self, layer: Any, x: Tensor | calls.Quantized, bias: Tensor | None = None) -> Tensor:
        """Linear layer on integers.

        Args:
            x: [..., K] in the model's dtype; never changed (LoRA adds its own product of the same x). With `silu_mul`
                [..., 2 K], gate then up. Behind a norm that has quantized already codes, scale and zero point.
        Returns:
            [..., N] in the model's dtype.
        """
        linear, correction = self.format, layer.shift_correction
        if correction is not None:
            bias = correction if bias is None else bias + correction
        if isinstance(x, tuple):
            weight = layer.weight_packed, layer.weight_scale, bias
            return calls.quantized_linear(x, *weight, linear.weights, linear.rows, self.dtype)
        return online.linear(
            x,
            layer.weight_packed,
            layer.weight_scale,
            bias,
            linear.weights,
            rotation.stages(layer, linear.transforms),
            linear.rows,
            layer.low_rank_down,
            layer.low_rank_up,
            self.silu_mul,
            linear.subtracts,
        )

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        raise RotQuantError(
            f"{self.prefix} is quantized, but config.json says tie_word_embeddings: true, which would drop it; "
            "set tie_word_embeddings to false"
        )
