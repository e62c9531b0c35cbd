"""A mixture of experts: our grouped op and vLLM's, for one layer's experts and tokens that are spread over them.

Every call takes the next of eight routings, so that a step of few tokens does not find its experts' weights in the
cache. One token's routings are all experts of a layer, each once, where there are eight times as many as it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from kernels_lanes import Call, Peer, SkippedError, evenly, relative
from rotquant_kernels import convention, ops, reference

PEERS: dict[str, Peer] = {}
ROWS, ROUTINGS = 3, 8  # how much of an output is compared; routings that take turns
Rounded = Callable[[Tensor], Tensor]


class Problem:
    """Gate over up [2 width, hidden] and down [hidden, width] of each expert, and who gets which token."""

    def __init__(self, hidden: int, experts: int, width: int, top: int) -> None:
        self.hidden, self.experts, self.width, self.top = hidden, experts, width, top

    def expert(self, number: int) -> tuple[Tensor, Tensor]:
        """float32, of about unit gain."""
        random = torch.Generator().manual_seed(number)
        up = torch.randn(2 * self.width, self.hidden, generator=random) * self.hidden**-0.5
        return up, torch.randn(self.hidden, self.width, generator=random) * self.width**-0.5

    def input(self, rows: int) -> Tensor:
        return torch.randn(rows, self.hidden, generator=torch.Generator().manual_seed(rows)).bfloat16()

    def routings(self, rows: int) -> list[tuple[Tensor, Tensor]]:
        """Experts int64 and weights float32, [rows, top] each: for each token its own order of all experts, of which
        a routing takes the next few."""
        random = torch.Generator().manual_seed(rows)
        order = torch.stack([torch.randperm(self.experts, generator=random) for _ in range(rows)])
        order = order.repeat(1, -(-ROUTINGS * self.top // self.experts))[:, : ROUTINGS * self.top]
        weights = torch.rand(rows, self.top, generator=random).softmax(-1)
        return [(part.contiguous(), weights) for part in order.split(self.top, 1)]

    def codes(self, bits: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 and scales float32 [N, 1] of one matrix, a scale a channel."""
        scale = convention.qparams(weight, bits, symmetric=True)[0]
        return convention.quantize(weight, scale, torch.zeros(()), bits), scale


@dataclass
class Layer:
    """A copy of the weights, which takes the next routing with every call."""

    problem: Problem
    run: Callable[[Tensor, Tensor, Tensor], Tensor]  # of x, experts, weights
    routings: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    turn: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) not in self.routings:
            self.routings[len(x)], self.turn = self.problem.routings(len(x)), 0
        chosen, weights = self.routings[len(x)][self.turn % ROUTINGS]
        self.turn += 1
        return self.run(x, chosen, weights)


def rounded(bits: int, block: int, x: Tensor) -> Tensor:
    """Rows as our op sees them, in the basis that they came in."""
    if bits == 16:
        return x.float()
    stage = ("hadamard" if block else "none", block, None)
    codes, scale, _ = reference.quantize_rows(x, *stage, bits, True, 1.0)
    return reference.online_stage(codes * scale, *stage) if block else codes * scale


def block_of(columns: int) -> int:
    """Size of our R4: the largest power of two that divides the width of an expert."""
    return columns & -columns


def check(bits: int, act_bits: int, problem: Problem, x: Tensor, y: Tensor) -> dict[str, float]:
    """Some rows expert by expert, in float32: error. bytes: of all weights that this many tokens read, on average."""
    rows, block = evenly(len(x), ROWS), block_of(problem.width)
    chosen, weights = problem.routings(len(x))[0]
    expected = torch.zeros(len(rows), problem.hidden)
    for i, row in enumerate(rows):
        for expert, share in zip(chosen[row].tolist(), weights[row], strict=True):
            first, second = problem.expert(expert)
            up, down = seen(bits, 0, problem, first), seen(bits, block, problem, second)
            inside = convention.silu_mul((rounded(act_bits, 0, x[row][None]) @ up.T).bfloat16())
            expected[i] += share * (rounded(act_bits, block, inside) @ down.T)[0]
    read = [len(chosen.unique()) for chosen, _ in problem.routings(len(x))]
    share = sum(read) / len(read) / problem.experts
    return {"error": relative(y[rows], expected), "bytes": share * weight_bytes(bits, problem)}


