"""The signals that end a run: none is lost, and what was started is stopped.

Their handlers raise an exception, and Python runs them between any two of its instructions, also in those that C++
called. There torch makes another error of the exception (`torch.asarray`: "could not determine the shape"), and a
finalizer drops it. So the signal is remembered: an error after it is taken for it, and `raise_dropped` raises it again.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

_heard = 0  # number of the signal that ends the block under way, 0 if none came


@contextmanager
def ctrl_c_remembered() -> Iterator[None]:
    """A Ctrl-C always ends the block with KeyboardInterrupt.

    Where Ctrl-C is ignored or handled in another way already, that stays.
    """
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with _remembered(signal.SIGINT) if default else nullcontext():
        yield


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP become exceptions too, so that what was started is stopped whatever ends the block."""
    with _remembered(signal.SIGTERM, signal.SIGHUP):
        yield


def raise_dropped(cause: Exception | None = None) -> None:
    """Raises what the signal raised, if one came: for places that a run should not get past after one."""
    if _heard:
        raise _exception(_heard) from cause


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def _hear(number: int, frame: FrameType | None) -> None:
    global _heard
    _heard = number
    raise _exception(number)


@contextmanager
def _remembered(*numbers: int) -> Iterator[None]:
    global _heard
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield
        return
    before = {number: signal.signal(number, _hear) for number in numbers}
    try:
        yield
    except Exception as error:
        raise_dropped(error)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if _heard in before:
            _heard = 0
