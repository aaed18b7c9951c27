"""Where the time of a run goes, and what is said of data that come too slowly."""

import time

import pytest
import torch

from wfnet import untrain
from wfnet.untraining.objectives import BalancedObjective, Losses
from wfnet.untraining.run_clock import RunClock


@pytest.mark.parametrize("busy", [0.0, 3.0, 10.0])
def test_waiting_counts_as_far_as_the_device_is_idle(monkeypatch, busy):
    """The host waits 4 s for an image while the device still has ``busy`` seconds of work."""
    now = {"host": 0.0, "device": 0.0}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            # When the device comes to it: not before the host has asked for it.
            self.at = now["device"] = max(now.values())

        def query(self):
            return True

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    def images():
        for _ in range(2):
            now["host"] += 4
            yield 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr("wfnet.untraining.run_clock.time.perf_counter", lambda: now["host"])
    clock = RunClock("cuda")
    for _ in clock.waits(images()):
        now["host"] += 0.5  # the step is asked for
        now["device"] = max(now.values()) + busy
    now["host"] = seconds = max(now.values())
    # The device is idle before the first image, and as long as it has done the first step's work.
    idle = 4 + max(0.0, 4 - busy)
    assert clock.record()["data_wait"] == pytest.approx(idle / seconds)
    assert clock.spent(seconds)["data"] == pytest.approx(idle)
    assert clock.record()["data_wait"] == 0


class Slow(BalancedObjective):
    """Takes a hundredth of a second."""

    def __call__(self, *arguments):
        time.sleep(0.01)
        losses = super().__call__(*arguments)
        return Losses(losses.total, {**losses.terms, "a number": 0.25})

    def __repr__(self):
        return "Slow()"


def test_what_the_time_was_spent_on_adds_up(runs, tmp_path):
    def run():
        data, settings = (runs.images(), runs.images(4, 1)), runs.config(steps=12)
        return untrain(runs.network(), *data, settings, tmp_path, True, False, objective=Slow())

    result = run()
    assert set(result.spent) == {"start", "data", "steps", "validation", "checkpoints"}
    assert sum(result.spent.values()) == pytest.approx(result.seconds)
    assert result.spent["steps"] > 0.1
    assert min(result.spent[name] for name in ("start", "validation", "checkpoints")) > 0
    assert result.history[-1]["a number"] == pytest.approx(0.25)
    assert run().spent["start"] == pytest.approx(result.spent["start"])


def test_the_history_says_how_long_images_were_waited_for(runs):
    train = runs.Files(runs.images(), lambda index: time.sleep(0.02))
    record = untrain(runs.network(), train, None, runs.config(steps=8), progress=False).history[-1]
    assert record["data_wait"] > 0.5
    assert record["images_per_second"] < 100
