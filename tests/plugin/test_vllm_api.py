"""The plugin against every vLLM that it says it runs in: by recorded facts, and against the one installed here."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from rotquant.service.doctor import CUDA_ONLY
from vllm_api import RECORDS, Facts, extract, recorded
from vllm_rotquant import SUPPORTED_VLLM, vllm_requirement
from vllm_uses import ATTRIBUTES, FORWARD, FORWARD_MAY, complaints, plugin, wanted

VERSIONS = sorted(path.stem for path in RECORDS.glob("*.json"))
ROOT = Path(__file__).resolve().parents[2]


def test_all_supported_versions_are_recorded() -> None:
    (major, first), (_, end) = SUPPORTED_VLLM
    assert {tuple(map(int, v.split(".")[:2])) for v in VERSIONS} == {(major, minor) for minor in range(first, end)}


@pytest.mark.parametrize("recorded_version", VERSIONS)
def test_the_plugin_fits(recorded_version: str) -> None:
    assert complaints(recorded(recorded_version)) == []


def test_the_plugin_fits_the_installed_vllm() -> None:
    """The facts are those of the sources; a private build differs from the release of its number."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    facts = extract(Path(spec.origin).parents[1], wanted())
    assert complaints(facts) == []
    number = re.match(r"\d+\.\d+\.\d+", version("vllm"))
    if number and number[0] in VERSIONS:
        assert facts == recorded(number[0])


# What compat reads of Python's and transformers' objects, what it adds to vLLM's, and `backend` of a config that only
# newer versions have.
NOT_VLLM_S = {
    "tolist",
    *("__init__", "__module__", "__name__", "__qualname__", "get", "is_dir", "items", "modules", "values", "backend"),
    *("_schema", "arguments", "default", "device", "name", "shape"),  # of torch's ops and tensors
    *("fill_", "is_floating_point"),
    *("from_dict", "get_config_dict", "to_dict", "rotquant_read", "turn_prompt_embeds"),
}


def test_the_table_has_every_attribute_that_compat_reads() -> None:
    of_vllm = {name for names in ATTRIBUTES.values() for name in names.split()}
    of_vllm |= {name for names in (*FORWARD.values(), *FORWARD_MAY.values()) for name in names}
    tree = plugin()["compat"]
    reads = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and not ast.unparse(node).startswith(("torch.", "functools.", "Path("))
    }
    assert reads - of_vllm <= NOT_VLLM_S


def without_attribute(facts: Facts, place: str, name: str) -> None:
    for kind in ("methods", "fields", "attributes"):
        if name in (found := facts.classes[place][kind]):
            found.remove(name) if isinstance(found, list) else found.pop(name)


def method_of(facts: Facts, place: str) -> dict[str, str]:
    methods: dict[str, str] = facts.classes[place]["methods"]
    return methods


BACKEND, LLAMA = "vllm.v1.attention.backend", "vllm.model_executor.models.llama"
BROKEN: dict[str, tuple[Callable[[Facts], Any], str]] = {
    "a name that is gone": (
        lambda f: (f.places.pop(f"{BACKEND}:MultipleOf"), f.absent.append(f"{BACKEND}:MultipleOf")),
        "MultipleOf does not exist",
    ),
    "a name that was never recorded": (lambda f: f.places.pop(f"{BACKEND}:MultipleOf"), "record_vllm_api.py"),
    "a hook of another name": (
        lambda f: method_of(f, f"{BACKEND}:AttentionBackend").pop("customize_spec"),
        "KV4Backend.customize_spec: .* has no such method",
    ),
    "a hook with another parameter": (
        lambda f: method_of(f, f"{BACKEND}:AttentionImpl").update(forward="(self, layer, q, k, v)"),
        "KV4Impl.forward takes",
    ),
    "an abstract method more": (
        lambda f: method_of(f, f"{BACKEND}:AttentionBackend").update(get_pages="static abstract ()"),
        "KV4Backend does not implement .*get_pages",
    ),
    "a constructor with another parameter": (
        lambda f: method_of(f, "vllm.model_executor.parameter:PackedvLLMParameter").update(
            __init__="(self, packed_factor, packed_dim, layout, **kwargs)"
        ),
        "the plugin calls `compat.PackedvLLMParameter",
    ),
    "a field that is gone": (
        lambda f: without_attribute(f, "vllm.v1.kv_cache_interface:AttentionSpec", "state_content_bytes"),
        "AttentionSpec has no state_content_bytes",
    ),
    "a layer that reads the hidden states as well": (
        lambda f: f.classes[f"{LLAMA}:LlamaDecoderLayer"]["forward_reads"].append("router"),
        "LlamaDecoderLayer: forward reads .*router",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_vllm_that_does_not_fit_is_seen(name: str) -> None:
    facts = recorded(VERSIONS[-1])
    change, message = BROKEN[name]
    change(facts)
    found = complaints(facts)
    assert any(re.search(message, line) for line in found), found


def test_the_set_up_and_the_doctor_name_the_range_of_the_plugin() -> None:
    found = runpy.run_path(str(ROOT / "run.py"), run_name="run")
    assert found["gpu_vllm"]() == vllm_requirement()
    requirement = Requirement(vllm_requirement())
    assert all(recorded_version in requirement.specifier for recorded_version in VERSIONS)
    assert found["CPU_VLLM"] in VERSIONS
    assert found["CUDA_ONLY"] == set(CUDA_ONLY)
