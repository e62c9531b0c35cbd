"""Pages of 2 MiB under what a CPU reads from end to end: packed weights and the KV cache (csrc/memory.h)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from rotquant_kernels import native
from vllm_rotquant import compat

FEW = 32  # pages, too few to say anything of
PAGE = 2 << 20
ENOUGH = 0.9  # of a mapping
SMAPS = Path("/proc/self/smaps")
# The caches that were asked for, as long as they live, by where their storage begins.
_enlarged: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def enlarge(caches: Iterable[Tensor]) -> None:
    """Puts the memory of KV caches into large pages, before anything is in them.

    Where torch has not made them large, a GiB takes a quarter of a second, and many times that where the system has to
    move others' pages first.

    Args:
        caches: views into one storage or several; groups of layers share them, and each asks here.
    """
    if native.tier() == native.REFERENCE:
        return
    pages = given = 0
    mapped = mappings()  # all at once: the system walks over all pages for it
    for cache in caches:
        storage = cache.untyped_storage()
        if storage.data_ptr() in _enlarged:
            continue
        _enlarged[storage.data_ptr()] = cache
        found = large_already(mapped, storage.data_ptr(), storage.nbytes()) or torch.ops.rotquant.large_pages_(
            torch.empty(0, dtype=torch.uint8).set_(storage)
        )
        pages, given = pages + found[0], given + found[1]
    report("the KV cache", pages, given)


def mappings() -> list[tuple[int, int, float]]:
    """First and last address of each mapping of this process, and the share of it that is in large pages."""
    try:
        lines = SMAPS.read_text().splitlines()
    except OSError:
        return []
    found, first, last = [], 0, 0
    for line in lines:
        head = line.split(maxsplit=1)[0]
        if head == "AnonHugePages:":
            found.append((first, last, int(line.split()[1]) * 1024 / (last - first)))
        elif "-" in head:
            first, last = (int(end, 16) for end in head.split("-"))
    return found


def large_already(mapped: list[tuple[int, int, float]], start: int, size: int) -> tuple[int, int] | None:
    """Pages of 2 MiB under `size` bytes at `start` and how many are large, where nine of ten of their mapping are."""
    pages = -(-size // PAGE)
    shares = [share for first, last, share in mapped if first <= start and start + size <= last]
    return (pages, round(pages * shares[0])) if shares and shares[0] >= ENOUGH else None


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
