"""`rotquant inspect`: the rows it looks at, what rotations do to the hard demo model, JSON, the report, the verb."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import rotquant
from rotquant import cli
from rotquant.common import metrics
from rotquant.learn.quantizers import fake_quantize
from rotquant.measure.evaluate import text_windows
from rotquant.measure.inspection import TEXT, Inspection, inspect
from rotquant.measure.inspection.findings import findings
from rotquant.measure.inspection.html import spread
from rotquant.measure.inspection.statistics import SiteFormat, SiteStatistics
from rotquant.measure.inspection.table import NARROWEST, change, quantizers
from rotquant_kernels.formats import KVFormat, RowFormat
from source_models import KINDS, Demo, source_model

Capture = pytest.CaptureFixture[str]
SMALL: dict[str, Any] = {"tokens": 192, "seq_len": 64}
LINEAR_INPUTS = ("attn_in", "o_in", "mlp_in", "down_in")


@pytest.fixture(scope="module")
def rotated(demo: Demo) -> Inspection:
    return inspect(
        str(demo.quarot), against=str(demo.hard), tokens=1024, seq_len=128
    )  # more tokens than down_proj has inputs


def figures(facts: dict[str, Any], layer: int, site: str, when: str = "after") -> dict[str, Any]:
    (found,) = [s for s in facts["sites"] if (s["layer"], s["site"]) == (layer, site)]
    return found[when]


def mean(facts: dict[str, Any], site: str, figure: str, when: str) -> float:
    return fmean(s[when][figure] for s in facts["sites"] if s["site"] == site)


# ---- the rows are the right ones --------------------------------------------------------------------


@torch.no_grad()
def witness(model: Any, tokens: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """transformers' own record: hidden states entering each layer [n, T, hidden], K and V of the cache [n, G, T, d]."""
    out = model(tokens, output_hidden_states=True, use_cache=True)
    return list(out.hidden_states), [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def heads_snr(rows: Tensor, clip: float) -> list[float]:
    """SNR of each head of [n, G, T, d], asymmetric 4 bits."""
    error = metrics.relative_error(rows, KVFormat(False, clip, clip, 0).key.fake_quantize(rows)).mean((0, 2))
    return [metrics.snr_db(e) for e in error.tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_sites_of_a_full_precision_model(kind: str, tmp_path: Path) -> None:
    folder = source_model(tmp_path / "model", kind)
    facts = inspect(str(folder), **SMALL).as_dict()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    hidden, cache = witness(model, text_windows(TEXT, folder, 64, 192))
    for layer in (0, 1):
        decoder = model.model.layers[layer]
        assert figures(facts, layer, "h")["massive"]["largest"] == pytest.approx(hidden[layer].abs().max().item(), 1e-4)
        entering = decoder.input_layernorm(hidden[layer]).detach()
        found = figures(facts, layer, "attn_in")
        assert found["peak_to_rms"] == pytest.approx(metrics.peak_to_rms(entering).mean().item(), rel=1e-4)
        quantized = fake_quantize(entering, RowFormat())
        assert found["snr"] == pytest.approx(
            metrics.snr_db(metrics.relative_error(entering, quantized).mean()), abs=0.02
        )
        for site, rows in zip("kv", cache[layer], strict=True):
            assert figures(facts, layer, site)["heads"] == pytest.approx(heads_snr(rows, 0.95), abs=0.05)
    assert [figures(facts, 0, site)["snr"] is None for site in ("h", *LINEAR_INPUTS, "k", "v")] == [True] + [False] * 6
    assert facts["against"] is None
    assert all(site["before"] is None for site in facts["sites"])


def test_sites_of_a_checkpoint_are_after_its_online_transforms(demo: Demo) -> None:
    """K after R3, down_in after R4, both written out as matrices."""
    facts = inspect(str(demo.quarot), **SMALL).as_dict()
    model = rotquant.load(demo.quarot)
    inputs: list[Tensor] = []
    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    _, cache = witness(model, text_windows(TEXT, demo.quarot, 64, 192))

    def hadamard(size: int) -> Tensor:
        h = torch.ones(1, 1)
        while len(h) < size:
            h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1))) / 2**0.5
        return h

    rows = (inputs[0].float().unflatten(-1, (-1, 256)) @ hadamard(256)).flatten(-2)
    expected = metrics.peak_to_rms(rows).mean().item()
    assert figures(facts, 2, "down_in")["peak_to_rms"] == pytest.approx(expected, rel=1e-3)
    assert metrics.peak_to_rms(inputs[0].float()).mean().item() > 2 * expected
    key, value = (t.float() for t in cache[2])
    assert figures(facts, 2, "k")["heads"] == pytest.approx(heads_snr(key @ hadamard(64), 0.95), abs=0.05)
    assert figures(facts, 2, "v")["heads"] == pytest.approx(heads_snr(value, 0.95), abs=0.05)
    formats = {s["site"]: s["format"] for s in facts["sites"]}
    assert formats["k"] == {"bits": 4, "symmetric": False, "clip": 0.95, "rotate": 64}
    assert formats["down_in"]["clip"] == 0.9


