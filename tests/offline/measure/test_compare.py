"""`rotquant compare`: its arithmetic on cases done by hand, resuming, failures, and a real run."""

from __future__ import annotations

import io
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import rotquant
from checkpoints import BLOCK, INTERMEDIATE, VOCAB, edit_config, random_model, tiny, write_checkpoint
from rotquant import cli
from rotquant.errors import RotQuantError
from rotquant.measure import compare, compare_run, evaluate
from rotquant.measure.compare import Results, read_variants
from rotquant.measure.compare_table import Comparison
from rotquant.measure.online_cost import multiply_adds, online_cost
from source_models import HELDOUT, source_model

LN2 = math.log(2)

# ---- distance from full precision -------------------------------------------------------------------


def test_token_sums_by_hand() -> None:
    full = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log() + 3.0  # a shift of the logits changes nothing
    other = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]]).log()
    sums = compare_run.token_sums(full, other, torch.tensor([0, 2]))
    nll, full_nll = 2 * LN2 - math.log(0.7), LN2 - math.log(0.7)
    kl = 0.5 * LN2 - 0.25 * LN2  # only the first row differs, and only there the first choice
    assert sums.tolist() == pytest.approx([nll, full_nll, kl, 1.0], abs=1e-6)


@torch.no_grad()
def test_measure_equals_one_token_after_the_other(tmp_path: Path) -> None:
    spec = tiny(kv=True, kv_symmetric=False, act_clip=0.9, kv_clip=0.9)
    full, other = random_model(spec), rotquant.load(write_checkpoint(tmp_path / "out", spec))
    batch = torch.randint(3, VOCAB, (5, 17), generator=torch.Generator().manual_seed(0))
    windows = []
    result = compare_run.measure(full, other, batch, lambda: windows.append(1))
    wanted = torch.zeros(4, dtype=torch.float64)
    for row in batch:
        p, q = (model(row[None]).logits[0, :-1].double().softmax(-1) for model in (full, other))
        for position, token in enumerate(row[1:]):
            kl = (p[position] * (p[position] / q[position]).log()).sum()
            same = p[position].argmax() == q[position].argmax()
            wanted += torch.stack([-q[position, token].log(), -p[position, token].log(), kl, same.double()])
    found = torch.tensor([result.nll, result.full_nll, result.kl, result.agreement], dtype=torch.float64)
    torch.testing.assert_close(found, wanted / 80, rtol=1e-4, atol=1e-6)
    assert (result.tokens, len(windows)) == (80, 5)
    assert result.kl > 0.01  # 4 bits cost this model something, so the numbers above are not all 0 and 1
    assert result.agreement < 1
    same = compare_run.measure(full, full, batch)
    assert (same.kl, same.agreement) == (0, 1)


@torch.no_grad()
def test_greedy_tokens_are_those_that_each_model_gives_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny(kv=True, kv_symmetric=False, act_clip=0.9, kv_clip=0.9)
    full, other = random_model(spec), rotquant.load(write_checkpoint(tmp_path / "out", spec))
    monkeypatch.setattr(compare_run, "PROMPTS", 12)
    monkeypatch.setattr(compare_run, "PROMPT_TOKENS", 6)
    batch = torch.randint(3, VOCAB, (5, 17), generator=torch.Generator().manual_seed(0))

    def answer(model: Any, prompt: torch.Tensor) -> list[int]:
        ids = prompt[None]
        for _ in range(compare_run.CONTINUED):
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
        return ids[0, len(prompt) :].tolist()

    same = []
    for prompt in batch[:, :15].reshape(15, 5)[:12]:  # three of each window, which has no more
        pairs = list(zip(answer(full, prompt), answer(other, prompt), strict=True))
        same.append(next((i for i, (one, two) in enumerate(pairs) if one != two), len(pairs)))
    assert len(set(same)) > 2
    assert compare_run.greedy_tokens(full, other, batch) == pytest.approx(sum(same) / 12)
    assert compare_run.greedy_tokens(full, full, batch) == compare_run.CONTINUED


