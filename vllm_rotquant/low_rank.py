"""The low-rank branch of a linear layer, x D U beside the integer product: its factors as vLLM's layers hold them.

vLLM runs several layers of the checkpoint as one (q, k, v; gate, up). Their factors D_i [K, r] and U_i [r, N_i]
become one pair of rank P r for P parts:

    D = [D_1 ... D_P]        U = diag(U_1, ..., U_P)        x D U = [x D_1 U_1 ... x D_P U_P]

A branch that takes its directions off the inputs has one D, since these are rounded once for all parts:

    D = D_1 = ... = D_P      U = [U_1 ... U_P]               y = (x - x D Dᵀ) ... + x D U

Under tensor parallelism a rank holds the rows of D for its inputs and the columns of each U_i for its outputs. Where D
is taken off the inputs and ranks split these, no direction may cross them: what one takes off needs all of x D.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rotquant.errors import RotQuantError
from vllm_rotquant import compat

NAMES = ("low_rank_down", "low_rank_up")
QKV = {"q": 0, "k": 1, "v": 2}  # vLLM's names of the parts of a qkv layer


def expect_factors(
    layer: torch.nn.Module, prefix: str, rank: int, all_inputs: int, span: slice, parts: list[int], pieces: int,
    dtype: torch.dtype, subtracts: bool,
) -> None:  # fmt: skip
    """Makes `layer` accept its factors from the checkpoint; both are None where rank is 0.

    Args:
        subtracts: the branch takes its directions off the inputs.
        pieces: layers of the checkpoint that are this one, as many as parts or fewer: each is one part or several.
        span: inputs of this rank; parts: outputs on this rank of each part of this layer.
        dtype: the model's.
    """
    if not rank:
        for name in NAMES:
            layer.register_parameter(name, None)
        return
    if isinstance(layer, compat.ParallelLMHead):
        raise RotQuantError(f"{prefix}: this build of rotquant does not run rotquant.low_rank on the output layer")
    # NaN shows after loading what the checkpoint did not fill.
    ranks = rank * (1 if subtracts else pieces)
    down = torch.full((span.stop - span.start, ranks), torch.nan, dtype=dtype)
    up = torch.full((ranks, sum(parts)), torch.nan, dtype=dtype)
    for name, data in zip(NAMES, (down, up), strict=True):
        layer.register_parameter(name, Parameter(data, requires_grad=False))
    where, outputs = f"{prefix}.{{}}", [0, *torch.tensor(parts).cumsum(0).tolist()]

    def rows(held: range) -> slice:
        first = 0 if subtracts else min(held.start, pieces - 1) * rank
        return slice(first, first + rank)

    def load_down(parameter: Tensor, loaded: Tensor, held: range) -> None:
        expect_shape(where.format(NAMES[0]), loaded, [all_inputs, rank])
        there = parameter.data[:, rows(held)]
        if subtracts:
            _check_directions(where.format(NAMES[0]), loaded, span, there)
        there.copy_(loaded[span])

    def load_up(parameter: Tensor, loaded: Tensor, held: range) -> None:
        first, last = outputs[held.start], outputs[held.stop]
        columns = output_shard(loaded.shape[-1], last - first)
        expect_shape(where.format(NAMES[1]), loaded, [rank, columns[1]])
        if not subtracts:
            parameter.data[rows(held)] = 0
        parameter.data[rows(held), first:last] = loaded[:, columns[0]]

    for name, load in zip(NAMES, (load_down, load_up), strict=True):
        layer.get_parameter(name).weight_loader = partial(_numbered, load, len(parts))  # type: ignore[attr-defined]


def _check_directions(where: str, loaded: Tensor, span: slice, there: Tensor) -> None:
    """Refuses directions that cross tensor-parallel ranks, or that are not those of the layer's other parts.

    Args:
        loaded: D [K, r]; span: inputs of this rank; there: this rank's rows of D, NaN where nothing was loaded yet.
    """
    own = loaded[span]
    outside = torch.cat((loaded[: span.start], loaded[span.stop :]))
    if (own.any(0) & outside.any(0)).any():
        raise RotQuantError(
            f"{where}: a direction that is taken off the inputs crosses tensor-parallel ranks: use a smaller"
            " --tensor-parallel-size, or quantize again with --tp-max"
        )
    if not there.isnan().any() and not torch.equal(there, own.to(there)):
        raise RotQuantError(f"{where}: the parts of this fused layer store different directions")


def _numbered(load: Any, parts: int, parameter: Tensor, loaded: Tensor, shard: Any = None) -> None:
    """vLLM's weight loader; `shard` is its name of the part: "q", "k", "v", a number, several in a row, None: all."""
    if shard is None:
        load(parameter, loaded, range(parts))
    elif isinstance(shard, tuple):
        load(parameter, loaded, range(shard[0], shard[-1] + 1))
    else:
        part = QKV.get(shard, shard)
        load(parameter, loaded, range(part, part + 1))


def output_shard(found: int, outputs: int) -> tuple[slice, int]:
    """The columns of this rank among `found` in the file when a rank holds `outputs`, and the right number of them.

    The ranks hold equal shards in order. Where there are fewer shards than ranks (KV heads), neighbours share one.
    """
    ranks, rank = compat.get_tensor_model_parallel_world_size(), compat.get_tensor_model_parallel_rank()
    shards = max(1, min(ranks, found // outputs))
    start = rank * shards // ranks * outputs
    return slice(start, start + outputs), shards * outputs


def expect_shape(where: str, loaded: Tensor, expected: list[int]) -> None:
    if list(loaded.shape) != expected:
        raise RotQuantError(f"{where} has shape {list(loaded.shape)}, config.json asks for {expected}")


def check_loaded(layer: Any, prefix: str) -> None:
    """Refuses a factor that the checkpoint left out, in part or as a whole."""
    for name in NAMES:
        factor = getattr(layer, name)
        if factor is not None and factor.isnan().any():
            raise RotQuantError(f"{prefix}.{name} is missing from the checkpoint, or has NaN in it")
