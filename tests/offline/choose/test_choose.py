"""Recipes that choose: what helps the model in hand is taken, what hurts is left, and the record says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rotquant import load
from rotquant.checkpoint.journal import Journal
from rotquant.choose import judge
from rotquant.choose.judge import Judge, error_of, stretches
from rotquant.choose.search import Search
from rotquant.errors import RotQuantError
from rotquant.measure.compare_run import measure
from rotquant.measure.evaluate import load_any
from rotquant.pipeline import quantize
from rotquant.recipes import load_recipe, shipped
from rotquant.run import Settings, prepare
from rotquant.text import calibration_tokens, read_tokenizer
from source_models import HELDOUT, file_hashes, source_model

QUICK: dict[str, Any] = {"calibration": str(HELDOUT), "samples": 4, "seq_len": 64}
HURTS = {"too small a range": {"activations.clip": 0.3}}
HELPS = {"eight bits": {"activations.bits": 8}}
RAISES = {"too large a branch": {"weights.rank": 4096}}


def recipe(folder: Path, candidates: dict[str, Any], **base: Any) -> str:
    """quarot with these candidates, as a file."""
    data = load_recipe("quarot").model_dump(exclude={"choose"}) | base | {"choose": {"candidates": candidates}}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return str(file)


def provenance(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "config.json").read_text())["rotquant"]["provenance"]
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return source_model(tmp_path / "m", "llama")


def test_what_helps_is_taken_and_what_hurts_is_left(model: Path, tmp_path: Path) -> None:
    out = quantize(str(model), tmp_path / "out", recipe=recipe(tmp_path, HURTS | HELPS | RAISES), **QUICK)
    made = provenance(out)
    base, hurts, helps, raises = made["choice"]["trials"]
    assert (base["taken"], hurts["taken"], helps["taken"], raises["taken"]) == (True, False, True, False)
    assert hurts["difference"] > hurts["error"] > 0
    assert helps["difference"] < -helps["error"] < 0
    assert helps["kl"] < base["kl"] < hurts["kl"]
    assert "weights.rank 4096 is above" in raises["note"]
    assert made["choice"]["again"]["taken"]
    assert made["choice"]["again"]["kl"] != helps["kl"]
    assert made["recipe"]["activations"] == {"bits": 8, "symmetric": True, "clip": 0.9, "budget": "0"}
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["num_bits"] == 8
    card = (out / "README.md").read_text()
    assert "int8 per token" in card
    for trial, verdict in ((hurts, "left"), (helps, "taken")):
        assert f"| {trial['name']} | {trial['kl']:.4f} | {trial['difference']:+.4f} |" in card
        assert card.split(trial["name"])[1].split("\n")[0].endswith(f"| {verdict} |")


@pytest.mark.parametrize("candidates", [HURTS, HELPS])
def test_where_nothing_helps_it_is_the_base(
    model: Path, tmp_path: Path, candidates: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shard for shard what `quarot` makes of the same windows; also where what was taken does not win again."""
    again = Search._again
    monkeypatch.setattr(Search, "_again", lambda *arguments: replace(again(*arguments), taken=False))
    out = quantize(str(model), tmp_path / "out", recipe=recipe(tmp_path, candidates), **QUICK)
    assert provenance(out)["choice"]["trials"][1]["taken"] == (candidates is HELPS)
    quarot = quantize(str(model), tmp_path / "quarot", recipe="quarot", **QUICK)
    chosen, plain = file_hashes(out), file_hashes(quarot)
    shards = [name for name in plain if name.startswith("model-")]
    assert len(shards) == 4
    assert [chosen[name] for name in shards] == [plain[name] for name in shards]


@pytest.mark.parametrize("name", ["best", "best-online"])
def test_the_base_of_best_is_quarot(name: str) -> None:
    words = {"name", "description", "paper", "deviations", "choose"}
    assert load_recipe(name).model_dump(exclude=words) == load_recipe("quarot").model_dump(exclude=words)


