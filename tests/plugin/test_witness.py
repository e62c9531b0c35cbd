"""The witness of the start-up proof: right, and out of reach of what a server does to torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rotquant.checkpoint.format import LinearFormat
from rotquant.errors import RotQuantError
from rotquant_kernels import KINDS, Stage, convention, online
from rotquant_kernels.formats import KVFormat, RowFormat, WeightFormat
from vllm_rotquant import witness
from vllm_rotquant.environment import refuse_rounded_products

INPUTS, OUTPUTS, BLOCK = 64, 24, 16
# What vLLM replaces for VLLM_BATCH_INVARIANT=1, and what those are made of.
REPLACED = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mean", "softmax", "_softmax", "_log_softmax", "mv"}


class Wrong(TorchDispatchMode):
    """Torch with other functions in the place of the replaced ones: what they give is NaN."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        out = function(*arguments, **(keywords or {}))
        return torch.full_like(out, torch.nan) if function.overloadpacket.__name__ in REPLACED else out


class Rounding(TorchFunctionMode):
    """Torch whose matrix products round float32 to a dtype, as set_float32_matmul_precision("medium") may do."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            arguments = [x.to(self.dtype).float() for x in arguments]
        return function(*arguments, **(keywords or {}))


def chain() -> list[Stage]:
    """Every kind, the one that `int_linear` runs itself last."""
    torch.manual_seed(0)
    kinds = sorted(KINDS.values(), key=lambda kind: kind.inside)
    random = torch.Generator().manual_seed(0)
    return [Stage(kind.name, BLOCK, kind.sample(BLOCK, INPUTS, random)) for kind in kinds]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


def linear(stages: list[Stage]) -> Tensor:
    """A layer with everything."""
    packed = convention.pack_int32((3 * numbers(OUTPUTS, INPUTS)).clamp(-8, 7).to(torch.int8), 4)
    given = LinearFormat(WeightFormat(4, 16), RowFormat(4, False, 0.9), (), 3, subtracts=True)
    factors, bias = (numbers(INPUTS, 3) / 8, numbers(3, OUTPUTS)), numbers(OUTPUTS)
    x = witness.trial_rows(5, INPUTS, stages, torch.float32, torch.device("cpu"), factors[0])
    return witness.float_linear(x, given, stages, packed, numbers(OUTPUTS, 4).abs(), factors, bias)


def attention(stages: list[Stage]) -> Tensor:
    q, k, v = (witness.trial(7, h, BLOCK, dtype=torch.float32, device=torch.device("cpu"), seed=h) for h in (4, 2, 2))
    form = KVFormat(symmetric=False, k_clip=0.9, v_clip=0.9, rotate=BLOCK, feedback=True)
    return witness.float_attention(q, k, v, 0.25, form, 3, key_feedback=numbers(2, BLOCK, BLOCK) / BLOCK)


def in_front(stages: list[Stage]) -> Tensor:
    gate_up = witness.trial_gate_up(5, INPUTS, stages, torch.float32, torch.device("cpu"), numbers(INPUTS, 3) / 8)
    return torch.cat((*gate_up, *witness.trial_stream(5, numbers(INPUTS), 1e-6, stages)[1:]), 1)


@pytest.mark.parametrize("made", [linear, attention, in_front])
def test_replaced_functions_do_not_reach_it(made: Callable[[list[Stage]], Tensor]) -> None:
    stages = chain()
    expected = made(stages)
    with Wrong(), torch.inference_mode():
        assert numbers(2, 2).mm(numbers(2, 2)).isnan().all()
        got = made(stages)
    assert torch.equal(got, expected)


def test_rounded_products_and_another_default_type_do_not_reach_it() -> None:
    stages = chain()
    expected = linear(stages)
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)
        got = linear(stages)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_chain_and_inverse() -> None:
    stages, x = chain(), torch.randn(3, INPUTS)
    got = witness.transformed(x, stages)
    torch.testing.assert_close(got.float(), online.transform(x, stages), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(witness.restored(got, stages), x.double(), rtol=0, atol=1e-5)


def test_layer_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = linear([])
    monkeypatch.setattr(witness, "STRETCH", 5 * INPUTS)
    torch.testing.assert_close(linear([]), expected, rtol=1e-12, atol=1e-12)


def test_layer_is_the_product_of_its_parts() -> None:
    torch.manual_seed(3)
    x, weight, scale = torch.randn(5, INPUTS), torch.randint(-8, 8, (OUTPUTS, INPUTS)), torch.rand(OUTPUTS, 1)
    packed = convention.pack_int32(weight.to(torch.int8), 4)
    got = witness.float_linear(x, LinearFormat(WeightFormat(), RowFormat(8)), [], packed, scale, (None, None), None)
    step = x.abs().amax(1, keepdim=True) / 127.5
    expected = ((x / step).round().clamp(-128, 127).double() * step.double()) @ (weight.double() * scale.double()).T
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_float32_products_are_refused(dtype: torch.dtype) -> None:
    refuse_rounded_products("model.layers.0.mlp.down_proj", torch.device("cpu"))
    message = r"down_proj: its online transforms are float32 products.*VLLM_FLOAT32_MATMUL_PRECISION at highest"
    with Rounding(dtype), pytest.raises(RotQuantError, match=message):
        refuse_rounded_products("model.layers.0.mlp.down_proj", torch.device("cpu"))
