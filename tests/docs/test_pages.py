"""README, docs and the files around them: numbers are those of the results, links lead somewhere, commands parse."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import write_docs
from rotquant import cli
from rotquant.checkpoint.extension import Extension
from rotquant.models.registry import BY_CLASS
from rotquant.pipeline import quantize
from rotquant.recipe import Recipe
from rotquant_kernels import native
from rotquant_kernels.stages import KINDS
from source_models import source_model
from vllm_rotquant.settings import CHOICES
from vllm_rotquant.versions import SUPPORTED_VLLM

ROOT = Path(__file__).parents[2]
AROUND = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "examples/README.md",
    "benchmarks/results/README.md",
)
PAGES = [*(ROOT / name for name in AROUND), *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.name if page.parent.name != "results" else "results"
)


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", text))


# ---- numbers -----------------------------------------------------------------------------------------------------


def test_pages_say_what_the_results_say() -> None:
    stale = [str(file.relative_to(ROOT)) for file, text in write_docs.wanted() if file.read_text() != text]
    assert not stale, f"run python tools/write_docs.py: {', '.join(stale)}"


def test_every_block_stands_on_a_page() -> None:
    found = {name for page in write_docs.pages() for _, name, _ in write_docs.BLOCK.findall(page.read_text())}
    assert found == write_docs.BLOCKS.keys()


def test_another_result_makes_a_page_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(write_docs.BLOCKS, "headline", lambda: "A token takes 1 ms.")
    stale = [file for file, text in write_docs.wanted() if file.read_text() != text]
    assert stale == [ROOT / "README.md"]


def test_readme_is_short_and_measured_numbers_stand_in_blocks_only() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    by_hand = prose(write_docs.BLOCK.sub("", text))
    measured = r"\d[\d.,]*\s*(?:ms\b|s\b|tokens/s|nats|%|x\b|times\b|MB\b|GB\b)"
    assert re.findall(measured, by_hand) == []


def test_versions_and_models_are_those_of_the_code() -> None:
    (low, high), models = SUPPORTED_VLLM, (ROOT / "docs/models.md").read_text()
    said = f"{low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
    assert f"vLLM {said}" in (ROOT / "README.md").read_text()
    assert f"| vLLM | {said};" in models
    assert {name for name in BY_CLASS if f"`{name}`" not in models} == set()


def test_tiers_and_settings_are_those_of_the_code() -> None:
    kernels, serving = ((ROOT / "docs" / name).read_text() for name in ("kernels.md", "serving.md"))
    assert [tier for tier in native.TIERS if tier != "auto" and f"| `{tier}` |" not in kernels] == []
    for name, choices in CHOICES.items():
        row = next(line for line in serving.splitlines() if line.startswith(f"| `{name}` |"))
        assert [c for c in choices if isinstance(c, str) and c != "auto" and c not in row] == []


# ---- links, code -------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that a code host and mkdocs give to headings."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@page
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if page.parent == ROOT / "docs":
            assert target.is_relative_to(ROOT / "docs"), f"{link}: a site of docs/ alone would not have it"
        assert not anchor or anchor in anchors(target), link


def commands(text: str) -> Iterator[tuple[bool, list[str]]]:
    """Lines that call our own programs, and whether they are whole: in code blocks they are, in a sentence they may
    leave out what is required."""
    text = write_docs.BLOCK.sub("", text)
    blocks = "\n".join(body for language, body in FENCE.findall(text) if language in ("", "bash", "sh"))
    around = FENCE.sub("", text)
    indented = re.findall(r"^ {4}((?:rotquant|python) .+)$", around, re.MULTILINE)
    spans = re.findall(r"`((?:rotquant|python) [^`…\n]+)`", around)
    whole = [*blocks.replace("\\\n", " ").splitlines(), *indented]
    for in_block, line in [*((True, line) for line in whole), *((False, span) for span in spans)]:
        if called := re.match(r"(?:\w+=\S* )*((?:rotquant|python) [^>]+)", line):
            yield in_block, shlex.split(called[1], comments=True)


@page
def test_commands_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for whole, (program, first, *rest) in commands(page.read_text()):
        if program == "python" and first != "run.py":
            assert "NAME" in first or not first.endswith(".py") or (ROOT / first).exists(), first
            continue
        arguments = [first, *rest] if program == "rotquant" else rest
        if arguments[0] == "test" or arguments[-1] in ("--help", "--version"):
            continue
        try:
            cli.parser().parse_args(arguments)
        except SystemExit:
            said = capsys.readouterr().err
            abbreviated = not whole and "the following arguments are required" in said
            assert abbreviated, f"{shlex.join(arguments)}: {said}"


@page
def test_other_code_is_code(page: Path) -> None:
    for language, body in FENCE.findall(page.read_text()):
        if language == "python":
            compile(body, page.name, "exec")
        elif language == "yaml":
            assert Recipe.model_validate(yaml.safe_load(body))


# ---- the checkpoint's format -------------------------------------------------------------------------------------

EVERYTHING = (
    "rotations.r1=hadamard", "rotations.r2=hadamard", "rotations.r3=hadamard", "rotations.r4=hadamard",
    "scales.up=smooth", "online.attn=[shift]", "online.mlp=[kronecker]", "online.o=[greedy]", "online.block=16",
    "weights.rank=4", "weights.group_size=16", "lm_head.bits=8",
)  # fmt: skip


def keys(value: Any) -> set[str]:
    """All keys of config.json's objects but those that are names of modules or groups."""
    if isinstance(value, list):
        return set().union(*map(keys, value))
    if not isinstance(value, dict):
        return set()
    named = {key for key in value if "." not in key and not re.fullmatch(r"group_\d+", key)}
    return named.union(*(keys(one) for one in value.values()))


