"""Humming: the integer product on int4 tensor cores (sm_80 to 89), or on int8 ones by ROTQUANT_CUDA_LINEAR=humming.

It multiplies the integers of `layout`, which are the words of its flat layout as they are: nibble p of a chunk is our
column 16 (p mod 2) + p / 2, so the activations' codes are written in that order (`rows`, ORDER), packed where they
are int4. Its own input kernels do not fit: their scale is absmax / 7, and they know neither clip nor zero point.

    y = bf16(bf16(acc s_x) s_w + bias)

is its epilogue: one rounding more than the specification's, half a step of bfloat16. So where it is installed and
nothing else is asked for ("auto"), it runs what gains by it, 4-bit weights and activations on GPUs that multiply int4.
It takes bfloat16 layers with symmetric activations and one scale a channel (bfloat16 numbers, as checkpoints hold
them); Triton runs the others. Split sums are off (`use_batch_invariant`): a token's result depends on no other.
"""

from __future__ import annotations

import functools
import json
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotquant_kernels.cuda import layout, rows

SWITCH = "ROTQUANT_CUDA_LINEAR"
# Of humming-kernels; vLLM 0.32 carries 0.1.17. 0.1.20 converts weights on a GPU only, so it cannot be checked without.
SUPPORTED = ((0, 1, 17), (0, 1, 20))
INT4 = (80, 86, 87, 89)  # whose tensor cores multiply int4
_choice: str | None = None  # of `choose`
COMPUTE = json.dumps({"use_batch_invariant": True, "use_f16_accum": False, "gemm_type": "dense"})


class Layer(NamedTuple):
    """What decides whether Humming can run a layer, and how."""

    channels: int
    columns: int
    weight_bits: int
    act_bits: int
    symmetric: bool
    bias: bool


def installed() -> str | None:
    """The version of Humming that is there."""
    try:
        return version("humming-kernels")
    except PackageNotFoundError:
        return None


@functools.cache
def wanted() -> str:
    """What the user asked for: "auto", "triton" or "humming".

    Raises:
        ValueError: an unknown choice.
    """
    choice = _choice or os.environ.get(SWITCH, "auto")
    if choice not in ("auto", "triton", "humming"):
        raise ValueError(f"{SWITCH} is {choice!r}: auto, triton or humming")
    return choice


@functools.cache
def chosen() -> bool:
    """Whether Humming runs the layers that it fits.

    Raises:
        ValueError: an unknown choice, or Humming was asked for and is not there in a supported version.
    """
    choice = wanted()
    if choice == "triton":
        return False
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    found = installed()
    fits = found is not None and SUPPORTED[0] <= tuple(int(part) for part in found.split(".")[:3]) < SUPPORTED[1]
    if choice == "auto" or fits:
        return fits
    if found is None:
        raise ValueError(f'{SWITCH}=humming needs it: pip install "humming-kernels>={low},<{high}"')
    raise ValueError(f"{SWITCH}=humming needs humming-kernels >={low},<{high}, not {found}")


def choose(choice: str) -> None:
    """Sets what `wanted` goes by in the place of the environment.

    Raises:
        ValueError: as `chosen`.
    """
    global _choice
    _choice = choice
    wanted.cache_clear()
    chosen.cache_clear()
    chosen()


@functools.cache
def configuration(layer: Layer, sm: int) -> tuple[Any, str]:
    """Humming's LayerConfig of a layer on an architecture (80, 90, ...) and, or else, why it does not fit."""
    from humming.config import LayerConfig

    int4 = layer.act_bits == 4 and layer.weight_bits == 4 and sm in INT4
    config = LayerConfig(
        sm_version=sm,
        shape_n=layer.channels,
        shape_k=layer.columns,
        a_dtype="int4" if int4 else "int8",
        b_dtype=f"int{layer.weight_bits}",
        c_dtype="bfloat16",
        bs_dtype="bfloat16",
        weight_scale_type="channel",
        has_bias=layer.bias,
    )
    if not config.use_flat_weight:
        return config, f"Humming wants another layout on sm_{sm}"
    return config, ""


def misfit(layer: Layer, groups: int, low_rank: bool, dtype: torch.dtype, sm: int) -> str:
    """Why Humming cannot run this layer on rows of a dtype, or nothing."""
    auto, bits = wanted() == "auto", (layer.weight_bits, layer.act_bits)
    for what, wrong in (
        (f"sm_{sm} multiplies no int4", auto and sm not in INT4),
        (f"W{bits[0]}A{bits[1]} gains nothing", auto and bits != (4, 4)),
        ("activations are asymmetric", not layer.symmetric),
        ("weight scales are by group", groups != 1),
        ("there is a low-rank branch", low_rank),
        (f"its rows are {str(dtype).removeprefix('torch.')}", dtype != torch.bfloat16),
        (f"{layer.act_bits}-bit activations", layer.act_bits not in (4, 8)),
        (f"{layer.channels} channels are no multiple of 256", layer.channels % 256),
        (f"{layer.columns} columns are no multiple of 128", layer.columns % 128),
    ):
        if wrong:
            return what
    return configuration(layer, sm)[1]


def sm_of(device: torch.device) -> int:
    """The architecture of a GPU: 80, 90, ..."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def with_scales(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """A weight of `layout` with the scales [N, 1] behind it: with them Humming runs the layer."""
    return torch.cat((weight, permuted(weight_scale[:, 0].contiguous()).view(torch.int32)))


def permuted(values: Tensor) -> Tensor:
    """Numbers of the channels [N] as Humming's epilogue reads them, bfloat16: 32 by 32, pairs of every eighth first."""
    out = torch.empty_like(values, dtype=torch.bfloat16)
    out.view(-1, 4, 4, 2).copy_(values.view(-1, 4, 4, 2).transpose(1, 2))
    return out


@functools.cache
def locks(device: torch.device) -> Tensor:
    """Humming's scratch, made once."""
    return torch.zeros(
        torch.cuda.get_device_properties(device).multi_processor_count * 8, dtype=torch.int32, device=device
    )


def order(config: Any, layer: Layer) -> str:
    """How `rows` writes the codes."""
    return "natural" if layer.weight_bits == 8 else f"humming{config.a_dtype.num_bits}"


def int_linear(
    x: Tensor, weight: layout.Weight, bias: Tensor | None, layer: Layer, transform: tuple[str, int, Tensor | None],
    clip: float, silu_mul: bool = False,
) -> Tensor:  # fmt: skip
    """The layer of rows x bfloat16 [M, K] (for `silu_mul` [M, 2 K]) that `misfit` had nothing against; [M, N].

    Raises:
        ValueError: the layer is run otherwise than it was prepared for.
    """
    from humming.ops import humming_gemm

    sm = sm_of(x.device)
    wrong = misfit(layer, 1, False, x.dtype, sm)
    if wrong or weight.scales is None:
        raise ValueError(f"this layer was prepared for Humming, but {wrong or 'its scales are not there'}")
    config, _ = configuration(layer, sm)
    words = weight.words
    codes, scale, _ = rows.quantize_rows(x, *transform, layer.act_bits, True, clip, silu_mul, order(config, layer))
    return humming_gemm(
        layer_config=config.to_str(),
        compute_config=COMPUTE,
        inputs=codes.view(torch.uint8) if config.a_dtype.num_bits == 4 else codes,
        weight=words.view(torch.int32).view(layer.channels, -1),
        weight_scale=weight.scales.view(1, -1),
        input_scale=scale,
        bias=None if bias is None else permuted(bias.contiguous()),
        outputs=x.new_empty((x.shape[0], layer.channels)),
        locks=locks(x.device),
    )