def test_windows_add_up() -> None:
    """Statistics of three windows are those of all rows at once; NaN and the memory limits aside."""
    x = torch.randn(90, 2, 16, generator=torch.Generator().manual_seed(5))
    x[7] = 0
    x[40] *= 300
    tokens = torch.arange(90).view(3, 30)
    heads = SiteFormat(KVFormat(True, 1.0, 1.0, 0).key, heads=True)
    parts, whole = SiteStatistics(heads), SiteStatistics(heads)
    for window in x.split(30):
        parts.add(window)
    whole.add(x)
    found, expected = parts.summary(tokens), whole.summary(tokens)
    assert found.pop("massive") == expected.pop("massive")
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    massive = whole.summary(tokens)["massive"]
    assert (massive["count"], massive["positions"], massive["position"]) == (1, [[10, 1]], 10)
    assert massive["token"] == 40
    few = SiteStatistics(SiteFormat(RowFormat()))
    few.add(x[:10])
    assert few.summary(tokens[:1, :10])["qsur"] is None  # fewer rows than dimensions


def test_what_rows_have_in_common() -> None:
    """Rows c + r, r of as much energy as c and of mean 0: half of it is the mean's, whatever the sizes of the rows."""
    tokens, width = 4000, 64
    common = torch.randn(width)
    rows = common + common.norm() * width**-0.5 * torch.randn(tokens, width)
    found = SiteStatistics(SiteFormat())
    found.add((rows * torch.rand(tokens, 1)).unsqueeze(1))
    assert found.summary(torch.zeros(1, tokens, dtype=torch.long))["common"] == pytest.approx(0.5, abs=0.05)


# ---- what rotations do ------------------------------------------------------------------------------


@pytest.mark.parametrize("site", [*LINEAR_INPUTS, "k", "v"])
def test_rotation_makes_every_site_easier(site: str, rotated: Inspection) -> None:
    facts = rotated.as_dict()
    for figure in ("peak_to_rms", "gsr", "kurtosis", "difficulty"):
        assert mean(facts, site, figure, "after") < mean(facts, site, figure, "before")
    for figure in ("qsur", "snr"):
        assert mean(facts, site, figure, "after") > mean(facts, site, figure, "before")


def test_no_rotation_takes_what_tokens_have_in_common(rotated: Inspection) -> None:
    facts = rotated.as_dict()
    before, after = (mean(facts, "h", "common", when) for when in ("before", "after"))
    assert after == pytest.approx(before, rel=0.1)


def test_rotation_in_numbers(rotated: Inspection) -> None:
    facts = rotated.as_dict()
    assert mean(facts, "attn_in", "snr", "after") - mean(facts, "attn_in", "snr", "before") > 6
    before, after = (figures(facts, 1, "h", when)["massive"] for when in ("before", "after"))
    assert before["count"] == after["count"] == facts["windows"]  # BOS, the sink
    assert before["positions"] == after["positions"] == [[0, facts["windows"]]]
    assert facts["token_texts"][str(before["token"])] == "<s>"
    assert after["largest"] < before["largest"] / 5
    snr = {when: fmean(linear[when] for linear in facts["linears"]) for when in ("before", "after")}
    assert snr["before"] + 0.5 < snr["after"] < 25


