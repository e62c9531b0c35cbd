"""The words of a recipe's `online`: each has a start, of registered kinds, whose tensors a checkpoint may hold."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from rotquant.learn.starts import STARTS, Seen, usual_mean
from rotquant.recipe import SITES, OnlineStages, OnlineWord
from rotquant.weights.layerwise import stored_stage
from rotquant_kernels import KINDS
from rotquant_kernels.formats import RowFormat

WIDTH = 48


def test_words_are_those_that_have_a_start() -> None:
    assert set(STARTS) == {*get_args(OnlineWord), "heads"} - {"hadamard"}  # which needs no look at a model
    assert OnlineStages(o=list(STARTS)).of("o") == list(STARTS)


def test_a_shift_is_the_mean_of_tokens_that_are_not_massive() -> None:
    x = torch.randn(40, WIDTH) + torch.arange(WIDTH) / 10
    sink = torch.zeros(WIDTH).index_fill(0, torch.tensor(7), 1e4)
    assert torch.allclose(usual_mean(torch.cat((x, sink[None]))), x.mean(0), atol=1e-5)
    assert usual_mean(sink[None]).eq(0).all()


def test_shifts_stand_behind_all_else_and_once() -> None:
    online = OnlineStages(attn=["hadamard"], o=["shift", "kronecker"], shift_norms="all", shift_o=True)
    assert [online.of(site) for site in SITES] == [["hadamard", "shift"], ["shift", "kronecker"], ["shift"], []]
    attention = OnlineStages(shift_norms="attn")
    assert [attention.learned(site) for site in SITES] == [["shift"], [], [], []]


@pytest.mark.parametrize("tp_max", [1, 3])
@pytest.mark.parametrize("word", STARTS)
def test_a_start_can_be_stored(word: str, tp_max: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, WIDTH, generator=generator) + torch.arange(WIDTH) / 10
    stages = STARTS[word](Seen(x, generator, OnlineStages(block=8), 16, tp_max, RowFormat(4, False)))
    for stage in stages:
        kind, tensor = KINDS[stage.kind], stored_stage(stage)
        assert tensor.dtype == kind.dtype
        assert tensor.shape == kind.shape(stage.block, WIDTH)
        assert kind.fault(tensor, stage.block, WIDTH) == ""
    if word in ("dense", "greedy", "shift"):  # what a rank of tp_max can run
        assert all(WIDTH // tp_max % KINDS[stage.kind].span(stage.block, WIDTH) == 0 for stage in stages)
