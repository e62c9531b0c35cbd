"""Runs that are stopped on the way, to be gone on with."""

from __future__ import annotations

from typing import Any

import pytest


def stop_at_call(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int) -> list[int]:
    """Ctrl-C as a method is called for the `call`-th time; journals save every snapshot. Its first arguments so far."""
    method, seen = getattr(owner, name), []

    def stopped(self: Any, index: int, *rest: Any) -> Any:
        seen.append(index)
        if len(seen) == call:
            raise KeyboardInterrupt
        return method(self, index, *rest)

    monkeypatch.setattr("rotquant.checkpoint.journal.SNAPSHOT_SECONDS", 0)
    monkeypatch.setattr("rotquant.checkpoint.journal.SNAPSHOT_SHARE", 1e9)
    monkeypatch.setattr(owner, name, stopped)
    return seen
