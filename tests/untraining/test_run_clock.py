"""Where the time of a run goes, and what is said of data that come too slowly."""

import time
from types import SimpleNamespace

import pytest
import torch

from wfnet import untrain
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


def test_what_the_time_was_spent_on_adds_up(runs, tmp_path):
    def run():
        data, settings = (runs.images(), runs.images(4, 1)), runs.config(steps=4)
        return untrain(runs.network(), *data, settings, tmp_path, True, False)

    result = run()
    assert set(result.spent) == {"start", "data", "steps", "validation", "checkpoints"}
    assert sum(result.spent.values()) == pytest.approx(result.seconds)
    assert min(result.spent.values()) > 0
    assert run().spent["start"] == pytest.approx(result.spent["start"])


def test_the_history_says_how_long_images_were_waited_for(runs):
    train = runs.Files(runs.images(), lambda index: time.sleep(0.02))
    record = untrain(runs.network(), train, None, runs.config(steps=8), progress=False).history[-1]
    assert record["data_wait"] > 0.5
    assert record["images_per_second"] < 100
