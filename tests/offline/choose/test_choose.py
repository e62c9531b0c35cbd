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
from rotquant.choose.judge import Judge, calibration, error_of, judged_windows, relative, stretches
from rotquant.choose.search import Search, compared, learned
from rotquant.errors import RotQuantError
from rotquant.learn.options import Surrogate
from rotquant.learn.rotations import residual_rows
from rotquant.learn.starts import usual_mean
from rotquant.learn.stream import SAMPLED
from rotquant.measure.compare_run import measure
from rotquant.measure.evaluate import load_any
from rotquant.models import read_architecture
from rotquant.pipeline import quantize
from rotquant.recipes import load_recipe, shipped
from rotquant.run import Settings, begin, prepare, tuner
from rotquant.text import calibration_tokens, read_tokenizer
from source_models import HELDOUT, file_hashes, source_model

QUICK: dict[str, Any] = {"calibration": str(HELDOUT), "samples": 4, "seq_len": 64}
HURTS = {"too small a range": {"activations.clip": 0.3}}
HELPS = {"eight bits": {"activations.bits": 8}}
RAISES = {"too large a branch": {"weights.rank": 4096}}


def recipe(folder: Path, candidates: dict[str, Any], **base: Any) -> str:
    """quarot with these candidates, and what else is given, as a file."""
    data = load_recipe("quarot").model_dump(exclude={"choose"}) | {"choose": {"candidates": candidates}} | base
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
    assert hurts["relative"] > hurts["error"] > 0
    assert helps["relative"] < -2 * helps["error"] < 0
    assert helps["difference"] < 0 < hurts["difference"]
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
        numbers = f"{trial['kl']:.4f} | {trial['difference']:+.4f} | {trial['relative']:+.1%}"
        assert f"| {trial['name']} | {numbers} |" in card
        assert card.split(trial["name"])[1].split("\n")[0].endswith(f"| {verdict} |")


def test_what_changes_the_cache_alone_is_judged_on_all_layers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all else at 8 bits, where a cache that is too coarse shows; what is taken stands in the next trial."""
    monkeypatch.setattr(judge, "LEAST", 1)
    seen, judged = [], Judge.__call__

    def kept(self: Judge, job: Any, turn: int, slots: Any, progress: Any, whole: bool) -> torch.Tensor:
        seen.append((whole, job.recipe.weights.bits, job.recipe.kv.key_clip))
        return judged(self, job, turn, slots, progress, whole)

    monkeypatch.setattr(Judge, "__call__", kept)
    tried = {"finer keys": {"kv.key_clip": 0.95}, "coarse values": {"kv.value_clip": 0.2}} | HURTS
    coarse = load_recipe("quarot").kv.model_dump() | {"key_clip": 0.2}
    out = quantize(str(model), tmp_path / "out", recipe=recipe(tmp_path, tried, kv=coarse), **QUICK)
    _, finer, values, hurts = provenance(out)["choice"]["trials"]
    assert (finer["taken"], values["taken"], hurts["taken"]) == (True, False, False)
    alone = [(True, 8, 0.95), (True, 8, 0.2)]  # with the candidate, and without
    assert seen[:6] == [(False, 4, 0.2), *alone, (False, 4, 0.95), (True, 8, 0.95), (False, 4, 0.95)]
    assert "on all layers, whose weights and activations have 8 bits" in (out / "README.md").read_text()


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


def test_r1_is_learned_from_what_is_rounded(model: Path, tmp_path: Path) -> None:
    """Its rows are less their mean, or their leading directions, site by site, and it is another R1 then."""
    run, options = prepare(str(model), Settings("quarot", device="cpu", **QUICK)), Surrogate(optimiser="qr", rows=256)
    learns = {"learn.surrogate": options.model_dump()}
    branch = {"weights.rank": 8, "weights.branch": "pca"}
    found = [run.recipe.with_changes(learns | more) for more in ({}, {"online.shift_norms": "all"}, branch)]
    sites = 2 * run.arch.layers
    means, leading = [], []
    for name, recipe in enumerate(found):
        journal = Journal(tmp_path / str(name), {}, resume=False)
        rows = residual_rows(begin(run, recipe), options, journal).view(sites, -1, run.arch.hidden_size)
        means.append(max(usual_mean(site).norm() for site in rows))
        leading.append(max(torch.linalg.svdvals(site)[0] / len(site) ** 0.5 for site in rows))
        journal.abandon()
    assert means[1] < 1e-4 < 0.1 < means[0]
    assert leading[2] < 0.9 * leading[0]
    assert len({learned(journal, recipe).prefix for recipe in found}) == 3


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


# ---- tuning, the last of the candidates ----------------------------------------------------------------------------

SLIGHT = ("weights.method=rtn", "weights.clip_search=false", "activations.bits=8", "kv.bits=16")  # tuning takes it back


def tuned(model: Path, out: Path, tune: dict[str, Any], *settings: str, **options: Any) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of quarot with tuning on trial, and the trial."""
    name = recipe(out.parent, {}, choose={"candidates": {}, "tune": tune})
    made = quantize(str(model), out, recipe=name, settings=[*SLIGHT, *settings], **QUICK, **options)
    return made, provenance(made)["choice"]["tuned"]


