"""RoPE joined with what reads q and k: where, and that it is the same as before; launches are stand-ins in torch."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.qwen3_next import Qwen3NextAttention

from rotquant_kernels import calls, reference
from rotquant_kernels.cuda import kv4, rope
from rotquant_kernels.formats import KVFormat
from vllm_api import recorded
from vllm_rotquant import compat, positions, proof
from vllm_rotquant.compat.models import MODELS, ROTATED
from vllm_rotquant.kv_cache import AsymmetricKV4Backend, KV4Impl
from vllm_uses import FORWARD, HEADS, LLAMA_4

HEAD_COUNT, KV_HEADS, DIM = 6, 2, 64


def bare(kind, **attributes):
    """A module of vLLM's as its forward sees it, without what builds it."""
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def rotary(kind=RotaryEmbedding, **changes):
    angles = torch.arange(300)[:, None] / 10.0 ** torch.linspace(0, 4, DIM // 2)
    table = torch.cat((angles.cos(), angles.sin()), -1).bfloat16()
    known = {
        "cos_sin_cache": table,
        "head_size": DIM,
        "rotary_dim": DIM,
        "is_neox_style": True,
        "use_flashinfer": False,
    }
    return bare(kind, **known | changes)


def attention(turn, kind=LlamaAttention, window=None, fed_back=False, **changes):
    """fed_back: keys are rounded with error feedback."""
    maker = SimpleNamespace(key_feedback=torch.randn(KV_HEADS * DIM, DIM, generator=torch.Generator().manual_seed(4)))
    maker.key_feedback *= 0.1
    layer = SimpleNamespace(
        num_heads=HEAD_COUNT, num_kv_heads=KV_HEADS, head_size=DIM, kv_cache_dtype="auto", dtype=torch.bfloat16,
        impl=SimpleNamespace(scale=DIM**-0.5, logits_soft_cap=None), sliding_window=window,
        attn_backend=AsymmetricKV4Backend,
        buffers=lambda: [torch.zeros(1)],
        quant_method=SimpleNamespace(format=KVFormat(False, 1.0, 1.0, DIM, fed_back), prefix="layers.0.attn"),
    )  # fmt: skip
    layer.impl = KV4Impl(layer, layer.quant_method.format, maker if fed_back else None)
    return layer, bare(kind, attn=layer, rotary_emb=turn, **changes)


@pytest.fixture
def join(monkeypatch):
    """`join_rope` of one layer on a device whose kernels turn positions; how many it joined."""
    said = []
    monkeypatch.setattr(compat, "tell_compiled_graphs_apart", lambda key, value: said.append(value))

    def run(layer, holder, able=True):
        monkeypatch.setattr(positions, "backend_of", lambda *_: SimpleNamespace(turns_positions=able))
        positions.join_rope([layer], SimpleNamespace(of=lambda _: holder))
        return sum(said)

    return run


def test_a_known_model_hands_q_and_k_on_as_they_are(join):
    layer, holder = attention(rotary(is_neox_style=False))
    assert join(layer, holder) == 1
    q, k = torch.randn(2, 3, 8)
    assert holder.rotary_emb(None, q, k) == (q, k)
    assert layer.impl.rope.pairs
    assert layer.impl.rope.table.shape == (300, DIM)
    assert layer.attn_backend.forward_includes_kv_cache_update
    assert (layer.attn_backend.symmetric, AsymmetricKV4Backend.forward_includes_kv_cache_update) == (False, False)


@pytest.mark.parametrize(
    "given",
    [
        {"turn": rotary(MRotaryEmbedding)}, {"turn": rotary(use_flashinfer=True)}, {"turn": rotary(head_size=32)},
        {"turn": rotary(rotary_dim=32)}, {"turn": rotary(), "kind": Qwen3NextAttention},
        {"turn": rotary(), "do_llama_4_scaling": True}, {"turn": rotary(), "window": 290},
    ],
)  # fmt: skip
def test_what_is_not_known_keeps_its_own(join, given):
    layer, holder = attention(**given)
    assert join(layer, holder) == 0
    assert holder.rotary_emb is given["turn"]
    assert (layer.impl.rope, layer.attn_backend) == (None, AsymmetricKV4Backend)


def test_on_other_kernels_nothing_changes(join):
    layer, holder = attention(rotary())
    assert join(layer, holder, able=False) == 0
    assert layer.impl.rope is None


def stand_in(monkeypatch, turned=rope.turned):
    """The launches, in torch."""

    def places(starts, lens):
        return torch.cat([torch.arange(n - int(b - a), n) for a, b, n in zip(starts, starts[1:], lens, strict=False)])

    def write(key, value, cache, slots, rotate, symmetric, k_clip, v_clip, feedback, given, starts, lens):
        key = turned(key, places(starts, lens.tolist()), given)
        reference.kv4_write(key, value, cache, slots, rotate, symmetric, k_clip, v_clip, feedback)

    def attend(query, cache, starts, lens, table, out, scale, rotate, symmetric, window, cap, given):
        query = turned(query, places(starts, lens.tolist()), given)
        reference.kv4_attention(query, cache, starts, lens, table, out, scale, rotate, symmetric, window, cap)

    monkeypatch.setattr(kv4, "write", write)
    monkeypatch.setattr(kv4, "attention", attend)


@pytest.mark.parametrize("pairs", [True, False])
def test_steps_are_as_if_the_model_had_turned_q_and_k(join, monkeypatch, pairs):
    """A first chunk, a mixed step and a decode step of two sequences, as the start-up check runs them."""
    generator = torch.Generator().manual_seed(1)
    lengths = [sum(new) for new in zip(*proof.STEPS, strict=True)]
    q, k, v = (
        [torch.randn(n, h, DIM, generator=generator).bfloat16() for n in lengths]
        for h in (HEAD_COUNT, KV_HEADS, KV_HEADS)
    )
    layer, holder = attention(rotary(is_neox_style=not pairs), fed_back=pairs)
    plain, _ = attention(rotary(), fed_back=pairs)
    join(layer, holder)
    stand_in(monkeypatch)
    in_torch = {name: getattr(reference, name) for name in ("kv4_write", "kv4_attention")}
    monkeypatch.setattr(calls, "ops", SimpleNamespace(**in_torch))  # of the other layer
    placed = [[proof.placed(layer, one) for one in x] for x in (q, k)]
    for one, other in zip(
        proof.served_attention(layer, q, k, v), proof.served_attention(plain, *placed, v), strict=True
    ):
        assert torch.equal(one, other)
    row = proof.attention_row(layer, 1)
    assert row.passed
    assert row.front == "rope"


def test_the_start_up_check_sees_a_wrong_turn(join, monkeypatch):
    layer, holder = attention(rotary())
    join(layer, holder)
    stand_in(monkeypatch, lambda x, place, given: rope.turned(x, place, given._replace(pairs=True)))
    assert not proof.attention_row(layer, 1).passed


@pytest.mark.parametrize("version", ["0.28.0", "0.30.0", "0.33.0"])
def test_nothing_stands_between_rope_and_attention(version):
    """By what the forward of these classes reads of itself."""
    facts, allowed = recorded(version), {*FORWARD["ATTENTIONS"], *HEADS.split(), *LLAMA_4.split(), "use_rope"}
    for name in ROTATED:
        module, kind = f"{MODELS}{name}".rsplit(".", 1)
        assert set(facts.classes[facts.places[f"{module}:{kind}"]]["forward_reads"]) <= allowed
