"""Where the time of a run goes."""

import contextlib
import time
from collections.abc import Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")


class RunClock:
    """Seconds of a run by what they were spent on, all sessions together.

    A CUDA device works on while the host waits, and the host may run ahead of it. There, a wait for
    images counts only if the device has nothing left to do at its end.

    Args:
        device: of the network.
        seconds: duration of the sessions before.
        spent: of these.
    """

    def __init__(
        self, device: torch.device, seconds: float = 0.0, spent: dict[str, float] | None = None
    ):
        self.device = device
        purposes = ("start", "features", "data", "steps", "validation", "checkpoints")
        self._spent = dict.fromkeys(purposes, 0.0) | (spent or {})
        self._began = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Duration of the run so far."""
        return time.perf_counter() - self._began

    def spent(self, seconds: float) -> dict[str, float]:
        """Returns seconds by purpose, which add up to ``seconds``; the rest were steps."""
        rest = max(0.0, seconds - sum(self._spent.values()))
        return self._spent | {"steps": self._spent["steps"] + rest}

    def started(self) -> None:
        """Counts this session's time so far as start, unless it was spent on something else."""
        self._spent["start"] += self.seconds - sum(self._spent.values())

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Counts the time inside as spent on ``what``, "validation" for example."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent[what] += time.perf_counter() - started

    def waits(self, stream: Iterator[Item]) -> Iterator[Item]:
        """The items of ``stream``; the time that each took to come is counted as waiting."""
        while True:
            asked = time.perf_counter()
            try:
                item = next(stream)
            except StopIteration:
                return
            if self.device.type != "cuda" or torch.cuda.current_stream(self.device).query():
                self._spent["data"] += time.perf_counter() - asked
            yield item
