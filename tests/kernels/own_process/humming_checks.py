"""What we hand to Humming against its own preparation, for GPUs that are not here; `test_cuda_humming.py` runs it."""

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")  # its launcher is for machines with a GPU

from humming.config import ComputeConfig
from humming.device import DeviceInfo, current_device
from humming.transform import transform_humming_bias, transform_humming_weight, transform_humming_weight_scale
from humming.tune import get_heuristics_config

from rotquant_kernels import convention
from rotquant_kernels.backends import Backend, Layer, choose
from rotquant_kernels.cuda import humming, layout, linear
from rotquant_kernels.formats import RowFormat, WeightFormat

GPUS = {80: ("A100", 108, 163), 86: ("A10", 72, 99), 89: ("L40S", 142, 99), 90: ("H200", 132, 227)}


@pytest.fixture
def gpu(request, monkeypatch):
    """Stands in for the driver's description of a GPU: the one thing that a machine without any cannot give."""
    name, processors, shared = GPUS[request.param]
    info = SimpleNamespace(
        name=f"NVIDIA {name}", index=0, is_ppu=False, sm_version=request.param, sm_major=request.param // 10,
        sm_minor=request.param % 10, sm_count=processors, max_registers_per_sm=65536, max_threads_per_sm=1536,
        max_threads_per_block=1024, max_smem_size=shared * 1024, max_smem_size_kb=shared, default_smem_size=48 * 1024,
        l2_cache_size=40 << 20, l2_cache_size_mb=40.0, memory_bandwidth_gbps=2000.0,
        tensorcore_tops={"int4": 1248.0, "int8": 624.0, "float16": 312.0, "bfloat16": 312.0},
    )  # fmt: skip
    driver = SimpleNamespace(_DeviceInfo=lambda index: info)
    monkeypatch.setattr("humming.device._get_device_info_extension", lambda: driver)
    monkeypatch.setattr(current_device, "_value", info)
    monkeypatch.setattr(DeviceInfo, "_instances", {}, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    humming.configuration.cache_clear()
    yield request.param
    humming.configuration.cache_clear()


def codes_of(bits: int, channels: int, columns: int) -> torch.Tensor:
    low, high = convention.int_range(bits)
    return torch.randint(low, high + 1, (channels, columns), generator=torch.Generator().manual_seed(bits)).to(
        torch.int8
    )


@pytest.mark.parametrize("gpu", GPUS, indirect=True)
@pytest.mark.parametrize(("weight_bits", "act_bits"), [(4, 4), (4, 8), (8, 8)])
def test_our_words_are_those_of_humming(gpu, weight_bits, act_bits):
    """Its transform of the weights, columns permuted as `rows` permutes the activations, gives our words."""
    layer = humming.Layer(256, 384, weight_bits, act_bits, True, True)
    config, reason = humming.configuration(layer, gpu)
    assert reason == ""
    assert config.a_dtype.num_bits == (4 if (gpu, act_bits) in ((80, 4), (86, 4), (89, 4)) else 8)
    codes = codes_of(weight_bits, layer.channels, layer.columns)
    permuted = codes.view(256, -1, 2, 16).transpose(-1, -2).reshape(256, -1) if weight_bits == 4 else codes
    theirs = transform_humming_weight(
        convention.pack_int32(permuted, weight_bits), config.b_dtype, config.a_dtype, packed=True,
        use_flat_weight=config.use_flat_weight, use_ldmatrix_dequant=config.use_ldmatrix_dequant,
    )  # fmt: skip
    ours = layout.pack_weight(convention.pack_int32(codes, weight_bits), weight_bits, layer.columns, 1)
    words, _, none = layout.unpack(ours, weight_bits, layer.columns, layer.channels, 1)
    assert none is None
    assert torch.equal(words.view(torch.int32).view(256, -1), theirs)
    scale = torch.rand(256, 1).bfloat16()
    assert config.should_apply_bs_on_c
    prepared = layout.unpack(humming.with_scales(ours, scale.float()), weight_bits, layer.columns, layer.channels, 1)
    assert torch.equal(prepared.words, words)
    assert torch.equal(prepared.scales.view(1, -1), transform_humming_weight_scale(scale, True))
    assert torch.equal(humming.permuted(scale[:, 0]), transform_humming_bias(scale[:, 0]))
    assert humming.order(config, layer) == ("natural" if weight_bits == 8 else f"humming{config.a_dtype.num_bits}")


@pytest.mark.parametrize("gpu", GPUS, indirect=True)
def test_humming_has_a_plan_for_our_layers(gpu):
    """Its tuning tables know tiles for every number of tokens, without split sums."""
    ComputeConfig(**json.loads(humming.COMPUTE))
    for channels, columns in ((6144, 4096), (4096, 14336)):
        config, _ = humming.configuration(humming.Layer(channels, columns, 4, 4, True, False), gpu)
        plan = get_heuristics_config(layer_config=config, use_batch_invariant=True, gemm_type="dense")
        assert plan[0][0] == 0
        assert plan[-1][1] >= 1 << 20
        assert not any(tiles["use_stream_k"] for _, _, tiles in plan)


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setattr(humming, "wanted", lambda: "humming")


@pytest.mark.parametrize("gpu", GPUS, indirect=True)
def test_unasked_it_runs_what_gains_by_it(gpu, monkeypatch):
    monkeypatch.setattr(humming, "wanted", lambda: "auto")
    layer = humming.Layer(256, 384, 4, 4, True, False)
    assert humming.misfit(layer, 1, False, torch.bfloat16, gpu) == ("" if gpu < 90 else "sm_90 multiplies no int4")
    if gpu < 90:
        assert humming.misfit(layer._replace(act_bits=8), 1, False, torch.bfloat16, gpu) == "W4A8 gains nothing"


@pytest.mark.parametrize("gpu", [90], indirect=True)
def test_layers_that_do_not_fit_are_named(gpu):
    layer, bf16 = humming.Layer(256, 384, 4, 4, True, False), torch.bfloat16
    assert humming.misfit(layer, 1, False, bf16, gpu) == ""
    assert "asymmetric" in humming.misfit(layer._replace(symmetric=False), 1, False, bf16, gpu)
    assert "by group" in humming.misfit(layer, 3, False, bf16, gpu)
    assert "low-rank" in humming.misfit(layer, 1, True, bf16, gpu)
    assert "float16" in humming.misfit(layer, 1, False, torch.float16, gpu)
    assert "multiple of 256" in humming.misfit(layer._replace(channels=300), 1, False, bf16, gpu)
    assert "multiple of 128" in humming.misfit(layer._replace(columns=100), 1, False, bf16, gpu)


@pytest.mark.parametrize("gpu", [89], indirect=True)
def test_each_layer_is_decided_when_it_is_loaded(gpu, monkeypatch):
    """Humming gets the symmetric one, its scales in order once and for all; the asymmetric one keeps its fused norm."""
    monkeypatch.setattr(humming, "chosen", lambda: True)
    monkeypatch.setattr(humming, "sm_of", lambda device: gpu)
    monkeypatch.setattr(Backend, "has", lambda self, op: True)
    # The op that lays weights out for a GPU; without one it is not registered.
    monkeypatch.setattr(torch.ops.rotquant, "pack_weight", layout.pack_weight, raising=False)
    packed, scale = convention.pack_int32(codes_of(4, 256, 384), 4), torch.rand(256, 1)
    weight = layout.pack_weight(packed, 4, 384, 1)
    fits = Layer(256, 384, WeightFormat(), RowFormat(), False, False, torch.bfloat16)

    def prepared(layer):
        backend, kernel = choose(layer, torch.device("cuda"))
        return backend.prepare(packed, scale, layer), backend, kernel

    got, backend, kernel = prepared(fits)
    assert (backend.reads_quantized, kernel) == (False, "humming")
    assert torch.equal(layout.unpack(got, 4, 384, 256, 1).scales, humming.permuted(scale[:, 0]))
    for other in ({"rows": RowFormat(symmetric=False)}, {"low_rank": True}, {"dtype": torch.float32}):
        same, backend, kernel = prepared(replace(fits, **other))
        assert torch.equal(same, weight)
        assert backend.reads_quantized
        assert kernel.startswith("triton (int8 tensor cores), not humming: ")
    calls = []
    monkeypatch.setitem(sys.modules, "humming.ops", SimpleNamespace(humming_gemm=lambda **given: calls.append(given)))
    monkeypatch.setattr(humming, "locks", lambda device: None)
    monkeypatch.setattr(humming.rows, "quantize_rows", lambda x, *rest: (x.to(torch.int8), None, None))
    with pytest.raises(AttributeError):  # nothing came back from the stand-in
        linear.int_linear(torch.zeros(3, 384).bfloat16(), got, scale, None, 4, "none", 0, None, 4, True, 1.0)
    assert calls[0]["weight_scale"].data_ptr() == got.view(torch.bfloat16)[-256:].data_ptr()  # not a copy
    with pytest.raises(ValueError, match="prepared for Humming, but activations are asymmetric"):
        linear.int_linear(torch.zeros(3, 384).bfloat16(), got, scale, None, 4, "none", 0, None, 4, False, 1.0)
