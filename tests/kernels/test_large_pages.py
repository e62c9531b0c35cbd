"""Packed weights are asked into pages of 2 MiB, and nothing in them or beside them changes."""

import torch

from rotquant_kernels import convention, native, ops

PAGE = 2 << 20


def test_every_page_that_holds_a_tensor_is_asked_for_and_keeps_its_bytes() -> None:
    assert not native.load()
    whole = torch.randint(0, 256, (3 * PAGE + 12345,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    part, before = whole[777 : PAGE + 999], whole.clone()
    first, last = part.data_ptr() // PAGE, (part.data_ptr() + part.numel() - 1) // PAGE
    pages, given = torch.ops.rotquant.large_pages_(part)
    assert pages == last - first + 1
    assert 0 <= given <= pages
    assert torch.equal(whole, before)


def test_pages_of_zeros_stay_zeros_and_their_neighbours_what_they_are() -> None:
    """Zero pages are given back to the system: none that holds another byte, within the tensor or beside it, may go."""
    assert not native.load()
    whole = torch.zeros(8 * PAGE, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE
    part = whole[start + 5 : start + 5 * PAGE + 9]
    for place in (start, start + 3, start + 2 * PAGE - 1, start + 4 * PAGE, start + 5 * PAGE + 10):
        whole[place] = 1
    before = whole.clone()
    pages, given = torch.ops.rotquant.large_pages_(part)
    assert pages == 6
    assert 0 <= given <= pages
    assert torch.equal(whole, before)
    part += 1
    assert torch.equal(part, before[start + 5 : start + 5 * PAGE + 9] + 1)


def test_packed_weights_are_asked_for() -> None:
    assert not native.load()
    codes = torch.randint(-8, 8, (1024, 4096), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    before = torch.ops.rotquant.weight_pages()
    packed = ops.prepare_weight(convention.pack_int32(codes, 4), 4, 4096)
    pages, given = (now - then for now, then in zip(torch.ops.rotquant.weight_pages(), before, strict=True))
    assert pages >= packed.numel() // PAGE
    assert 0 <= given <= pages