def test_three_findings_lead(rotated: Inspection) -> None:
    first, second, third = rotated.facts["findings"]
    peaks = [
        f"{fmean(s[when]['peak_to_rms'] for s in rotated.facts['sites'] if s['site'] in LINEAR_INPUTS):.1f}"
        for when in ("before", "after")
    ]
    assert f"was {peaks[0]} times its RMS, and is now {peaks[1]}; rounding noise fell by a factor of" in first
    assert (
        f"K {mean(rotated.facts, 'k', 'snr', 'before'):.1f} → {mean(rotated.facts, 'k', 'snr', 'after'):.1f}" in second
    )
    worst = min((s for s in rotated.facts["sites"] if s["site"] != "h"), key=lambda s: s["after"]["snr"])
    assert f"of layer {worst['layer']}, {worst['after']['snr']:.1f} dB" in third
    text = Parts(rotated.html())
    assert str(rotated).startswith("1. Activations")
    assert [line for line in text.items if line[:2] in ("Ac", "KV", "We")] == [first, second, third]
    sites = [s | {when: s[when] | {"snr": None} for when in ("before", "after")} if s["site"] in "kv" else s
             for s in rotated.facts["sites"]]  # fmt: skip
    assert findings({"against": None, "sites": sites})[1] == "KV cache: not quantized."
    alone = findings({"against": None, "sites": [s | {"after": s["before"]} for s in rotated.facts["sites"]]})
    assert "hard to round to 4 bits" in alone[0]


def test_portable_has_no_kv_format_and_is_measured_all_the_same(demo: Demo) -> None:
    facts = inspect(str(demo.portable), against=str(demo.rtn), **SMALL).as_dict()
    assert {s["format"]["rotate"] for s in facts["sites"]} == {0}
    assert mean(facts, "mlp_in", "snr", "after") > mean(facts, "mlp_in", "snr", "before") + 5


# ---- what it prints ---------------------------------------------------------------------------------


def test_json_round_trip(rotated: Inspection) -> None:
    facts = rotated.as_dict()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_table(rotated: Inspection) -> None:
    text = str(rotated)
    assert all(len(line) <= NARROWEST for line in text.splitlines())
    snr = [f"{mean(rotated.facts, 'attn_in', 'snr', when):.1f}" for when in ("before", "after")]
    assert f"{snr[0]} → {snr[1]}" in text
    assert "position 0, '<s>'" in text
    good, bad = change(10.0, 20.0, higher_is_better=True), change(10.0, 20.0, higher_is_better=False)
    assert good.plain == bad.plain == "10.0 → 20.0"
    assert ["green" in str(good.spans), "red" in str(bad.spans)] == [True, True]