def test_a_killed_search_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after each step of it in turn: no trial is done twice, R1 is learned once, and the bytes are the same."""
    learned = {"r1": {"learn.surrogate": {"optimiser": "qr", "steps": 3}}}
    run = {"recipe": recipe(tmp_path, HURTS | HELPS | learned), **QUICK}
    calls, keep, judged, stops = [], Journal.keep, Judge.__call__, False

    def kept(self: Journal, step: str, *arguments: Any) -> None:
        keep(self, step, *arguments)
        calls.append(step)
        if stops:
            raise KeyboardInterrupt

    def counted(self: Judge, *arguments: Any) -> torch.Tensor:
        calls.append("judged")
        return judged(self, *arguments)

    monkeypatch.setattr(Journal, "keep", kept)
    monkeypatch.setattr(Judge, "__call__", counted)
    whole = quantize(str(model), tmp_path / "whole" / "out", **run)
    expected, stops = list(calls), True
    assert expected.count("judged") == 6  # the base, three candidates, and the base and all that was taken again
    calls.clear()
    cut = tmp_path / "cut" / "out"
    for _ in range(len(expected) - 6):
        with pytest.raises(KeyboardInterrupt):
            quantize(str(model), cut, resume=True, **run)
    quantize(str(model), cut, resume=True, **run)
    assert calls == expected
    assert file_hashes(cut) == file_hashes(whole)
    assert quantize(str(model), cut, resume=True, **run) == cut  # finished: nothing to do
    assert calls == expected


def test_the_judge_measures_what_is_served(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all layers and all windows a trial's KL is that of the checkpoint, as `compare` has it."""
    monkeypatch.setattr(judge, "CALIBRATED", 1)
    name = recipe(tmp_path, HURTS)
    out = quantize(str(model), tmp_path / "out", recipe=name, **QUICK)
    calibrated = prepare(str(model), Settings(name, device="cpu", **QUICK)).calibrated
    assert calibrated is not None
    assert calibrated.aside is not None
    found = measure(load_any(model), load(out), calibrated.aside[::2])
    assert provenance(out)["choice"]["trials"][0]["kl"] == pytest.approx(found.kl, rel=0.02)


