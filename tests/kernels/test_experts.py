"""The native op of a mixture of experts against its specification, bit for bit, in every tier."""

import pytest
import torch

from native_tiers import gemm_tier, tier  # noqa: F401
from rotquant_kernels import convention, moe_experts, native, ops, prepare_experts, prepare_weight
from rotquant_kernels.backends import REFERENCE

EXPERTS, HIDDEN = 7, 88
SPECIFICATION = ops.SPECIFICATION["moe_experts"]


def stack(count: int, rows: int, columns: int, bits: int, groups: int, random: torch.Generator):
    """Packed codes int32 [count, rows, words] and scales float32 [count, rows, groups]."""
    low, high = convention.int_range(bits)
    codes = torch.randint(low, high + 1, (count * rows, columns), generator=random).to(torch.int8)
    scales = torch.rand(count, rows, groups, generator=random) * 0.02 + 0.001
    return convention.pack_int32(codes, bits).view(count, rows, -1), scales


class Mixture:
    """Experts whose tokens are few and many, some without any, and rows that are not finite."""

    def __init__(self, tokens: int, width: int, block: int, bits: int, groups: int, dtype: torch.dtype, top_k: int = 3):
        random = torch.Generator().manual_seed(tokens + width)
        self.packed = stack(EXPERTS, 2 * width, HIDDEN, bits, groups, random)
        self.down = stack(EXPERTS, HIDDEN, width, bits, groups, random)
        self.x = torch.randn(tokens, HIDDEN, generator=random).to(dtype)
        if tokens > 4:
            self.x[1], self.x[2, 3], self.x[3] = 0, float("nan"), self.x[3].abs()
        spread = torch.randn(tokens, EXPERTS, generator=random) + torch.arange(EXPERTS)  # the last ones get most
        self.chosen = spread.topk(top_k).indices
        self.weights = torch.rand(tokens, top_k, generator=random)
        self.bits, self.width, self.block = bits, width, block

    def run(self, op, rows=slice(None), places=None, act_bits: int = 4, symmetric: bool = False):
        """`op` on some rows, with the experts at `places` only."""
        table = None
        here = list(range(EXPERTS)) if places is None else places
        if places is not None:
            table = torch.full((EXPERTS,), -1, dtype=torch.int32)
            table[here] = torch.arange(len(here), dtype=torch.int32)
        (up, up_scale), (down, down_scale) = self.packed, self.down
        return op(
            self.x[rows], self.chosen[rows], self.weights[rows], table,
            prepare_experts(up[here], self.bits, HIDDEN, up_scale.shape[2]), up_scale[here].contiguous(),
            prepare_experts(down[here], self.bits, self.width, down_scale.shape[2]), down_scale[here].contiguous(),
            self.bits, self.block, act_bits, symmetric, 0.9, 1.0,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width", "block", "bits", "groups"), [(0, 48, 16, 4, 1), (1, 48, 0, 4, 1),
                         (5, 64, 64, 8, 1), (70, 48, 16, 4, 2), (700, 32, 8, 4, 1)])  # fmt: skip
def test_the_native_op_is_the_specification_bit_for_bit(gemm_tier, tokens, width, block, bits, groups, dtype):  # noqa: F811
    """The last case has more pairs than one wave."""
    mixture = Mixture(tokens, width, block, bits, groups, dtype)
    for act_bits, symmetric in ((4, False), (8, True)):
        got = mixture.run(moe_experts, act_bits=act_bits, symmetric=symmetric)
        expected = mixture.run(SPECIFICATION, act_bits=act_bits, symmetric=symmetric)
        assert got.dtype == dtype
        assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))
        assert got.shape == (tokens, HIDDEN)


def test_a_stack_is_each_experts_weight_in_one_piece(tier):  # noqa: F811
    packed, _ = stack(3, 70, HIDDEN, 4, 2, torch.Generator().manual_seed(1))
    made = prepare_experts(packed, 4, HIDDEN, 2)
    assert all(torch.equal(one, prepare_weight(given, 4, HIDDEN, 2)) for one, given in zip(made, packed, strict=True))


def test_a_token_does_not_depend_on_the_batch(tier):  # noqa: F811
    mixture = Mixture(70, 48, 16, 4, 1, torch.bfloat16)
    whole = mixture.run(moe_experts)
    alone = torch.cat([mixture.run(moe_experts, slice(i, i + 1)) for i in range(70)])
    assert torch.equal(whole.nan_to_num(7), alone.nan_to_num(7))


def test_ranks_of_experts_add_up_to_all(tier):  # noqa: F811
    mixture = Mixture(40, 48, 16, 4, 1, torch.float32)
    parts = [mixture.run(moe_experts, places=places) for places in ([0, 2, 4, 6], [5, 3, 1])]
    assert all(torch.equal(p, mixture.run(SPECIFICATION, places=q)) or p.isnan().any() for p, q in
               zip(parts, ([0, 2, 4, 6], [5, 3, 1]), strict=True))  # fmt: skip
    expected = mixture.run(moe_experts)
    fine = expected.isfinite()
    assert torch.allclose((parts[0] + parts[1])[fine], expected[fine], atol=1e-5 * float(expected[fine].abs().max()))


def test_without_native_kernels_the_specification_runs() -> None:
    """On the layout of the reference."""
    mixture = Mixture(9, 48, 16, 4, 1, torch.float32)
    fast = mixture.run(moe_experts)
    ops.choose_cpu_tier(native.REFERENCE)
    try:
        slow = mixture.run(moe_experts)
        assert ops.kernel_of("moe_experts") == REFERENCE.name
    finally:
        ops.choose_cpu_tier("auto")
    assert torch.equal(fast.nan_to_num(7), slow.nan_to_num(7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.chosen.fill_(EXPERTS), "expert 7 is none of 7"),
        (lambda m: setattr(m, "weights", m.weights.double()), "weights has a wrong dtype"),
        (lambda m: setattr(m, "block", 32), "transform block 32 does not divide 48 columns"),
    ],
)
def test_what_cannot_be_run_is_refused(change, message) -> None:
    mixture = Mixture(9, 48, 16, 4, 1, torch.float32)
    change(mixture)
    with pytest.raises(RuntimeError, match=message):
        mixture.run(moe_experts)