def test_logits_that_are_not_finite_are_an_error() -> None:
    broken = random_model(tiny())
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(RotQuantError, match="not finite"):
        compare_run.measure(random_model(tiny()), broken, torch.ones(1, 4, dtype=torch.long))


# ---- online cost ------------------------------------------------------------------------------------


def test_multiply_adds_by_hand() -> None:
    for stage, wanted in {
        ("permutation", 0, 64): 0, ("hadamard", 16, 64): 64 * 4, ("hadamard", 1, 64): 0,
        ("dense", 16, 64): 64 * 16, ("kronecker", 16, 64): 4 * 4 * 16 + 4 * 16 * 16, ("reflection", 64, 64): 128,
        ("shift", 0, 64): 64,
    }.items():  # fmt: skip
        assert multiply_adds([stage]) == wanted
    assert multiply_adds([("permutation", 0, 8), ("hadamard", 8, 8), ("shift", 0, 8)]) == 8 * 3 + 8


def test_cost_of_a_checkpoint(tmp_path: Path) -> None:
    """Two layers, hidden 64, 4 heads and 2 KV heads of 16."""
    gemm = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * INTERMEDIATE)
    plain = online_cost(write_checkpoint(tmp_path / "plain", tiny(kv=True, int8_head=True)))
    assert (plain.online, plain.gemm) == (0, gemm)
    folder = write_checkpoint(tmp_path / "rotated", tiny(kv=True, r3=True, r4="hadamard"))
    r3, r4 = (4 + 2) * 16 * 4, INTERMEDIATE * int(math.log2(BLOCK))
    assert online_cost(folder).online == 2 * (r3 + r4)
    # q, k and v are one linear when served, so their common input is transformed once.
    place = [{"targets": ["re:.*(q|k|v|down)_proj$"], "location": "input"}]
    edit_config(folder, "quantization_config", "transform_config", "config_groups", "R4", "apply", value=place)
    assert online_cost(folder).online == 2 * (r3 + r4 + 64 * int(math.log2(BLOCK)))


# ---- what is run ------------------------------------------------------------------------------------


