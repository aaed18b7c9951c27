"""Where the time of a run goes, and what is said of data that come too slowly."""

import time
from types import SimpleNamespace

import pytest
import torch

from wfnet.untraining.run_clock import RunClock


def test_waiting_counts_where_the_device_is_idle(monkeypatch):
    busy = iter([False, True, False])
    stream = SimpleNamespace(query=lambda: not next(busy))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    times = iter(range(100))
    monkeypatch.setattr("wfnet.untraining.run_clock.time.perf_counter", lambda: next(times))
    clock = RunClock(torch.device("cuda"))
    assert list(clock.waits(iter("abc"))) == list("abc")
    assert clock.spent(10)["data"] == 2
    assert clock.spent(10)["steps"] == 8


def test_what_the_time_was_spent_on_adds_up(go, runs, tmp_path):
    def run():
        train = runs.Files(runs.bars(), lambda index: time.sleep(0.02))
        return go(tmp_path, train, runs.bars(4, 1), steps=8)[1]

    result = run()
    assert set(result.spent) == {
        *("start", "features", "data", "steps", "validation", "checkpoints")
    }
    assert sum(result.spent.values()) == pytest.approx(result.seconds)
    assert min(result.spent.values()) > 0
    assert run().spent["start"] == pytest.approx(result.spent["start"])
    assert result.spent["data"] > 0.5 * result.spent["steps"]
