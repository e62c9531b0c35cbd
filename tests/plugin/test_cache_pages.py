"""The KV cache moves into pages of 2 MiB before its first step: nothing in it changes, and the log says what came."""

import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from rotquant.common.large_pages import FROM_TORCH, ask_torch
from rotquant.errors import RotQuantError
from rotquant_kernels import native
from rotquant_kernels.formats import KVFormat
from vllm_rotquant import compat, large_pages, pages

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
    groups = owner[:PAGE], owner[PAGE:]
    large_pages.enlarge(groups)
    large_pages.enlarge(groups[1:])
    assert torch.equal(owner, before)
    first, last = owner.data_ptr() // PAGE, (owner.data_ptr() + owner.numel() - 1) // PAGE
    assert [f" {last - first + 1} " in line for _, line in said] == [True]


MAPPINGS = """\
1000-2000 r-xp 00000000 08:01 7                          /usr/lib/a-library.so
AnonHugePages:         0 kB
10000000-18000000 rw-p 00000000 00:00 0
AnonHugePages:    {} kB
VmFlags: rd wr mr hg
"""


@pytest.mark.parametrize(
    ("kibibytes", "start", "found"),
    [
        (128 * 1024, 0x10000000, (32, 32)),
        (120 * 1024, 0x10000000, (32, 30)),
        (110 * 1024, 0x10000000, None),
        (128 * 1024, 0x16000000, None),
    ],
    ids=["all", "most", "too few", "beyond the mapping"],
)
def test_what_torch_made_large_is_left_alone(monkeypatch, tmp_path, kibibytes, start, found):
    (tmp_path / "smaps").write_text(MAPPINGS.format(kibibytes))
    monkeypatch.setattr(large_pages, "SMAPS", tmp_path / "smaps")
    assert large_pages.large_already(large_pages.mappings(), start, 32 * PAGE) == found


def test_torch_is_asked_unless_the_user_says_otherwise(monkeypatch):
    for said_before, after in ((None, "1"), ("0", "0")):
        monkeypatch.delenv(FROM_TORCH, raising=False)
        if said_before is not None:
            monkeypatch.setenv(FROM_TORCH, said_before)
        ask_torch()
        assert os.environ[FROM_TORCH] == after


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


@pytest.mark.parametrize(
    ("token_bytes", "expected"),
    [
        ([4 * 517, 16 * 261], (2, 1)),  # Gemma 4 of 31B: full attention, with a window
        ([2 * 517, 8 * 261], (2, 1)),
        ([517, 8 * 261], (4, 1)),  # of 12B
        ([261, 517], (2, 1)),
        ([74, 69], (1, 1)),  # little is idle as it is
        ([100], (1,)),
        ([], ()),
    ],
)
def test_pages_of_layers_that_differ_are_nearly_equal(token_bytes, expected):
    counts = pages.blocks(token_bytes)
    assert counts == expected
    assert not counts or pages.idle([size * count for size, count in zip(token_bytes, counts, strict=True)]) < 0.1


def test_a_vllm_that_does_not_pad_pages_is_refused_in_one_line():
    own = {name: SimpleNamespace(head_dim=size, kv_heads=2) for name, size in (("a", 32), ("b", 64))}
    kv = KVFormat(True, 1.0, 1.0, 0)
    with pytest.raises(RotQuantError, match=r"serve with vLLM 0\.29 or newer, or quantize with --set kv\.bits=16"):
        pages.by_layer(own, kv, 1, padded=False)
    assert pages.by_layer({"a": own["a"]}, kv, 1, padded=False) == {"a": 1}
    assert pages.by_layer(own, kv, 4, padded=True) == {"a": 2, "b": 1}


@pytest.mark.parametrize(("size", "whole"), [(256, True), (512, False)])
def test_prefills_of_heads_that_flash_attention_does_not_take_stay_here(monkeypatch, size, whole):
    kv_cache = pytest.importorskip("vllm_rotquant.kv_cache")
    monkeypatch.setattr(compat, "dense_attention", lambda: ("FlashAttention", None))
    layer = SimpleNamespace(
        impl=SimpleNamespace(scale=1.0, logits_soft_cap=None), num_heads=4, num_kv_heads=2, head_size=size,
        kv_cache_dtype="auto", sliding_window=None, dtype=torch.bfloat16,
    )  # fmt: skip
    assert bool(kv_cache.KV4Impl(layer, KVFormat(True, 1.0, 1.0, 0)).dense) == whole