class Parts(HTMLParser):
    """Collects ids, attribute names and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.attributes: set[str] = set()
        self.scripts: list[str] = []
        self.items: list[str] = []
        self.tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tag = tag
        self.attributes |= {name for name, _ in attrs}
        self.ids |= {value for name, value in attrs if name == "id" and value}

    def handle_data(self, data: str) -> None:
        if self.tag == "script" and data.strip():
            self.scripts.append(data)
        if self.tag == "li":
            self.items.append(data)


def test_report_stands_alone(rotated: Inspection) -> None:
    text = rotated.html()
    parts = Parts(text)
    data, script = parts.scripts
    assert json.loads(data)["facts"] == rotated.facts
    assert not parts.attributes & {"src", "href", "srcset", "action"}
    assert not re.search(r"https?:|url\(|@import|import\(|fetch\(|XMLHttpRequest", text.replace(data, ""))
    asked = set(re.findall(r'\$\("([^"]+)"\)', script)) | set(re.findall(r'(?:choice|dumbbells)\("([^"]+)"', script))
    assert asked >= {"tiles", "landscapes", "curves", "snr", "weights", "massive-list", "table"}
    assert asked <= parts.ids
    assert "{{" not in text.replace(data, "").replace(script, "")


def test_report_holds_the_landscapes(rotated: Inspection) -> None:
    encoded = json.loads(Parts(rotated.html()).scripts[0])["landscapes"]
    assert encoded.keys() == {f"{when}/{layer}/{site}" for when, layer, site in rotated.landscapes}
    for key, landscape in rotated.landscapes.items():
        entry = encoded["/".join(map(str, key))]
        bytes_ = torch.frombuffer(bytearray(base64.b64decode(entry["data"])), dtype=torch.uint8)
        decoded = (bytes_.float() / 255).square().view(entry["rows"], entry["columns"]) * entry["peak"]
        assert (decoded - landscape).abs().max() < 0.01 * entry["peak"]
    assert encoded["before/2/attn_in"]["peak"] > 3 * encoded["after/2/attn_in"]["peak"]


def test_report_survives_hostile_names(rotated: Inspection) -> None:
    name = "</script><script>alert(1)</script>{{data}}"
    text = Inspection(rotated.facts | {"model": name}, {}).html()
    assert len(Parts(text).scripts) == 2
    assert json.loads(Parts(text).scripts[0])["facts"]["model"] == name


def test_deep_models_show_some_layers() -> None:
    assert spread(list(range(80)), 12) == [0, 7, 14, 22, 29, 36, 43, 50, 57, 65, 72, 79]


# ---- the verb ---------------------------------------------------------------------------------------


def test_verb(tmp_path: Path, capsys: Capture) -> None:
    folder = source_model(tmp_path / "model", "llama")
    report = tmp_path / "report.html"
    arguments = ["inspect", str(folder), "--tokens", "64", "--seq-len", "32", "--html", str(report)]
    assert cli.main([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    facts = json.loads(shown.out)
    assert (facts["tokens"], facts["windows"], len(facts["sites"])) == (64, 2, 14)
    assert str(report) in shown.err
    assert json.loads(Parts(report.read_text()).scripts[0])["facts"] == facts
    assert cli.main(arguments) == 0
    assert "Mean over layers" in capsys.readouterr().out


def other_model(tmp_path: Path, **config: Any) -> str:
    return str(source_model(tmp_path / "other", "llama", **config))


def test_bad_input(tmp_path: Path, capsys: Capture) -> None:
    model = source_model(tmp_path / "model", "llama")
    foreign = source_model(tmp_path / "foreign", "llama")
    for folder, field, value in (
        (foreign, "quantization_config", {"quant_method": "gptq", "bits": 4}),
        (tmp_path / "gpt2", "architectures", ["GPT2LMHeadModel"]),
    ):
        folder.mkdir(exist_ok=True)
        config = json.loads((model / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {field: value}))
    (tmp_path / "empty").mkdir()
    cases = {
        f"{tmp_path}/nowhere": "no such folder",
        f"{tmp_path}/empty": "config.json: no such file",
        f"{tmp_path}/foreign": "quantization_config: inspect reads full-precision models and rotquant checkpoints",
        f"{tmp_path}/gpt2": r"architectures is ['GPT2LMHeadModel'], supported are Llama",
        f"{model} --against {other_model(tmp_path, layers=3)}": "num_hidden_layers is 3, but 2",
        f"{model} --text {tmp_path}/no.txt": "no such file",
        f"{model} --seq-len 513": "--seq-len 513: must be from 2 to 512, as the model has 512 positions",
        f"{model} --html {tmp_path}": "--html",
        f"{model} --html {tmp_path}/nowhere/report.html": "in a folder that exists",
    }
    capsys.readouterr()
    for arguments, message in cases.items():
        assert cli.main(["inspect", *arguments.split()]) == 2, arguments
        shown = capsys.readouterr()
        assert shown.err.startswith("rotquant: error: ")
        assert message in shown.err
        assert shown.err.count("\n") == 1
        assert shown.out == ""


def test_clips_that_tuning_moved_apart_are_one_range() -> None:
    sites = [
        {"site": site, "format": {"bits": bits, "symmetric": site != "k", "clip": clip}}
        for site, bits, clip in (("h", 16, 1.0), ("k", 4, 0.95), ("o_in", 4, 0.89602339), ("o_in", 4, 0.90093691))
    ]
    said = quantizers({"sites": sites})
    assert said == "int4 asymmetric clip 0.95 (k); int4 symmetric clip 0.896 to 0.9009 (o_in)"