def test_every_key_and_tensor_of_a_fresh_checkpoint_is_on_its_page(tmp_path: Path) -> None:
    text = (ROOT / "docs/checkpoint-format.md").read_text()
    spans = set(re.findall(r"`([^`\n]+)`", text))
    words = {word for span in spans for word in re.findall(r"\w+", span)}
    model = source_model(tmp_path / "model", "qwen2")
    out = quantize(str(model), tmp_path / "out", recipe="rtn", settings=EVERYTHING, samples=2, seq_len=64)
    config = json.loads((out / "config.json").read_text())
    ours = config["rotquant"]
    known = keys(config["quantization_config"]) | keys({k: v for k, v in ours.items() if k != "provenance"})
    known |= ours["provenance"].keys() | ours["provenance"]["calibration"].keys() | Extension.model_fields.keys()
    assert known - words == set()
    assert KINDS.keys() <= spans
    tensors = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    leaves = {re.sub(r"^\w+?\d+_", "<name>_", name.split(".", 5)[-1]) if "_input" in name or "_output" in name
              else name.rpartition(".")[2] for name in tensors}  # fmt: skip
    assert {leaf for leaf in leaves if leaf.rpartition(".")[0].strip("<>") and leaf not in text} == set()
    assert {leaf for leaf in leaves if "." not in leaf and leaf != "weight" and leaf not in words} == set()
    assert {file.name for file in out.iterdir() if file.suffix != ".safetensors"} <= {
        "README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "model.safetensors.index.json", "chat_template.jinja",
    }  # fmt: skip


# ---- the project -------------------------------------------------------------------------------------------------


def test_every_package_is_typed() -> None:
    for package in ("offline/rotquant", "vllm_rotquant", "kernels/rotquant_kernels"):
        assert (ROOT / package / "py.typed").exists()


def test_the_workflow_runs_what_the_gate_runs() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert any(step.get("run") == "bash .ci/run" for job in jobs for step in job["steps"])
    assert "run.py test" in (ROOT / ".ci/run").read_text()


def test_the_site_has_every_page() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert site["docs_dir"] == "docs"
    listed = [name for entry in site["nav"] for name in entry.values()]
    assert sorted(listed) == sorted(page.name for page in PAGES if page.parent == ROOT / "docs")
