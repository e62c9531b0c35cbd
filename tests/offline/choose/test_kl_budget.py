"""Budgets of KL: as few sites at 8 bits as keep it, by the KL of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rotquant
from interruption import stop_at_call
from rotquant.choose.kl_budget import BudgetMeter, fewest, remaining, sets
from rotquant.errors import RotQuantError
from rotquant.measure.compare_run import measure
from rotquant.measure.evaluate import load_any
from rotquant.pipeline import quantize
from rotquant.recipe import Activations
from rotquant.run import Settings, prepare
from source_models import HELDOUT, file_hashes, source_model

QUICK: dict[str, Any] = {"calibration": str(HELDOUT), "samples": 3, "seq_len": 128}
DAMAGE = torch.tensor([1.0, 5.0, 0.0, 4.0]).double()


def test_the_damage_that_is_left() -> None:
    assert remaining(DAMAGE).tolist() == pytest.approx([1, 0.5, 0.1, 0, 0])
    assert sets(DAMAGE) == [0, 1, 2, 3, 4]
    assert sets(torch.ones(100).double()) == [0, 30, 50, 65, 80, 90, 100]


@pytest.mark.parametrize(
    ("most", "count"), [(2.0, 0), (1.0, 0), (0.99, 1), (0.53, 1), (0.5, 2), (0.15, 2), (0.1, 3), (0.09, None)]
)
def test_the_fewest_sites_that_keep_a_budget(most: float, count: int | None) -> None:
    """KL 1 without 8 bits and 0.1 with them everywhere; between the three measured sets as the damage falls."""
    assert fewest(DAMAGE, [0, 2, 4], [1.0, 0.15, 0.1], most) == count


def test_budgets_are_read() -> None:
    assert Activations(budget="5% KL").most_kl == pytest.approx(0.05)
    assert Activations(budget="5% KL").mixed
    assert Activations(budget="150% KL").most_kl == pytest.approx(1.5)
    assert Activations(budget="5%").most_kl is None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_model(tmp_path_factory.mktemp("kl") / "model", "llama", initializer_range=0.1)


def test_a_budget_is_kept_with_as_few_sites_as_it_takes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that cannot be kept takes all sites, and says so; one halfway between takes some, and the model served keeps
    it. A run that was killed among its layers gives the same bytes."""
    monkeypatch.setattr("rotquant.choose.judge.JUDGED", 256)
    found: list[list[float]] = []
    call = BudgetMeter.__call__
    monkeypatch.setattr(BudgetMeter, "__call__", lambda *a: found.append(call(*a)) or found[-1])  # type: ignore[func-returns-value]
    out = quantize(str(model), tmp_path / "all", recipe="rtn", scheme="auto", budget="0.01% KL", **QUICK)
    assert "all sites get 8 bits" in capsys.readouterr().err
    card = (out / "README.md").read_text()
    assert "8-bit activations | at 8 of 8 sites" in card
    ((four, *_, eight),) = found
    assert four > 1.2 * eight
    settings: dict[str, Any] = {"recipe": "rtn", "scheme": "auto", "budget": f"{50 * (four + eight):.4f}% KL", **QUICK}
    some = quantize(str(model), tmp_path / "some", **settings)
    text = (some / "README.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| 8-bit activations |")]
    assert int(line.split()[5]) in range(1, 8)
    aside = prepare(str(model), Settings("rtn", ["activations.budget=5% KL"], **QUICK)).calibrated.aside  # type: ignore[union-attr]
    assert aside is not None
    served = measure(load_any(model), rotquant.load(some), aside).kl
    assert eight < served < 1.02 * (four + eight) / 2

    seen = stop_at_call(monkeypatch, BudgetMeter, "_layer", 2)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(model), tmp_path / "cut" / "some", **settings)
    cut = quantize(str(model), tmp_path / "cut" / "some", resume=True, **settings)
    assert seen == [0, 1, 1]
    assert file_hashes(cut) == file_hashes(some)


def test_no_text_to_measure_on_is_refused(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("one two three four five six seven eight nine ten " * 2)
    settings: dict[str, Any] = {"recipe": "rtn", "scheme": "auto", "budget": "5% KL", "calibration": str(text)}
    with pytest.raises(RotQuantError, match="no window is left to measure"):
        quantize(str(model), tmp_path / "out", samples=1, seq_len=32, **settings)
