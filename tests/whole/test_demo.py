"""What `rotquant demo` serves, and in which order; the models themselves are `test_real_model`'s and `test_serve`'s."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from rotquant.service import demo as module
from rotquant.service.demo import RECIPES, SERVED, SMOLLM2, SOONEST, TOY, demo
from rotquant.service.server import Answer, Server


class StandIn(Server):
    """Serves nothing; each answer names the checkpoint."""

    up: ClassVar[list[str]] = []

    def __enter__(self) -> StandIn:
        self.up.append(self.checkpoint.name)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> None:
        pass

    def ask(self, path: str, body: object, heard: object) -> Answer:
        return Answer(f"answer of {self.checkpoint.name}", 4, 1.0)

    def proof(self) -> list[str]:
        return ["proof"]


@pytest.fixture
def stands_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    def quantize(source: str, output: Path, **_: object) -> None:
        output.mkdir()
        scheme = {"kv_cache_scheme": {"symmetric": False}}
        sizes = {"num_key_value_heads": 1, "num_hidden_layers": 1, "head_dim": 64}
        (output / "config.json").write_text(json.dumps({"quantization_config": scheme} | sizes))

    class Score:
        perplexity = 1.0

    monkeypatch.setattr("rotquant.pipeline.quantize", quantize)
    monkeypatch.setattr("rotquant.measure.evaluate.evaluate", lambda *args, **settings: Score)
    monkeypatch.setattr(module, "Server", StandIn)
    monkeypatch.setattr(StandIn, "up", [])
    monkeypatch.setattr(module, "SMOLLM2", replace(SMOLLM2, make=lambda _: tmp_path))
    monkeypatch.setattr(module, "TOY", replace(TOY, make=lambda _: tmp_path))
    return StandIn.up


def test_a_large_model_answers_by_the_soonest_recipe_first(
    stands_in: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo(once=True, keep=tmp_path / "kept")
    assert stands_in == [SOONEST, SERVED]
    told = capsys.readouterr()
    first, second = (told.out.index(f"answers in W4A4KV4, {recipe}") for recipe in (SOONEST, SERVED))
    assert first < second < told.out.index("proof") < told.out.index("OpenAI API") < told.out.index("perplexity on")
    assert all(f"W4A4KV4, {recipe}" in told.out for recipe in RECIPES)
    assert "now the recipe best" in told.err
    demo(once=True, keep=tmp_path / "kept")
    assert stands_in == [SOONEST, SERVED, SERVED]  # all is there the second time


def test_a_small_one_by_the_better_recipe_at_once(stands_in: list[str], tmp_path: Path) -> None:
    demo(once=True, keep=tmp_path / "kept", offline=True)
    assert stands_in == [SERVED]