def test_variants(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("{name: m, description: d}")
    spec = f"rtn,no R4@quarot:rotations.r4=none,kv.bits=16,{mine},quarot:weights.bits=8"
    found = read_variants(spec, ["weights.bits=4", "kv.symmetric=true"])
    assert [v.label for v in found] == ["rtn", "no R4", "mine", "quarot:weights.bits=8"]
    assert [v.recipe for v in found] == ["rtn", "quarot", str(mine), "quarot"]
    assert found[1].loaded.rotations.r4 == "none"
    assert found[1].loaded.kv.bits == 16
    assert [v.loaded.weights.bits for v in found] == [4, 4, 4, 8]  # a recipe's own setting wins
    assert all(v.loaded.kv.symmetric for v in found)
    assert {v.label for v in read_variants("all", [])} >= {"rtn", "quarot"}
    for bad, message in [
        ("rtn,fly", "unknown recipe 'fly'"), ("rtn:weights.colour=1", "colour"), ("rtn,rtn", "rtn is there twice"),
        ("a b@rtn,a-b@rtn", "a-b is there twice"),
    ]:  # fmt: skip
        with pytest.raises(RotQuantError, match=message):
            read_variants(bad, [])


def fake(calls: list[str], broken: str = "") -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Instead of a process: numbers made of the seed; the job whose label is `broken` fails."""

    def run_alone(job: dict[str, Any]) -> dict[str, Any]:
        calls.append(job["label"])
        if job["label"] == broken:
            return {"error": "out of luck"}
        nll = (1.0 if job["label"].startswith("quarot") else 3.0) + 0.1 * job["quantize"]["seed"]
        return {
            "nll": nll, "full_nll": 0.9, "kl": nll / 10, "agreement": 0.5, "tokens": 30, "perplexity": math.exp(nll),
            "full_perplexity": math.exp(0.9), "quantize_seconds": 61.0, "quantize_peak_gb": 0.5,
            "online_multiply_adds": 0, "online_share": 0.0, "greedy_tokens": 20.25, "checkpoint_bytes": 3_400_000,
        }  # fmt: skip

    return run_alone


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return source_model(tmp_path / "model", "llama")


def test_goes_on_where_it_stopped(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    text = tmp_path / "text.txt"
    text.write_text(HELDOUT.read_text()[:2000])
    working = fake(calls, broken="quarot-0")

    def interrupted(job: dict[str, Any]) -> dict[str, Any]:
        if len(calls) == 3:
            raise KeyboardInterrupt
        return working(job)

    def again(recipes: str = "rtn,quarot", **settings: Any) -> Comparison:
        calls.clear()
        settings = {"seeds": 2, "tokens": 64, "seq_len": 32, "samples": 2, "calibration_seq_len": 32} | settings
        return compare.compare(str(model), recipes, text=text, results=tmp_path / "runs.json", **settings)

    monkeypatch.setattr(compare, "run_alone", interrupted)
    with pytest.raises(KeyboardInterrupt):
        again()
    assert calls == ["rtn-0", "rtn-1", "quarot-0"]
    monkeypatch.setattr(compare, "run_alone", working)
    first = again()
    assert calls == ["quarot-0", "quarot-1"]  # the failed one again, and the one that was left
    assert [run["seed"] for run in first.failed] == [0]
    monkeypatch.setattr(compare, "run_alone", fake(calls))
    done = again()
    assert calls == ["quarot-0"]
    assert not done.failed
    assert again().runs == done.runs
    assert calls == []
    assert again("other name@rtn").runs[0]["label"] == "other name"  # a label decides nothing
    assert calls == []
    again(samples=3)
    assert calls == ["quarot-0", "quarot-1"]  # rtn has no calibration
    for more in ({"tokens": 96}, {"profile": "portable"}, {"settings": ["weights.bits=8"]}):
        again(**more)
        assert calls == ["rtn-0", "rtn-1", "quarot-0", "quarot-1"]
    edit_config(model, "rms_norm_eps", value=1e-4)
    again("rtn")
    assert calls == ["rtn-0", "rtn-1"]


def test_results_never_overwrite_another_file(tmp_path: Path) -> None:
    file = tmp_path / "package.json"
    file.write_text('{"name": "mine"}')
    with pytest.raises(RotQuantError, match=r"package\.json: not the results"):
        Results(file)
    assert json.loads(file.read_text()) == {"name": "mine"}


# ---- processes --------------------------------------------------------------------------------------


def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A shell script instead of Python; its arguments: -m rotquant.measure.compare_run JOB RESULT."""
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(compare.sys, "executable", str(program))


def test_a_process_that_dies_is_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path, monkeypatch, "kill -9 $$")
    assert compare.run_alone({}) == {"error": "the process ended with signal 9, perhaps for lack of memory"}
    stub(tmp_path, monkeypatch, "exit 3")
    assert compare.run_alone({}) == {"error": "the process ended with exit code 3"}


@pytest.mark.parametrize("stubborn", [False, True])
def test_an_interrupted_run_may_tidy_up(stubborn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "STOP_SECONDS", 1 if stubborn else 60)
    answer = "" if stubborn else f"echo tidy > {tmp_path}/end; exit 130"
    # The program, once this process waits for it, interrupts its parent, as Ctrl-C would.
    stub(tmp_path, monkeypatch, f"trap '{answer}' INT; sleep 0.5; kill -INT $PPID; while :; do sleep 0.1; done")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            compare.run_alone({})
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "end").exists() is not stubborn


