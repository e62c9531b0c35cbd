"""How many kernels a decoding step of a layer of Llama-3-8B launches; nothing is compiled."""

from collections import Counter
from unittest import mock

import pytest

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

import launch_gate
from rotquant_kernels.cuda import device, gemm, kv4, rows_long

H100 = device.Device(132, 8, 90)
SHAPE = launch_gate.MODELS["Llama-3-8B"]


def launches(m: int) -> Counter[str]:
    """Kernels of ours by name, for m sequences of at most 16384 tokens."""
    found: Counter[str] = Counter()

    def count(self, *given, **options):
        found[self.fn.__name__] += 1

    hidden, inner = SHAPE.hidden, SHAPE.intermediate
    with (
        mock.patch.object(JITFunction, "run", count),
        mock.patch.object(gemm, "device_of", return_value=H100),
        mock.patch.object(kv4, "device_of", return_value=H100),
        mock.patch.object(rows_long, "device_of", return_value=H100),
    ):
        launch_gate.norm(m, hidden)
        launch_gate.linear(m, hidden, hidden + 2 * SHAPE.kv_heads * SHAPE.head_dim)
        launch_gate.write(m, SHAPE.kv_heads, SHAPE.head_dim, SHAPE.head_dim, rope=True)
        launch_gate.attend(m, m, SHAPE.heads, SHAPE.kv_heads, SHAPE.head_dim, rope=True)
        launch_gate.quantize(m, hidden)
        launch_gate.linear(m, hidden, hidden)
        launch_gate.norm(m, hidden)
        launch_gate.linear(m, hidden, 2 * inner)
        launch_gate.quantize(m, inner, inner & -inner, silu=True)
        launch_gate.linear(m, inner, hidden)
    return found


@pytest.mark.parametrize(("m", "total"), [(1, 11), (16, 11), (64, 13), (128, 13)])
def test_a_layer_launches_few_kernels(m, total):
    """None for RoPE. Few sequences have contexts in parts; some tokens have products in parts. bf16 has 10 or 11."""
    found = launches(m)
    assert found.total() == total, found
    assert found["merge"] == (m <= 16)
    assert found["sum_kernel"] == (0 if m <= 16 else 3)
