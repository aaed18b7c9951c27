"""CPU threads: measured, unless somebody has said a number."""

import pytest
import torch

from wfnet.services import threads


@pytest.fixture
def set_to(monkeypatch):
    """The numbers that were set; the process's own stays."""
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.parametrize(
    ("seconds", "best"), [((4.0, 2.1, 1.2, 1.15), 4), ((1.0, 3.0, 3.0, 3.0), 1)]
)
def test_the_fastest_number_is_set(monkeypatch, set_to, seconds, best):
    monkeypatch.setattr(threads, "_median_seconds", lambda x, weight: next(times))
    times = iter(seconds)
    threads.choose_threads()
    assert set_to == [1, 2, 4, 6, 6, best]  # measured, put back, chosen


def test_what_somebody_has_said_stays(monkeypatch, set_to):
    threads.choose_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    threads.choose_threads()
    assert set_to == [3]


def test_a_measurement_takes_a_moment():
    assert threads.fastest_threads(1) == 1