def test_time_of_interrupted_attempts_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(compare_run.time, "monotonic", lambda: now[0])
    out, partial = tmp_path / "out", tmp_path / "out.partial"

    def attempt(seconds: float, error: type[BaseException] | None = None) -> float | None:
        with compare_run.stopwatch(out) as spent:
            now[0] += seconds
            if error:
                raise error
        return spent.get("seconds")

    partial.mkdir()
    assert attempt(5) is None  # begun by somebody who noted no time
    partial.rmdir()
    with pytest.raises(KeyboardInterrupt):
        attempt(5, KeyboardInterrupt)
    partial.mkdir()
    assert attempt(7) == 12
    partial.rename(out)
    assert attempt(3) == 12  # finished before
    with compare_run.stopwatch(out) as spent:
        assert 0.05 < spent["peak_gb"] < 100
    (tmp_path / "out.time.json").unlink()
    assert attempt(3) is None


def test_real_runs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two recipes, two seeds, as a user runs them."""
    out = tmp_path / "runs"
    command = ["compare", str(model), "--tokens", "512", "--seq-len", "128", "--samples", "4", "-o", str(out)]
    command += ["--calibration-seq-len", "64", "--markdown", "--recipes"]
    assert cli.main([*command, "rtn,quarot", "--seeds", "2"]) == 0
    runs = {f"{r['label']}-{r['seed']}": r for r in json.loads((out / "results.json").read_text())["runs"]}
    assert runs.keys() == {"rtn-0", "rtn-1", "quarot-0", "quarot-1"}
    score = evaluate.evaluate(str(out / "quarot-1"), HELDOUT, tokens=512, seq_len=128)
    assert runs["quarot-1"]["perplexity"] == pytest.approx(score.perplexity, rel=1e-5)
    for name, run in runs.items():
        assert run["tokens"] == score.tokens == 4 * 127
        assert run["kl"] > 0
        assert 0 < run["agreement"] < 1
        assert run["quantize_seconds"] > 0
        assert run["quantize_peak_gb"] > 0.1
        assert 0 <= run["greedy_tokens"] < compare_run.CONTINUED
        assert run["checkpoint_bytes"] == sum(f.stat().st_size for f in (out / name).glob("model-*"))
    full = evaluate.evaluate(str(model), HELDOUT, tokens=512, seq_len=128).perplexity
    assert runs["rtn-0"]["full_perplexity"] == pytest.approx(full, rel=1e-5)
    assert runs["rtn-0"]["nll"] == runs["rtn-1"]["nll"]  # nothing random in it
    assert runs["quarot-0"]["nll"] != runs["quarot-1"]["nll"]
    assert runs["rtn-0"]["online_multiply_adds"] == 0 < runs["quarot-0"]["online_multiply_adds"]
    assert capsys.readouterr().out.startswith("| recipe | perplexity |")
    # Another recipe under a name that is there: its checkpoint is made anew, the earlier numbers stay.
    before = (out / "rtn-1" / "config.json").stat().st_mtime_ns
    assert cli.main([*command, "rtn", "--seeds", "1", "--set", "weights.bits=8"]) == 0
    scheme = json.loads((out / "rtn-0" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {group["weights"]["num_bits"] for group in scheme.values()} == {8}
    assert (out / "rtn-1" / "config.json").stat().st_mtime_ns == before
    assert len(json.loads((out / "results.json").read_text())["runs"]) == 5


def test_a_recipe_that_fails_leaves_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside one that works; the process's own main runs here, which saves starting it."""

    def in_this_process(job: dict[str, Any]) -> dict[str, Any]:
        files = tmp_path / "job.json", tmp_path / "result.json"
        files[0].write_text(json.dumps(job))
        assert compare_run.main(*map(str, files)) == (1 if job["label"].startswith("broken") else 0)
        return json.loads(files[1].read_text())

    monkeypatch.setattr(compare, "run_alone", in_this_process)
    recipes = "broken@rtn:weights.group_size=64,rtn"
    comparison = compare.compare(str(model), recipes, tokens=64, seq_len=32, seeds=1, output=tmp_path / "runs")
    assert [run["label"] for run in comparison.runs if "error" not in run] == ["rtn"]
    (line,) = comparison.failures()
    assert line.startswith("broken, seed 0: failed: config.json: the 96 inputs of model.layers.0.")
    assert not (tmp_path / "runs" / "broken-0").exists()


