"""The words of a recipe's `online`: each has a start, of registered kinds, whose tensors a checkpoint may hold."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from rotquant.learn.starts import STARTS, Seen
from rotquant.recipe import OnlineStages, OnlineWord
from rotquant.weights.layerwise import stored_stage
from rotquant_kernels import KINDS
from rotquant_kernels.formats import RowFormat

WIDTH = 48


def test_words_are_those_that_have_a_start() -> None:
    assert set(STARTS) == {*get_args(OnlineWord), "heads"} - {"hadamard"}  # which needs no look at a model
    assert OnlineStages(o=list(STARTS)).of("o") == list(STARTS)


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
