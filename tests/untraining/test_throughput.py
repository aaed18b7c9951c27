"""Where the time of a run goes, and what is said of data that come too slowly."""

import logging
import time

import pytest
import torch

from wfnet import untrain
from wfnet.untraining import throughput as throughput_module
from wfnet.untraining.objectives import BalancedObjective, Losses
from wfnet.untraining.throughput import Throughput


class Clock:
    """Seconds of host and device, moved by hand."""

    def __init__(self, monkeypatch):
        self.host = self.device = 0.0
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                # When the device comes to it: not before the host has asked for it.
                clock.device = max(clock.device, clock.host)
                self.at = clock.device

            def query(self):
                return True

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr("wfnet.untraining.throughput.time.perf_counter", lambda: self.host)


@pytest.mark.parametrize("busy", [0.0, 3.0, 10.0])
def test_waiting_counts_as_far_as_the_device_is_idle(monkeypatch, busy):
    """The host waits 4 s for an image while the device still has ``busy`` seconds of work."""
    clock = Clock(monkeypatch)
    throughput = Throughput("cuda")

    def images():
        for _ in range(2):
            clock.host += 4
            yield 1

    for _ in throughput.timed(images()):
        throughput.images += 1
        clock.host += 0.5  # the step is asked for
        clock.device = max(clock.device, clock.host) + busy
    clock.host = max(clock.host, clock.device)
    seconds = clock.host
    record = throughput.record()
    # The device is idle before the first image, and as long as it has done the first step's work.
    idle = 4 + max(0.0, 4 - busy)
    assert record["data_wait"] == pytest.approx(idle / seconds)
    assert throughput.total == pytest.approx(idle)
    assert throughput.record()["data_wait"] == 0


class Slow(BalancedObjective):
    """Takes its time."""

    def __init__(self, seconds):
        super().__init__()
        object.__setattr__(self, "seconds", seconds)

    def __call__(self, *arguments):
        time.sleep(self.seconds)
        losses = super().__call__(*arguments)
        return Losses(losses.total, {**losses.terms, "a number": 0.25})

    def __repr__(self):
        return "Slow()"


def test_what_the_time_was_spent_on_adds_up(runs, tmp_path):
    def run():
        data = runs.images(), runs.images(4, 1)
        settings = runs.config(steps=12)
        return untrain(
            runs.network(), *data, settings, tmp_path, True, progress=False, objective=Slow(0.01)
        )

    result = run()
    assert set(result.spent) == {"start", "data", "steps", "validation", "checkpoints"}
    assert all(seconds >= 0 for seconds in result.spent.values())
    assert sum(result.spent.values()) == pytest.approx(result.seconds)
    assert result.spent["steps"] > 0.1
    assert min(result.spent[name] for name in ("start", "validation", "checkpoints")) > 0
    assert result.history[-1]["a number"] == pytest.approx(0.25)
    assert run().spent["start"] == pytest.approx(result.spent["start"])


@pytest.mark.parametrize("slow", ["data", "network"])
def test_the_log_says_when_the_data_starve_the_network(slow, runs, caplog, monkeypatch):
    monkeypatch.setattr(throughput_module, "_WORTH_SAYING", 0.1)
    train = runs.Files(runs.images(), lambda index: time.sleep(0.02 * (slow == "data")))
    objective = Slow(0.1 * (slow == "network"))
    with caplog.at_level(logging.INFO, "wfnet"):
        result = untrain(
            runs.network(), train, None, runs.config(steps=8), progress=False, objective=objective
        )
    record = result.history[-1]
    assert {"images_per_second", "data_wait"} <= set(record)
    if slow == "data":
        assert "the data starve the network" in caplog.text
        assert record["data_wait"] > 0.5
        assert record["images_per_second"] < 100
    else:
        assert record["data_wait"] < 0.5
