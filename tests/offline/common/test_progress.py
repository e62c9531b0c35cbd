"""What somebody who waits reads where there is no terminal."""

from rotquant.common import progress
from rotquant.common.progress import QUIET_SECONDS, Progress


def test_lines_and_their_eta(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def lines() -> list[str]:
        return [line.split(" GB")[0].rsplit(" · ", 1)[0] for line in capsys.readouterr().err.splitlines()]

    resumed = Progress("layer", 10, done=4)  # what an earlier run did says nothing about this one's speed
    now[0] += 60
    resumed.within(0.5, "step 5/10")
    now[0] += 1
    resumed.within(0.6, "too soon for another line")
    now[0] += 59
    resumed.step("note")
    assert lines() == ["layer 4/10 · 1:00 · eta 11:00", "layer 5/10 · 2:00 · eta 10:00"]
    short = Progress("step", 30, short=True)
    for _ in range(30):
        now[0] += QUIET_SECONDS / 10
        short.step()
    assert lines() == ["step 10/30 · 0:10 · eta 0:20", "step 20/30 · 0:20 · eta 0:10", "step 30/30 · 0:30 · eta 0:00"]