def seen(bits: int, block: int, problem: Problem, weight: Tensor) -> Tensor:
    """A matrix as a kernel sees it; quantized in the basis of a Hadamard, and turned back."""
    if bits == 16:
        return weight.bfloat16().float()
    codes, scale = problem.codes(bits, turned(weight, block))
    return turned(codes * scale, block)


def turned(weight: Tensor, block: int) -> Tensor:
    return reference.online_stage(weight, "hadamard", block, None) if block else weight


def weight_bytes(bits: int, problem: Problem) -> float:
    """Of all experts of a layer; ours have a scale of 4 bytes a channel."""
    numbers = 3 * problem.hidden * problem.width * bits / 8
    scales = 0 if bits == 16 else 4 * (2 * problem.width + problem.hidden)
    return problem.experts * (numbers + scales)


def peer(name: str, lane: str, bits: int, act_bits: int) -> Callable[[Callable[[Problem], Iterator[Call]]], Peer]:
    def register(build: Callable[[Problem], Iterator[Call]]) -> Peer:
        label = "bf16" if bits == 16 else f"W{bits}A{act_bits}"
        PEERS[name] = Peer(name, label, lane, build, partial(weight_bytes, bits), partial(check, bits, act_bits))
        return PEERS[name]

    return register


# ---- ours ---------------------------------------------------------------------------------------------


def packed(problem: Problem) -> tuple[Tensor, ...]:
    """Words and scales of gate and up, and of down in the basis of R4, as in a checkpoint."""
    found = []
    for number in range(problem.experts):
        up, down = problem.expert(number)
        pairs = [problem.codes(4, up), problem.codes(4, turned(down, block_of(problem.width)))]
        found.append([part for codes, scale in pairs for part in (convention.pack_int32(codes, 4), scale)])
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))


def ours(problem: Problem, act_bits: int) -> Iterator[Call]:
    up, up_scale, down, down_scale = packed(problem)
    block = block_of(problem.width)

    def run(up: Tensor, down: Tensor, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return ops.moe_experts(
            x, chosen, weights, None, up, up_scale, down, down_scale, 4, block, act_bits, True, 1.0, 1.0
        )

    while True:
        weights = ops.prepare_experts(up, 4, problem.hidden), ops.prepare_experts(down, 4, problem.width)
        yield Layer(problem, partial(run, *weights))


@peer("rotquant-w4a4", "rotquant", 4, 4)
def _(problem: Problem) -> Iterator[Call]:
    return ours(problem, 4)


@peer("rotquant-w4a8", "rotquant", 4, 8)
def _(problem: Problem) -> Iterator[Call]:
    return ours(problem, 8)


# ---- vLLM: the op that it runs for experts in bf16, with weights packed as it packs them --------------


@peer("vllm-bf16", "vllm", 16, 16)
def _(problem: Problem) -> Iterator[Call]:
    import vllm._custom_ops as vllm_ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        raise SkippedError("this build of vLLM has no op for experts")
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"

    def run(up: Tensor, down: Tensor, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(x)
        vllm_ops.cpu_fused_moe(out, x, up, down, None, None, weights, chosen.int(), "silu", isa)
        return out

    while True:
        pairs = ([half.bfloat16() for half in problem.expert(number)] for number in range(problem.experts))
        stacks = [torch.stack(halves) for halves in zip(*pairs, strict=True)]
        yield Layer(problem, partial(run, *(vllm_ops.cpu_prepack_moe_weight(stack, isa) for stack in stacks)))
