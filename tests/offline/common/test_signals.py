"""Ctrl-C wherever Python raises it, and SIGTERM."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import rotquant.pipeline
from rotquant import cli
from rotquant.checkpoint.journal import Journal
from rotquant.common.progress import Progress
from rotquant.common.signals import ctrl_c_remembered, terminated_like_interrupted
from rotquant.measure import compare_run


@pytest.fixture(autouse=True)
def _heeded() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupting:
    """A signal in code that C++ calls, where torch makes a ValueError of it."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        self.number = number

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        signal.raise_signal(self.number)


def converted(*arguments: Any, **settings: Any) -> Any:
    return torch.tensor(Interrupting())


def swallowed_before(step: Callable[[], None]) -> None:
    with ctrl_c_remembered():
        with suppress(KeyboardInterrupt):  # as a finalizer or a callback does
            signal.raise_signal(signal.SIGINT)
        step()


def test_torch_makes_an_error_of_ctrl_c() -> None:
    """Why all this is needed; if it fails, it is not any more."""
    with pytest.raises(ValueError, match="could not determine the shape"):
        converted()


def test_a_converted_ctrl_c_is_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rotquant.pipeline, "quantize", converted)
    assert cli.main(["quantize", "model", "-o", "out"]) == 130
    assert capsys.readouterr().err.startswith("rotquant: interrupted: go on where it stopped with: ")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_of_compare_tells_a_converted_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "job.json"
    job.write_text("{}")
    monkeypatch.setattr(compare_run, "run", converted)
    assert compare_run.main(str(job), str(tmp_path / "result.json")) == 130
    assert not (tmp_path / "result.json").exists()


def test_no_step_counts_as_done_after_a_swallowed_ctrl_c(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", {}, resume=False)
    steps: list[Callable[[], None]] = [
        lambda: journal.finish("layer 0"),
        lambda: journal.keep("R1", {"R1": torch.eye(2)}),
        Progress("layer", 2).step,
    ]
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            swallowed_before(step)
    assert journal.state["steps"] == {}
    steps[0]()
    assert journal.done("layer 0")


def test_other_errors_and_other_handlers_stay() -> None:
    with pytest.raises(ValueError, match="mine"), ctrl_c_remembered():
        raise ValueError("mine")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ctrl_c_remembered():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_sigterm_unwinds() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        terminate_self()
    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def terminate_self() -> None:
    with terminated_like_interrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_a_lost_sigterm_ends_a_run_too() -> None:
    for lost in (convert_sigterm, swallow_sigterm):
        with pytest.raises(SystemExit) as left:
            lost()
        assert left.value.code == 143


def convert_sigterm() -> None:
    with terminated_like_interrupted():
        torch.tensor(Interrupting(signal.SIGTERM))


def swallow_sigterm() -> None:
    with terminated_like_interrupted():
        with suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        Progress("layer", 2).step()
