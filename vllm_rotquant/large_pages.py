"""Pages of 2 MiB under what a CPU reads from end to end: packed weights and the KV cache (csrc/memory.h)."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from rotquant_kernels import native
from vllm_rotquant import compat

PAGE = 2 << 20
CHUNK = 16 * PAGE  # bytes that are asked for at once
FEW = 32  # pages, too few to say anything of


def enlarge(caches: Iterable[Tensor]) -> threading.Thread | None:
    """Moves the memory of KV caches into large pages while they serve: a GiB may take seconds.

    Args:
        caches: views into one storage or several; they may go while this runs.
    Returns:
        The thread that does it and ends with the last page or with the process; None without native kernels.
    """
    if native.tier() == native.REFERENCE:
        return None
    owners = {cache.untyped_storage().data_ptr(): weakref.ref(cache) for cache in caches}
    thread = threading.Thread(target=ask, args=(list(owners.values()),), name="rotquant large pages")
    thread.start()
    return thread


def ask(owners: Iterable[weakref.ref[Tensor]]) -> None:
    """Asks for large pages under the storages of tensors, and says how many there are."""
    pages = given = 0
    for owner in owners:
        start, more = 0, True
        while more:
            cache = owner()
            if cache is None or not threading.main_thread().is_alive():
                return
            storage = cache.untyped_storage()
            end = min(start + CHUNK - (storage.data_ptr() + start) % PAGE, storage.nbytes())
            part = torch.empty(0, dtype=torch.uint8).set_(storage, start, torch.Size([end - start]), (1,))
            found = torch.ops.rotquant.large_pages(part)
            pages, given = pages + found[0], given + found[1]
            start, more = end, end < storage.nbytes()
            del cache, storage, part
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
