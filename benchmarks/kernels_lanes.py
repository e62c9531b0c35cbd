"""Kernels side by side: how one is described, prepared, checked and timed, and in which process.

A *peer* is a kernel with what it needs: how to build it, what it should compute, how many bytes it reads. A *lane*
is a process of its own for the peers of one library. There, an illegal instruction ends the lane and not the run,
a library's patches and threads touch nobody else, and two builds of one library can be compared. Lanes never work
at the same time: the parent tells one of them to run, waits for its times, and goes on to the next.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

Call = Callable[[Tensor], Any]
Times = tuple[float, float]  # wall and CPU seconds of one call
HUNG = 900  # seconds after which a lane that says nothing is given up
SLOW, FEW_ROUNDS = 1.0, 3  # a call slower than this many seconds gets few rounds
WRONG = 0.25  # a kernel with a larger error computes something else; it is not timed


class SkippedError(Exception):
    """This peer does not run here; the message says why."""


class Problem(Protocol):
    """What all peers of a section solve; built from the same seed in every lane, so that their numbers agree."""

    def input(self, rows: int) -> Tensor: ...


@dataclass(frozen=True)
class Peer:
    """One kernel.

    Attributes:
        format: what it computes with, for the tables, such as "W4A16 g128".
        lane: the process it lives in.
        build: yields the kernel again and again, each time with a copy of its weights or cache in new memory.
        size: bytes of weights or cache that one call reads.
        check: errors of an output for an input, by name; "error" is the distance to what it should compute.
    """

    name: str
    format: str
    lane: str
    build: Callable[[Any], Iterator[Call]]
    size: Callable[[Any], float]
    check: Callable[[Any, Tensor, Any], dict[str, float]]


Section = tuple[Callable[..., Problem], dict[str, Peer]]
Sections = Callable[[], dict[str, Section]]  # a function of a module, which a lane calls in its own process


def relative(value: Tensor, expected: Tensor) -> float:
    """Frobenius distance as a share of what was expected."""
    expected = expected.double()
    return ((value.double() - expected).norm() / expected.norm()).item()


def evenly(count: int, wanted: int) -> Tensor:
    """At most `wanted` indices out of `count`, the first and the last among them."""
    return torch.linspace(0, count - 1, wanted, dtype=torch.float64).long().unique()


class Stand:
    """The peers of one lane, in its process."""

    def __init__(self, sections: dict[str, Section]) -> None:
        self.sections = sections
        self.key: tuple[Any, ...] = ()
        self.calls: dict[str, list[Call]] = {}
        self.turn: dict[str, int] = {}
        self.inputs: dict[int, Tensor] = {}
        self.problem: Any = None

    def open(self, section: str, case: dict[str, Any], threads: int) -> None:
        """Starts a case. Threads belong to it because libraries plan for a number of them when they pack weights."""
        if self.key == (section, case, threads):
            return
        self.problem = None
        self.calls, self.turn, self.inputs = {}, {}, {}
        gc.collect()
        torch.set_num_threads(threads)
        self.key, self.problem = (section, case, threads), self.sections[section][0](**case)

    def about(self) -> dict[str, str]:
        """Which implementation of each of our ops runs here."""
        from rotquant_kernels import ops

        return {name: ops.kernel_of(name) for name in ops.OPS}

    def peer(self, name: str) -> Peer:
        return self.sections[self.key[0]][1][name]

    def prepare(self, name: str, cold: int) -> dict[str, float]:
        """Builds enough copies of a peer that a call finds nothing of the one before it in a cache of `cold` bytes."""
        peer = self.peer(name)
        size = peer.size(self.problem)
        copies = max(1, -(-cold // int(size))) if size else 1
        self.calls[name] = list(itertools.islice(peer.build(self.problem), copies))
        self.turn.pop(name, None)
        return {"bytes": size, "copies": len(self.calls[name])}

    def check(self, name: str, rows: int) -> dict[str, float]:
        """Errors of the first copy. Before that every copy is used once: where memory has just been moved, the first
        reader pays for it."""
        x, calls = self.input(rows), self.copies(name)
        for call in [] if name in self.turn else calls:
            call(x)
        self.turn.setdefault(name, 0)
        return self.peer(name).check(self.problem, x, calls[0](x))

    def time(self, name: str, rows: int, count: int) -> Times:
        """Seconds of one call, the mean of `count`. CPU time is that of all threads of this process."""
        x, calls, start = self.input(rows), self.copies(name), self.turn[name]
        order = [calls[(start + i) % len(calls)] for i in range(count + 1)]
        self.turn[name] += count + 1
        gc.disable()
        order[0](x)  # brings code, threads and x back after another lane's turn
        cpu, wall = time.process_time(), time.perf_counter()
        for call in order[1:]:
            call(x)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        gc.enable()
        return wall / count, cpu / count

    def copies(self, name: str) -> list[Call]:
        if name not in self.calls:
            raise SkippedError("another kernel ended its process")
        return self.calls[name]

    def input(self, rows: int) -> Tensor:
        if rows not in self.inputs:
            self.inputs[rows] = self.problem.input(rows)
        return self.inputs[rows]


def serve(pipe: Connection, sections: Sections, environment: dict[str, str]) -> None:
    """The main function of a lane: does what the parent asks until it hangs up."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print; stdout is for the tables
    stand: Stand | None = None
    with torch.inference_mode():
        while True:
            try:
                method, arguments = pipe.recv()
            except EOFError:
                return
            try:
                stand = stand or Stand(sections())
                pipe.send((True, getattr(stand, method)(*arguments)))
            except Exception as error:
                pipe.send((False, reason(error)))


