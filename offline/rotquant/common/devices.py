"""Calibration samples over devices: the one place that knows how many there are.

Samples lie on the CPU. Each device takes a contiguous share of them and works on it in a thread of its own; results
come back in the order of the samples, sums in that of the devices. So one device computes what it would without all
this, bit for bit, and n devices differ from it only where sums of shares are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import nullcontext
from threading import Event
from typing import Any, TypeVar

import torch
from torch import Tensor

from rotquant.errors import RotQuantError

T = TypeVar("T")
Share = Iterator[tuple[int, tuple[Tensor, ...]]]  # (index of the sample, what the stores hold of it, on the device)


class Devices:
    """The devices of a run, in order; what is not done sample by sample is done on the first.

    Args:
        names: "auto" (a GPU where there is one), or devices as torch names them, separated by commas:
            "cuda:0,cuda:1". The same one twice is two workers on it.
    Raises:
        RotQuantError: a device that torch does not know or this machine does not have.
    """

    def __init__(self, names: str = "auto") -> None:
        if names == "auto":
            names = "cuda" if torch.cuda.is_available() else "cpu"
        self.names = names
        self.places = [_checked(name.strip(), names) for name in names.split(",")]

    @property
    def first(self) -> torch.device:
        return self.places[0]

    def copies(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors on each device; where they are already, themselves."""
        return [{name: tensor.to(place) for name, tensor in tensors.items()} for place in self.places]

    def each(self, work: Callable[[int, Share], T], *stores: Tensor) -> list[T]:
        """What `work` returns for each device that has a sample.

        Args:
            work: called with the number of a device and its share.
            stores: [samples, ...] each, on the CPU; equally many samples.
        Raises:
            whatever `work` raises; the other devices stop before their next sample.
        """
        count = len(stores[0])
        bounds = [count * i // len(self.places) for i in range(len(self.places) + 1)]
        busy = [i for i in range(len(self.places)) if bounds[i] < bounds[i + 1]]
        if len(busy) < 2:
            return [self._run(work, i, range(bounds[i], bounds[i + 1]), stores, None) for i in busy]
        stop, gradients = Event(), torch.is_grad_enabled()

        def threaded(i: int) -> T:
            with torch.set_grad_enabled(gradients):  # the mode is each thread's own
                try:
                    return self._run(work, i, range(bounds[i], bounds[i + 1]), stores, stop)
                except BaseException:
                    stop.set()
                    raise

        with ThreadPoolExecutor(len(busy)) as pool:
            futures = [pool.submit(threaded, i) for i in busy]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()  # Ctrl-C, which comes to this thread
        failed = [future for future in futures if future.exception() not in (None, _STOPPED)]
        return [future.result() for future in (failed or futures)]

    def map(self, work: Callable[..., Tensor], *stores: Tensor, out: Tensor) -> Tensor:
        """Sets out[i] to work(device number, i, samples ...) for every sample i.

        Args:
            out: [samples, ...] on the CPU; may be one of the stores.
        """

        def write(worker: int, share: Share) -> None:
            for i, samples in share:
                out[i] = work(worker, i, *samples).cpu()

        self.each(write, *stores)
        return out

    def _run(
        self, work: Callable[[int, Share], T], worker: int, indices: range, stores: Sequence[Tensor], stop: Event | None
    ) -> T:
        place = self.places[worker]

        def share() -> Share:
            for i in indices:
                if stop and stop.is_set():
                    raise _STOPPED
                yield i, tuple(store[i].to(place) for store in stores)

        context: Any = torch.cuda.device(place) if place.type == "cuda" else nullcontext()
        with context:  # kernels that are launched by hand run on the current device
            return work(worker, share())


class _Stopped(Exception):  # noqa: N818
    """Another device failed."""


_STOPPED = _Stopped()


def _checked(name: str, names: str) -> torch.device:
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RotQuantError(
            f"--device {names}: {name!r} cannot be used here ({reason}); take auto, cpu, cuda, or a list such as"
            " cuda:0,cuda:1"
        ) from None
    return place
