"""What a server does before its first request, on a GPU that is not there: after its warm-up no step of thousands
compiles anything; a layer that the kernels do not read is refused; the proof does not need the GPU's memory."""

import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("vllm")

from rotquant.checkpoint.format import LinearFormat, Transform
from rotquant.checkpoint.quant_linear import QuantLinear
from rotquant.errors import RotQuantError
from rotquant_kernels import convention, cuda, ops
from rotquant_kernels.backends import BACKENDS, REFERENCE
from rotquant_kernels.backends.triton import Triton
from rotquant_kernels.cuda import kv4, tiles
from rotquant_kernels.cuda.device import Device
from rotquant_kernels.cuda.rope import Rope
from rotquant_kernels.formats import KVFormat, RowFormat, WeightFormat
from rotquant_kernels.formats.kv import kv_token_bytes
from stand_in_gpu import stand_in
from vllm_rotquant import rotation, steps, witness
from vllm_rotquant.collector import Collector
from vllm_rotquant.experts import RotQuantExpertsMethod
from vllm_rotquant.fusion import QuantizingNorm
from vllm_rotquant.kv_cache import KV4Impl, KV4Metadata
from vllm_rotquant.linear import RotQuantLinearMethod
from vllm_rotquant.warmup import warm_attention, warm_experts, warm_linears

HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCABULARY, PAGE = 256, 768, 8, 2, 64, 1000, 32
DTYPE = torch.bfloat16


class Compiled(Triton):
    """Triton's kernels under the CPU's key."""

    device = "cpu"


@pytest.fixture
def on_the_gpu(monkeypatch):
    """CPU tensors take the ops' CUDA implementations, which compile for sm_90."""
    library = torch.library.Library("rotquant", "IMPL")
    monkeypatch.setattr(library, "impl", lambda op, function, key: own(op, function))

    def own(op, function):
        torch.library.Library.impl(library, op, function, "CPU", allow_override=True)

    cuda.register(library)
    monkeypatch.setitem(BACKENDS, "cpu", (Compiled(), REFERENCE))
    with stand_in(90) as found:
        yield found
    library._destroy()