@cache
def explain(said: str) -> None:
    """The current exception in full, once."""
    traceback.print_exc()


def reason(error: Exception) -> str:
    """One line for the results."""
    said = (str(error).strip() or repr(error)).splitlines()[0]
    if isinstance(error, SkippedError):
        return said
    explain(said)
    return f"{type(error).__name__}: {said}"


class Lane:
    """A lane, seen from the parent; starts when first asked, and again after it died."""

    def __init__(self, sections: Sections, environment: dict[str, str]) -> None:
        self.sections, self.environment = sections, environment
        self.process: Any = None
        self.pipe: Connection | None = None

    def ask(self, method: str, *arguments: Any) -> Any:
        """Result of a method of `Stand` in the lane.

        Raises:
            SkippedError: it failed, or the process died or hung.
        """
        pipe = self.pipe or self.start()
        try:
            pipe.send((method, arguments))
            if not pipe.poll(HUNG):
                raise EOFError
            done, value = pipe.recv()
        except (EOFError, OSError):
            raise SkippedError(self.stop()) from None
        if not done:
            raise SkippedError(value)
        return value

    def start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.sections, self.environment), daemon=True)
        self.process.start()
        theirs.close()
        return self.pipe

    def stop(self) -> str:
        """Ends the process and says how it ended."""
        if self.process is None:
            return ""
        if self.pipe:
            self.pipe.close()
        self.process.join(2)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        self.pipe = self.process = None
        if code is None:
            return f"said nothing for {HUNG} s"
        return (
            f"its process died of {signal.Signals(-code).name}" if code < 0 else f"its process ended with code {code}"
        )


@dataclass
class Entrant:
    """A prepared peer in a race."""

    name: str
    lane: Lane
    facts: dict[str, float]


def prove(entrant: Entrant, rows: int, rounds: int, least: float) -> tuple[dict[str, Any], tuple[int, int]]:
    """Errors of an entrant, and how many calls a round and rounds it gets.

    Raises:
        SkippedError: it fails, or computes something else.
    """
    errors = entrant.lane.ask("check", entrant.name, rows)
    if not errors.get("error", 0) < WRONG:  # NaN too
        raise SkippedError(f"wrong numbers: error {errors['error']:.3g}")
    wall, _ = entrant.lane.ask("time", entrant.name, rows, 1)
    return errors, (max(1, round(0.5 + least / wall)), min(rounds, FEW_ROUNDS) if wall > SLOW else rounds)


def race(entrants: list[Entrant], rows: int, rounds: int, least: float) -> dict[str, dict[str, Any]]:
    """Times all entrants in alternating rounds (A B C A B C ...).

    A machine whose speed drifts, or that others use too, is unkind to all alike; medians forget single bad rounds.

    Args:
        least: seconds that one measurement of one entrant should last.
    Returns:
        By name: medians in µs, the spread of the CPU times between their quartiles as a share of the median,
        rounds, calls in a round, and errors; or {"skipped": why}.
    """
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[Times]] = {}
    plan: dict[str, tuple[int, int]] = {}  # calls in a round, rounds
    for turn in range(-1, rounds):
        for one in entrants:
            try:
                if turn < 0:
                    found[one.name], plan[one.name] = prove(one, rows, rounds, least)
                elif turn < plan[one.name][1] and "skipped" not in found[one.name]:
                    times.setdefault(one.name, []).append(one.lane.ask("time", one.name, rows, plan[one.name][0]))
            except SkippedError as error:
                found[one.name], plan[one.name] = {"skipped": str(error)}, (0, 0)
                times.pop(one.name, None)
    for name, all_times in times.items():
        walls, cpus = (sorted(1e6 * one[clock] for one in all_times) for clock in (0, 1))
        quartiles = cpus[-(-3 * len(cpus) // 4) - 1] - cpus[len(cpus) // 4]
        found[name] |= {"wall_us": median(walls), "cpu_us": median(cpus), "spread": quartiles / median(cpus)}
        found[name] |= {"rounds": len(cpus), "calls": plan[name][0]}
    return found
