"""Pages of 2 MiB under what a CPU reads from end to end: packed weights and the KV cache (csrc/memory.h)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from rotquant_kernels import native
from vllm_rotquant import compat

FEW = 32  # pages, too few to say anything of
# The caches that were asked for, as long as they live, by where their storage begins.
_enlarged: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def enlarge(caches: Iterable[Tensor]) -> None:
    """Puts the memory of KV caches into large pages, before anything is in them.

    A GiB takes a quarter of a second, and more where the system has to find the pages first.

    Args:
        caches: views into one storage or several; groups of layers share them, and each asks here.
    """
    if native.tier() == native.REFERENCE:
        return
    pages = given = 0
    for cache in caches:
        storage = cache.untyped_storage()
        if storage.data_ptr() in _enlarged:
            continue
        _enlarged[storage.data_ptr()] = cache
        found = torch.ops.rotquant.large_pages_(torch.empty(0, dtype=torch.uint8).set_(storage))
        pages, given = pages + found[0], given + found[1]
    report("the KV cache", pages, given)


def report_weights() -> None:
    """Says how many pages of the packed weights of this process are large."""
    if native.tier() != native.REFERENCE:
        report("the packed weights", *torch.ops.rotquant.weight_pages())


def report(what: str, pages: int, given: int) -> None:
    """A line for the log; a warning where the system gave less than half."""
    if pages < FEW:
        return
    if 2 * given >= pages:
        compat.logger.info("rotquant: %d of %d pages of 2 MiB that hold %s are large", given, pages, what)
        return
    compat.logger.warning(
        "rotquant: the system gave %d of %d large pages to %s, which are read more slowly in pages of 4 KiB: it takes "
        "Linux 6.1 or newer, with free memory that is not scattered",
        given, pages, what,
    )  # fmt: skip