def test_the_gate_comes_before_the_trials(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> float:
        raise RotQuantError("equivalence gate: layer 0")

    monkeypatch.setattr("rotquant.pipeline.check_equivalence", refuse)
    monkeypatch.setattr(Search, "__call__", lambda search: pytest.fail("a trial before the gate"))
    with pytest.raises(RotQuantError, match="equivalence gate"):
        quantize(str(model), tmp_path / "out", recipe=recipe(tmp_path, HELPS), **QUICK)
    assert not (tmp_path / "out.partial").exists()


def test_no_trial_sees_another(model: Path, tmp_path: Path) -> None:
    """The same numbers where the same is tried again, also where nothing turns what full precision left."""
    bare = {"rotations": {"r1": "none", "r2": "none", "r3": "none", "r4": "none"}}
    name = recipe(tmp_path, {"as good as the same": {"weights.damping": 0.01 + 1e-12}}, **bare)
    base, same = provenance(quantize(str(model), tmp_path / "out", recipe=name, **QUICK))["choice"]["trials"]
    assert same["kl"] == pytest.approx(base["kl"], rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"learn.blockwise": {"learns": ["s_ud", "act_clip"], "epochs": 1}, "scales.up": "smooth"},
        {"learn.end_to_end": {"learns": ["r2", "s_ud"], "steps": 1, "batch": 1}},
        {"weights.method": "rtn", "online.down": ["kronecker"]},
    ],
)
def test_candidates_that_learn(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Layer by layer, end to end, and with online stages: all that recipes know can be a candidate."""
    out = quantize(str(model), tmp_path / "out", recipe=recipe(tmp_path, {"it": changes}), **QUICK)
    assert provenance(out)["choice"]["trials"][1]["kl"] > 0


def test_portable_tries_what_it_can_express(model: Path, tmp_path: Path) -> None:
    candidates = {"asymmetric": {"activations.symmetric": False}, "nearest": {"weights.method": "rtn"}}
    out = quantize(str(model), tmp_path / "out", recipe=recipe(tmp_path, candidates), profile="portable", **QUICK)
    asymmetric, nearest = provenance(out)["choice"]["trials"][1:]
    assert asymmetric["note"] == "changes nothing here"
    assert nearest["kl"] > 0


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_what_is_set_by_hand_is_not_chosen() -> None:
    def names(*settings: str) -> set[str]:
        choose = load_recipe("best", settings).choose
        assert choose is not None
        return set(choose.candidates)

    every = names()
    assert every - names("activations.symmetric=true") == {"asymmetric activations"}
    assert every - names("learn.surrogate.steps=20") == {"learned R1"}
    assert every - names("weights={method: rtn}") == {"GPTQ by attention"}
    assert load_recipe("best", ["choose=null"]).choose is None


def test_effort_adds_the_thorough_ones() -> None:
    none, usual, thorough = (load_recipe("best", [f"choose.effort={effort}"]) for effort in (0, 1, 2))
    assert not none.chooses
    assert none.possible == [none]
    assert usual.chooses
    assert len(thorough.possible) > len(usual.possible) > 1


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ({"odd": {"weights.beauty": 1}}, r"weights\.beauty.*\(choose: odd\)"),
        ({"odd": {"weights.bits": 5}}, r"weights\.bits.*\(choose: odd\)"),
        ({"odd": {"lm_head.bits": 8}}, "choose: odd: may change rotations, "),
        ({"odd": {"learn.blockwise": {"learns": ["online"]}}}, r"none of these.*\(choose: odd\)"),
        ({"odd": 3}, "choose.candidates.odd"),
    ],
)
def test_a_candidate_that_no_recipe_can_be_is_refused(tmp_path: Path, candidates: Any, message: str) -> None:
    with pytest.raises(RotQuantError, match=message):
        load_recipe(recipe(tmp_path, candidates))


def test_shipped_candidates_change_their_base() -> None:
    for name, _ in shipped():
        found = load_recipe(name)
        for changes in (found.choose.candidates | found.choose.thorough).values() if found.choose else ():
            assert found.with_changes(changes) != found


def test_effort_needs_candidates() -> None:
    with pytest.raises(RotQuantError, match=r"choose.*this recipe has no candidates to choose from; take best"):
        load_recipe("quarot", ["choose.effort=2"])


# ---- text and numbers ------------------------------------------------------------------------------------------------


def test_windows_set_aside_are_nobody_elses(model: Path, tmp_path: Path) -> None:
    tokenizer, text = read_tokenizer(model), str(HELDOUT)
    plain, both = (calibration_tokens(text, tokenizer, 8, 64, 3, aside) for aside in (0, 5))
    assert plain.aside is None
    assert both.aside is not None
    assert torch.equal(plain.tokens, both.tokens)
    assert len(both.aside) == 5
    assert not (both.tokens[:, None] == both.aside[None]).all(-1).any()
    short = tmp_path / "short.txt"
    short.write_text(HELDOUT.read_text()[:1500])
    few = calibration_tokens(str(short), tokenizer, 100, 64, 0, 50)
    assert few.aside is not None
    total = len(few.tokens) + len(few.aside)
    assert 1 <= len(few.aside) <= max(1, total // 4)


def test_one_window_of_text_leaves_the_base(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "one.txt"
    text.write_text(HELDOUT.read_text()[:200])
    run = QUICK | {"calibration": str(text)}
    out = quantize(str(model), tmp_path / "out", recipe=recipe(tmp_path, HELPS), **run)
    assert "no window to choose by" in capsys.readouterr().err
    assert "choice" not in provenance(out)
    assert "Chosen" not in (out / "README.md").read_text()


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 6, 30, 80])
@pytest.mark.parametrize("effort", [1, 2, 9])
def test_stretches(layers: int, effort: int) -> None:
    found = [index for stretch in stretches(layers, effort) for index in stretch]
    assert found == sorted(set(found))
    assert found[0] == 0
    assert found[-1] >= layers // 2
    assert found[-1] < layers
    assert min(layers, 3) <= len(found) <= max(3, layers * effort // 10 + 1)


def test_the_error_of_a_mean() -> None:
    """Of independent tokens the textbook's; of tokens that go together the larger one that they deserve."""
    draws = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    assert error_of(draws) == pytest.approx(1 / 64, rel=0.15)
    assert error_of(draws[:256].repeat_interleave(16)) == pytest.approx(1 / 16, rel=0.2)