# ---- what is shown ----------------------------------------------------------------------------------


def made(label: str, seed: int, **changes: Any) -> dict[str, Any]:
    numbers = fake([])({"label": label, "quantize": {"seed": seed}})
    return {"label": label, "recipe": label, "seed": seed} | numbers | changes


def test_table_is_sorted_and_shows_the_spread() -> None:
    runs = [made("rtn", seed, quantize_seconds=None) for seed in range(3)]
    runs += [made("quarot", seed, online_multiply_adds=1200, online_share=0.0123) for seed in (0, 2)]
    runs += [{"label": "bad|one", "recipe": "rtn", "seed": 1, "error": "no [luck]"}]
    comparison = Comparison(runs)
    full, quarot, rtn = comparison.rows()
    assert full[:3] == ("full precision", "2.46", "0")
    assert quarot[0] == "quarot"
    assert quarot[1] == "3.019 (2.718 to 3.32)"
    assert quarot[3:] == ("50.0%", "20.2", "1:01", "0.50 GB", "3 MB", "1,200 (1.23% of GEMM)")
    assert rtn[1:3] == ("22.2 (20.09 to 24.53)", "0.31 (0.3 to 0.32)")
    assert (rtn[5], rtn[8]) == ("?", "0")
    terminal = Console(width=80, file=io.StringIO())
    terminal.print(comparison.table())
    assert "…" not in terminal.file.getvalue()
    assert "2.718 to 3.32" in terminal.file.getvalue()
    lines = comparison.markdown().splitlines()
    assert all(line.count("|") == 10 for line in lines[:5])
    assert lines[-2:] == ["30 tokens; median (lowest to highest) of 3 seeds  ", "bad|one, seed 1: failed: no [luck]  "]
    assert Comparison(runs[-1:]).rows() == []


def test_command_passes_everything_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {}
    answer = [Comparison([made("quarot", 0)])]

    def stand_in(model: str, recipes: str, **settings: Any) -> Comparison:
        given.update(settings, model=model, recipes=recipes)
        return answer[0]

    monkeypatch.setattr(compare, "compare", stand_in)
    options = "--text t.txt --tokens 5 --seq-len 4 --samples 3 --calibration c.txt --calibration-seq-len 9 --seeds 2"
    more = "--set kv.bits=16 --set weights.bits=8 -o out --json runs.json --profile portable"
    command = ["compare", "m", "--recipes", "rtn,quarot"]
    assert cli.main([*command, *options.split(), *more.split()]) == 0
    assert given == {
        "model": "m", "recipes": "rtn,quarot", "text": Path("t.txt"), "tokens": 5, "seq_len": 4, "samples": 3,
        "calibration": "c.txt", "calibration_seq_len": 9, "seeds": 2, "settings": ["kv.bits=16", "weights.bits=8"],
        "output": Path("out"), "results": Path("runs.json"), "profile": "portable",
    }  # fmt: skip
    assert "2.718" in capsys.readouterr().out
    answer[0] = Comparison([made("quarot", 0), {"label": "rtn", "recipe": "rtn", "seed": 0, "error": "no [luck]"}])
    assert cli.main(command) == 1
    assert "no [luck]" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    assert "examples:\n  rotquant compare" in capsys.readouterr().out


def test_bad_input_is_named(model: Path, tmp_path: Path) -> None:
    for settings, message in [
        ({"seq_len": 512}, "--seq-len 512"), ({"text": tmp_path / "none.txt"}, "no such file"),
        ({"calibration": "none.txt"}, "no such calibration file"),
    ]:  # fmt: skip
        with pytest.raises(RotQuantError, match=message):
            compare.compare(str(model), "quarot", output=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