def linear(name: str, inputs: int, outputs: int, bits: int = 4, block: int = 0, bias: bool = False):
    """A loaded layer as the plugin keeps it."""
    transforms = (Transform("hadamard", block, "R4"),) if block else ()
    linear_format = LinearFormat(WeightFormat(bits), RowFormat(bits, False, 0.9), transforms)
    method = RotQuantLinearMethod(linear_format, name, Collector())
    method.inputs, method.dtype, method.adds_correction = inputs, DTYPE, True
    weight = ops.prepare_weight(torch.zeros(outputs, inputs * bits // 32, dtype=torch.int32), bits, inputs)
    return SimpleNamespace(
        quant_method=method, weight_packed=weight, weight_scale=torch.ones(outputs, 1),
        bias=torch.zeros(outputs, dtype=DTYPE) if bias else None, shift_correction=None, low_rank_down=None,
        low_rank_up=None, **{rotation.buffer_name(transform): None for transform in transforms},
    )  # fmt: skip


def attention(rotate: int = DIM, window: int | None = None):
    layer = SimpleNamespace(
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=DIM, kv_cache_dtype="auto", dtype=DTYPE,
        impl=SimpleNamespace(scale=0.1, logits_soft_cap=None), sliding_window=window,
    )  # fmt: skip
    layer.impl = KV4Impl(layer, KVFormat(False, 1.0, 1.0, rotate))
    return layer


class Server:
    """One decoder layer, with and without a window, and the output layer of a model, run as vLLM runs them."""

    def __init__(self) -> None:
        kv = KV_HEADS * DIM
        self.layers = {
            "qkv": linear("qkv_proj", HIDDEN, HEADS * DIM + 2 * kv, bias=True),
            "o": linear("o_proj", HEADS * DIM, HIDDEN),
            "gate_up": linear("gate_up_proj", HIDDEN, 2 * INNER),
            "down": linear("down_proj", INNER, HIDDEN, block=256),
            "lm_head": linear("lm_head", HIDDEN, VOCABULARY, bits=8),
        }
        for name in ("qkv", "gate_up"):
            norm = SimpleNamespace(weight=torch.ones(HIDDEN, dtype=DTYPE), variance_epsilon=1e-5)
            method = self.layers[name].quant_method
            method.norm = QuantizingNorm(norm, method.format)
        self.layers["down"].quant_method.silu_mul = True
        self.attention = [attention(), attention(window=1024)]
        self.attention[0].impl.dense = "stand-in", lambda *given: None
        self.attention[0].impl.rope = Rope(torch.zeros(8, DIM, dtype=DTYPE), False)
        # As vLLM cuts one buffer into layers and blocks.
        self.pages = torch.zeros(9, KV_HEADS, PAGE, kv_token_bytes(DIM, False), dtype=torch.uint8)

    def warm_up(self) -> None:
        warm_linears(self.layers.values())
        for layer in self.attention:
            warm_attention(layer, PAGE, torch.device("cpu"))

    def apply(self, name: str, x):
        layer = self.layers[name]
        return layer.quant_method.apply(layer, x, layer.bias)

    def step(self, new: list[int], longest: int) -> None:
        """A step of so many new tokens of each sequence, as eager runs and captured graphs call it."""
        tokens, kv = sum(new), KV_HEADS * DIM
        hidden = torch.empty(tokens, HIDDEN, dtype=DTYPE)
        norms = [self.layers[name].quant_method.norm for name in ("qkv", "gate_up")]
        for normed in (norms[0](hidden), norms[0](hidden, hidden)[0]):
            query, key, value = self.apply("qkv", normed).split([HEADS * DIM, kv, kv], -1)
        query, key, value = (x.view(tokens, -1, DIM) for x in (query, key, value))
        starts = torch.tensor([0, *new]).cumsum(0).to(torch.int32)
        sequences = torch.zeros(len(new), dtype=torch.int32)
        table, out = torch.zeros(len(new), -(-longest // PAGE), dtype=torch.int32), torch.empty_like(query)
        slots = torch.zeros(tokens + 3, dtype=torch.int64)[3:]  # not aligned
        for layer in self.attention:
            cut = steps.parts(new, [longest] * len(new), starts, sequences, table, layer.impl.limits(PAGE))
            metadata = KV4Metadata(starts, sequences, table, cut, slots)
            if layer.impl.rope is None:
                layer.impl.do_kv_cache_update(None, key, value, self.pages, slots)
            layer.impl.forward(None, query, key, value, self.pages, metadata, out)
        self.apply("o", out.view(tokens, -1))
        self.apply("down", self.apply("gate_up", norms[1](hidden, hidden)[0]))
        self.apply("lm_head", hidden[: len(new)])


def test_no_step_compiles_after_the_warm_up(on_the_gpu):
    server, chance = Server(), random.Random(1)
    server.warm_up()
    warmed, longest = len(on_the_gpu), 8192
    # Tiles of 3 sorts of linear layers, in parts too, and the sums of those; 2 norms, 3 kinds of rows, writing with and
    # without RoPE, attention by 8, 16, 32 and 64 rows, whole and in parts, with RoPE and with a window, and the merge
    # of parts; gathering, and turning of queries.
    linears = sum(made.name in ("linear_kernel", "sum_kernel") for made in on_the_gpu)
    assert warmed == linears + 2 + 3 + 2 + 4 * 2 * 2 + 1 + 2, [made.name for made in on_the_gpu]
    for sequences in range(1, 258):  # pure decoding, every size
        server.step([1] * sequences, longest)
    for _ in range(1000):
        running = [1 + (chance.random() < 0.05) * chance.randrange(5) for _ in range(chance.randrange(64))]
        chunks = [chance.randrange(1, 1500) for _ in range(chance.randrange(3))]
        if running + chunks:
            server.step(running + chunks, longest)
    assert [made.name for made in on_the_gpu[warmed:]] == []


def test_no_step_of_experts_compiles_after_the_warm_up(on_the_gpu):
    rows = [RowFormat(4, False, clip) for clip in (0.9, 1.0)]
    up, down = (LinearFormat(WeightFormat(4), one, ()) for one in rows)
    method = SimpleNamespace(
        form=SimpleNamespace(up=up, down=down, block=64), hidden=HIDDEN, width=64, dtype=DTYPE,
        here=dict.fromkeys(range(8), 0), block=SimpleNamespace(top_k=2),
    )  # fmt: skip
    method.apply = partial(RotQuantExpertsMethod.apply, method)
    layer = SimpleNamespace(quant_method=method, expert_map=None)
    for name, n, k in (("w13", 128, HIDDEN), ("w2", HIDDEN, 64)):
        packed = torch.zeros(8, n, k // 8, dtype=torch.int32)
        setattr(layer, f"{name}_weight_packed", ops.prepare_experts(packed, 4, k))
        setattr(layer, f"{name}_weight_scale", torch.ones(8, n, 1))
    warm_experts([layer])
    warmed = len(on_the_gpu)
    assert warmed > 3
    for tokens in (*range(70), 100, 128, 129, 500, 512, 4097):
        x, chosen = torch.empty(tokens, HIDDEN, dtype=DTYPE), torch.arange(2 * tokens).view(tokens, 2) % 8
        method.apply(layer, x, torch.empty(tokens, 2), chosen.int(), None, None)
    assert [made.name for made in on_the_gpu[warmed:]] == []


def test_the_warm_up_is_needed(on_the_gpu):
    """Without it steps do compile, also after others."""
    server = Server()
    server.step([1], 8192)
    first = len(on_the_gpu)
    server.step([1] * 40 + [600], 8192)
    assert len(on_the_gpu) > first


def test_weight_groups_that_the_kernels_do_not_read_are_refused_by_name(on_the_gpu):
    method = RotQuantLinearMethod(
        LinearFormat(WeightFormat(4, 16), RowFormat(4, False, 0.9)), "model.layers.3.mlp.down_proj", Collector()
    )
    method.inputs, method.dtype = 48, DTYPE
    layer = SimpleNamespace(weight_scale=torch.ones(64, 3), shift_correction=None)
    with pytest.raises(
        RotQuantError, match=r"^model.layers.3.mlp.down_proj: .* a multiple of 32 inputs, not of 16: .*"
    ):
        method._prepare(layer, torch.zeros(64, 6, dtype=torch.int32))
    linear = QuantLinear("mlp.down_proj", torch.nn.Linear(48, 64), method.format)
    linear.weight_packed, linear.weight_scale = torch.zeros(64, 6, dtype=torch.int32), layer.weight_scale
    with pytest.raises(RotQuantError, match=r"^mlp.down_proj: .* not of 16: .*group_size"):
        linear.prepare()


@pytest.mark.parametrize("groups", [1, 4])
def test_the_witness_unpacks_a_large_layer_in_parts(monkeypatch, groups):
    generator = torch.Generator().manual_seed(1)
    x, scales = torch.randn(3, 64, generator=generator), torch.rand(100, groups, generator=generator)
    packed = convention.pack_int32(torch.randint(-8, 8, (100, 64), generator=generator).to(torch.int8), 4)
    given = LinearFormat(WeightFormat(4, 64 // groups % 64), RowFormat(4, False, 0.9))
    arguments = (x, given, [], packed, scales, (None, None), None)
    whole, unpack, unpacked = witness.float_linear(*arguments), convention.unpack_int32, []
    monkeypatch.setattr(witness, "STRETCH", 64 * 7)
    monkeypatch.setattr(convention, "unpack_int32", lambda *given: unpacked.append(unpack(*given)) or unpacked[-1])
    assert torch.allclose(witness.float_linear(*arguments), whole, rtol=1e-12)
    assert max(codes.numel() for codes in unpacked) == 64 * 7
    assert sum(len(codes) for codes in unpacked) == 100


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16, 71])
@pytest.mark.parametrize("least", [8, 16])
@pytest.mark.parametrize("window", [0, 100, 500, 4096])
def test_the_few_batches_stand_for_all(group, least, window):
    """Every plan that any batch gets is that of one of them."""
    page, kv_heads, device = 16, 4, Device(132, least)

    def variant(tokens: int, sequences: int, longest: int) -> tuple[int, bool]:
        plan = kv4.plan(tokens, sequences, group, kv_heads, longest, device, window)
        return plan.rows, plan.splits > 1

    warmed = {variant(tokens, 1, pages * page) for tokens, pages in kv4.distinct_batches(group, page)}
    chance = random.Random(group)
    for _ in range(1000):
        sequences = chance.randrange(1, 300)
        tokens = sequences * chance.randrange(1, 40) + chance.randrange(3000) * chance.randrange(2)
        assert variant(tokens, sequences, 16 << chance.randrange(14)) in warmed


def test_the_few_numbers_of_tokens_stand_for_all():
    def variant(tokens: int, shape: tiles.Shape, device: Device) -> tuple[Any, bool]:
        cut = tiles.tiles(tokens, shape, device)
        return cut._replace(splits=0), cut.splits > 1

    for sizes in ((4096, 4096, 1), (14336, 4096, 1), (4096, 128256, 1), (100, 64, 1), (4096, 4096, 32), (96, 512, 3)):
        shape = tiles.Shape(*sizes)
        for device in (Device(132, 8, 90), Device(84, 8, 86), Device(148, 16, 100)):
            warmed = {variant(tokens, shape, device) for tokens in tiles.distinct_tokens(shape, device)}
            assert {variant(tokens, shape, device) for tokens in (*range(1, 150), *range(150, 9000, 37))} == warmed