def test_tuning_is_taken_where_it_brings_the_model_nearer(model: Path, tmp_path: Path) -> None:
    """Judged as `compare` would."""
    out, trial = tuned(model, tmp_path / "out", {"steps": 20})
    assert trial["taken"]
    assert trial["relative"] < -2 * trial["error"]
    made = provenance(out)
    assert made["recipe"]["tune"]["steps"] == 20
    calibrated = prepare(str(model), Settings("best", device="cpu", **QUICK)).calibrated
    assert calibrated is not None
    assert calibrated.aside is not None
    assert trial["kl"] == pytest.approx(measure(load_any(model), load(out), calibrated.aside).kl, rel=0.02)
    assert f"KL {trial['kl']:.4f}" in (out / "README.md").read_text()
    assert tuned(model, tmp_path / "out", {"steps": 20}, resume=True)[1] == trial


@pytest.mark.parametrize(
    ("tune", "settings", "said"),
    [({"steps": 2, "scale_lr": 1.0}, (), "left"), ({"steps": 2}, ("choose.memory=0.5",), "not tried: it needs about")],
)
def test_without_a_win_it_is_what_it_was(
    model: Path, tmp_path: Path, tune: dict[str, Any], settings: tuple[str, ...], said: str
) -> None:
    out, trial = tuned(model, tmp_path / "out", tune, *settings)
    assert not trial["taken"]
    assert said in (out / "README.md").read_text().split("Chosen")[1]
    assert provenance(out)["recipe"]["tune"] is None
    plain = file_hashes(quantize(str(model), tmp_path / "plain", recipe="quarot", settings=SLIGHT, **QUICK))
    found = file_hashes(out)
    shards = [name for name in plain if name.startswith("model-")]
    assert [found[name] for name in shards] == [plain[name] for name in shards]


def test_tuning_reads_windows_once_where_the_text_has_them(model: Path) -> None:
    def windows(**changes: Any) -> torch.Tensor:
        settings = [f"tune={json.dumps({'steps': 8} | changes)}"]
        run = prepare(str(model), Settings("quarot", settings, device="cpu", **QUICK))
        assert run.calibrated is not None
        assert torch.equal(run.calibrated.tokens, plain)
        return tuner(run).tokens

    found = prepare(str(model), Settings("quarot", device="cpu", **QUICK)).calibrated
    assert found is not None
    plain = found.tokens
    length = plain.shape[1]
    assert len(windows(tokens=2 * length + 1).unique(dim=0)) == 16  # and the calibration is what it is without
    assert len(windows(tokens=length, steps=3).unique(dim=0)) == 3


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
    for setting in ("tune=null", "tune.steps=3"):
        fixed = load_recipe("best", [setting]).choose
        assert fixed is not None
        assert fixed.tuning is None


def test_effort_adds_the_thorough_ones() -> None:
    none, half, usual, thorough = (load_recipe("best", [f"choose.effort={effort}"]) for effort in (0, 0.5, 1, 2))
    assert not none.chooses
    assert none.possible == [none]
    assert usual.chooses
    assert len(thorough.possible) > len(usual.possible) == len(half.possible) > 1
    tunings = [found.choose.tuning for found in (none, half, usual, thorough) if found.choose]
    assert [tuning and tuning.steps for tuning in tunings] == [None, 16, 32, 64]


def test_half_the_effort_is_half_the_tokens(model: Path) -> None:
    arch, tokens = read_architecture(model), torch.arange(1000 * 64).view(1000, 64)
    assert [judged_windows(512, effort) for effort in (0.1, 0.5, 1, 2)] == [2, 4, 8, 16]
    assert [len(calibration(tokens, arch, effort)) for effort in (0.5, 1, 2, 9)] == [6, 11, 22, 99]
    assert [len(calibration(tokens.view(125, 512), arch, effort)) for effort in (0.5, 1, 2)] == [4, 8, 16]


