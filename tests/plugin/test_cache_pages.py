"""The KV cache moves into pages of 2 MiB while it serves: nothing in it changes, and the log says what came."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from rotquant_kernels import native
from vllm_rotquant import compat, large_pages

pytestmark = pytest.mark.skipif(bool(native.load()), reason="no native kernels here")
PAGE = large_pages.PAGE


@pytest.fixture
def said(monkeypatch):
    """(level, line) of what the log was told."""
    lines: list[tuple[str, str]] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(compat.logger, level, lambda text, *parts, level=level: lines.append((level, text % parts)))
    return lines


def test_every_page_of_a_shared_storage_is_asked_for_once(said, monkeypatch):
    owner = torch.randint(0, 256, (40 * PAGE + 999,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, asked = owner.clone(), []
    monkeypatch.setattr(large_pages, "CHUNK", 3 * PAGE)
    pages = torch.ops.rotquant.large_pages

    def note(part):
        asked.append((part.data_ptr(), part.numel()))
        return pages(part)

    monkeypatch.setattr(torch.ops.rotquant, "large_pages", note)
    layers = owner[:PAGE], owner[PAGE:]
    thread = large_pages.enlarge(layers)
    assert thread is not None
    thread.join()
    ends = [owner.data_ptr(), *(start + size for start, size in asked)]
    assert [start for start, _ in asked] == ends[:-1]
    assert ends[-1] == owner.data_ptr() + owner.numel()
    assert not any(end % PAGE for end in ends[1:-1])
    assert torch.equal(owner, before)
    first, last = owner.data_ptr() // PAGE, (ends[-1] - 1) // PAGE
    assert [f" {last - first + 1} " in line for _, line in said] == [True]


def test_a_cache_that_is_gone_is_let_go(said):
    cache = torch.zeros(large_pages.FEW * PAGE, dtype=torch.uint8)
    gone = large_pages.weakref.ref(cache)
    del cache
    large_pages.ask([gone])
    assert not said


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
