"""Progress of long work: one bar with ETA and memory on a terminal, plain lines elsewhere. On stderr."""

from __future__ import annotations

import resource
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from rotquant.common.signals import raise_dropped


def peak_memory() -> float:
    """Peak resident memory of this process in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


QUIET_SECONDS = 10  # between two lines of short steps, where there is no terminal


class Progress:
    """Counts steps of one kind of work.

    Args:
        title: what is being done; total: how many steps; done: steps that an earlier run finished.
        short: the steps are short: not every one is worth a line.
    """

    def __init__(self, title: str, total: int, done: int = 0, short: bool = False) -> None:
        self.title, self.total, self.count, self.first, self.short = title, total, done, done, short
        self.started = self.shown = time.monotonic()
        self.bar: RichProgress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = RichProgress(*columns, TextColumn("{task.fields[rest]}"), console=Console(stderr=True))

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.count, rest="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, note: str = "") -> None:
        """One more step is done."""
        self.count += 1
        self._show(self.count, note, self.short and self.count < self.total)

    def within(self, share: float, note: str = "") -> None:
        """A share, in (0, 1], of the step under way is done."""
        self._show(self.count + share, note, quiet=True)

    def _show(self, done: float, note: str, quiet: bool) -> None:
        raise_dropped()
        now = time.monotonic()
        spent = now - self.started
        eta = spent / (done - self.first) * (self.total - done)
        rest = f"eta {clock(eta)} · {peak_memory():.1f} GB{' · ' + note if note else ''}"
        if self.bar:
            self.bar.update(self.task, completed=self.count, rest=rest)
        elif not quiet or now - self.shown >= QUIET_SECONDS:
            self.shown = now
            print(f"{self.title} {self.count}/{self.total} · {clock(spent)} · {rest}", file=sys.stderr, flush=True)


def say(line: str) -> None:
    """A line for the person at the terminal."""
    print(line, file=sys.stderr, flush=True)
