"""The KV cache moves into pages of 2 MiB before its first step: nothing in it changes, and the log says what came."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from rotquant_kernels import native
from vllm_rotquant import compat, large_pages

pytestmark = pytest.mark.skipif(bool(native.load()), reason="no native kernels here")
PAGE = 2 << 20


@pytest.fixture
def said(monkeypatch):
    """(level, line) of what the log was told."""
    lines: list[tuple[str, str]] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(compat.logger, level, lambda text, *parts, level=level: lines.append((level, text % parts)))
    return lines


def test_a_shared_storage_is_asked_for_once_and_whole(said):
    owner = torch.randint(0, 256, (40 * PAGE + 999,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = owner.clone()
    large_pages.enlarge((owner[:PAGE], owner[PAGE:]))
    assert torch.equal(owner, before)
    first, last = owner.data_ptr() // PAGE, (owner.data_ptr() + owner.numel() - 1) // PAGE
    assert [f" {last - first + 1} " in line for _, line in said] == [True]


def test_a_refusal_is_a_warning(said):
    large_pages.report("it", 100, 49)
    large_pages.report("it", 100, 50)
    large_pages.report("it", large_pages.FEW - 1, 0)
    assert [level for level, _ in said] == ["warning", "info"]
    assert "49 of 100" in said[0][1]


def test_the_first_step_asks_for_the_caches_of_its_layers(monkeypatch):
    kv_cache = pytest.importorskip("vllm_rotquant.kv_cache")
    cache, found = torch.zeros(8), []
    monkeypatch.setattr(kv_cache, "enlarge", found.append)
    builder = object.__new__(kv_cache.KV4MetadataBuilder)
    builder.limits, builder.small = None, [SimpleNamespace(kv_cache=cache), SimpleNamespace(kv_cache=[cache])]
    step = SimpleNamespace(causal=True, query_start_loc=0, seq_lens=0, block_table_tensor=0, slot_mapping=0)
    builder.build(0, step)
    builder.build(0, step)
    assert [[one is cache for one in caches] for caches in found] == [[True, True]]
