"""The signals that end a run: none is lost, and what was started is stopped."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]
_heard = False  # Ctrl-C, since `ctrl_c_remembered` began


@contextmanager
def ctrl_c_remembered() -> Iterator[None]:
    """A Ctrl-C always ends the block with KeyboardInterrupt.

    Python raises KeyboardInterrupt between any two of its instructions, also in those that C++ called. There
    torch makes another error of it (`torch.asarray`: "could not determine the shape"), and a finalizer drops
    it. So it is remembered: an error after it is taken for it, and `raise_dropped` raises it again.
    Where Ctrl-C is ignored or handled in another way already, that stays.
    """
    global _heard
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    _heard = False
    try:
        with _handled({signal.SIGINT: _remember}):
            yield
    except Exception as error:
        raise_dropped(error)
        raise
    finally:
        _heard = False


def _remember(number: int, frame: FrameType | None) -> None:
    global _heard
    _heard = True
    raise KeyboardInterrupt


def raise_dropped(cause: Exception | None = None) -> None:
    """Raises KeyboardInterrupt if there was a Ctrl-C: for places that a run should not get past after one."""
    if _heard:
        raise KeyboardInterrupt from cause


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP become exceptions too, so that what was started is stopped whatever ends the block."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    with _handled({signal.SIGTERM: leave, signal.SIGHUP: leave}):
        yield


@contextmanager
def _handled(handlers: dict[signal.Signals, Handler]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