def test_a_trial_calibrates_on_the_first_tokens_of_long_windows(model: Path) -> None:
    tokens = torch.arange(20 * 4096).view(20, 4096)
    assert torch.equal(calibration(tokens, read_architecture(model), 1), tokens[[0, 2, 5, 7, 10, 12, 15, 17], :SAMPLED])


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
        for changes in (one for some in found.choose.lists.values() for one in some.values()) if found.choose else ():
            assert found.with_changes(changes) != found


def test_a_recipe_on_a_base(tmp_path: Path) -> None:
    """What it says replaces the base's, section by section; settings and candidates by hand work as ever."""
    file = tmp_path / "mine.yaml"
    file.write_text("base: best\nname: mine\nchoose: {candidates: {smoothing before R4: null}}")
    with pytest.raises(RotQuantError, match="smoothing before R4"):
        load_recipe(str(file))
    file.write_text("base: best\nname: mine\nkv: {bits: 16}\nchoose: {candidates: {odd: {kv.key_clip: 1.0}}}")
    mine, best = load_recipe(str(file), ["weights.bits=8"]), load_recipe("best")
    assert mine.choose is not None
    assert best.choose is not None
    assert mine.choose.candidates == best.choose.candidates | {"odd": {"kv.key_clip": 1.0}}
    wanted = {"kv": {"bits": 16}, "weights": {"bits": 8}}
    for part in ("rotations", "activations", "kv", "weights", "description"):
        before, after = (found.model_dump()[part] for found in (best, mine))
        assert after == (before | wanted.get(part, {}) if isinstance(before, dict) else before)


@pytest.mark.parametrize(
    ("base", "message"),
    [("nobody", "base: 'nobody' is no shipped recipe: take one of baseq, best"), ("3", "base: 3 is no shipped"),
     ("best-online", "base: best-online has itself the base best; name that")],
)  # fmt: skip
def test_a_base_that_cannot_be_is_refused(tmp_path: Path, base: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {base}\nname: mine\ndescription: x\n")
    with pytest.raises(RotQuantError, match=message):
        load_recipe(str(file))


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
@pytest.mark.parametrize("effort", [0.1, 0.5, 1, 2, 9])
def test_stretches(layers: int, effort: float) -> None:
    found = [index for stretch in stretches(layers, effort) for index in stretch]
    assert found == sorted(set(found))
    assert found[0] == 0
    assert found[-1] >= layers // 2
    assert found[-1] < layers
    assert min(layers, 3) <= len(found) <= max(3, layers * effort // 10 + 1)


def test_few_tokens_with_most_of_the_kl_do_not_hide_a_win() -> None:
    """A tenth less on every token, in noise: plain to the relative difference, and lost in that of the means. What
    lowers most tokens' KL and raises the mean is left."""
    drawn = torch.Generator().manual_seed(0)
    before = 0.03 * (1.8 * torch.randn(2048, generator=drawn)).exp()
    after = 0.9 * before * (0.5 * torch.randn(2048, generator=drawn)).exp()
    found = relative(after, before)
    assert found.mean() < -4 * error_of(found)
    assert (after - before).mean() > -2 * error_of(after - before)
    worst = torch.where(before > before.quantile(0.995), 3 * before, 0.8 * before)
    assert relative(worst, before).mean() < 0
    assert not compared("it", {}, worst, before, 2).taken
    assert compared("it", {}, 0.9 * before, before, 2).taken
    assert not compared("it", {}, before * float("nan"), before).taken
    even = torch.where(before == before.max(), before + (0.1 * before).sum() + 0.1, 0.9 * before)
    assert (even - before).mean() > 0
    assert compared("it", {}, even, before).taken  # of a trial; what was taken has to lower the mean, too
    assert not compared("it", {}, even, before, 2).taken
    assert not compared("it", {}, even, before, 0).taken  # of tuning, which is one trial
    assert not compared("it", {}, worst, before).taken
    runs = torch.tensor([-0.1] * 36 + [0.1] * 28)[torch.randperm(64, generator=drawn)].repeat_interleave(32)
    flat = torch.full((2048,), 0.03)
    within = flat * (1 + runs / 2) / (1 - runs / 2)  # lower in both, by one error
    assert compared("it", {}, within, flat, 0).taken
    assert not compared("it", {}, within, flat, 2).taken


def test_the_error_of_a_mean() -> None:
    """Of independent tokens the textbook's; of tokens that go together the larger one that they deserve."""
    draws = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    assert error_of(draws) == pytest.approx(1 / 64, rel=0.15)
    assert error_of(draws[:256].repeat_interleave(16)) == pytest.approx(1 / 16, rel=0.2)
