"""Where the time of a run goes, and how fast images come beside how fast the network takes them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import TypeVar

import torch

logger = logging.getLogger("wfnet")

Item = TypeVar("Item")
# Share of the time spent waiting for images from which on the log says so.
_STARVED = 0.2
_WORTH_SAYING = 5.0  # seconds of waiting


class Throughput:
    """Images that arrived and seconds that were spent waiting for them, since the last record.

    A CUDA device works on while the host waits, and the host may run ahead of it. There, time
    counts as spent waiting only as far as the device had nothing to do: from the end of what it
    was asked to do to the beginning of the next step, by events in its own stream.

    Args:
        device: of the network.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.on_device = torch.device(device).type == "cuda"
        self.told = False
        self.total = 0.0  # seconds of waiting in all records
        self._clear()

    def _clear(self) -> None:
        self.images = 0
        self.waited = 0.0
        self.since = time.perf_counter()
        # End of the work before, beginning of the step, seconds that the host waited in between.
        self.pauses: list[tuple[torch.cuda.Event, torch.cuda.Event, float]] = []

    def timed(self, stream: Iterator[Item]) -> Iterator[Item]:
        """The items of ``stream``; the time that each took to come is counted as waiting."""
        while True:
            before, asked = self._event(), time.perf_counter()
            try:
                item = next(stream)
            except StopIteration:
                return
            finally:
                waited = time.perf_counter() - asked
                if before is None:
                    self.waited += waited
            if before is not None:
                self.pauses.append((before, self._event(), waited))
            yield item

    def _event(self) -> torch.cuda.Event | None:
        """An event in the device's current stream, now; None on the host."""
        if not self.on_device:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def look(self) -> None:
        """Reads the events so far; call it where the device has been waited for."""
        while self.pauses and self.pauses[0][1].query():
            before, begun, waited = self.pauses.pop(0)
            self.waited += min(waited, before.elapsed_time(begun) / 1e3)

    def restart(self) -> None:
        """Leaves out what was no training (a validation, a checkpoint) since the last record."""
        self._clear()

    def record(self) -> dict[str, float]:
        """``images_per_second`` that came, ``data_wait`` (share of the time, 0 to 1); starts anew.

        Says once in the log when the data starve the network.
        """
        self.look()
        seconds = max(time.perf_counter() - self.since, 1e-9)
        share = min(1.0, self.waited / seconds)
        rate = self.images / seconds
        starved = share >= _STARVED and self.waited >= _WORTH_SAYING
        if starved and self.images and not self.told:
            self.told = True
            possible = rate / max(1 - share, 1e-3)
            logger.warning(
                f"the data starve the network: {rate:,.0f} images/s come, it could take "
                f"{possible:,.0f} ({share:.0%} of the time is spent waiting); more --workers, or "
                "--cache, keeps it busy"
            )
        self.total += self.waited
        self._clear()
        return {"images_per_second": rate, "data_wait": share}


class RunClock:
    """Seconds of a run by what they were spent on, all sessions together.

    Args:
        device: of the network.
        spent: of the sessions before.
        seconds: duration of the sessions before.

    Attributes:
        throughput: counts the waiting for images.
    """

    def __init__(
        self, device: torch.device | str, spent: dict[str, float] | None = None, seconds: float = 0
    ):
        self.throughput = Throughput(device)
        self._spent = dict.fromkeys(("start", "data", "validation", "checkpoints"), 0.0)
        self._spent |= {k: v for k, v in (spent or {}).items() if k in self._spent}
        self._began = time.perf_counter()
        self._before = seconds
        self._counted_before = self._counted()

    @property
    def seconds(self) -> float:
        """Duration of the run so far."""
        return self._before + time.perf_counter() - self._began

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Counts the time inside as spent on ``what``: "validation" or "checkpoints"."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent[what] += time.perf_counter() - started

    def started(self) -> None:
        """Counts this session's time so far as start, unless it was spent on something else."""
        others = self._counted() - self._counted_before
        self._spent["start"] += time.perf_counter() - self._began - others
        self.throughput.restart()

    def _counted(self) -> float:
        return self._spent["validation"] + self._spent["checkpoints"] + self.throughput.total

    def spent(self, seconds: float) -> dict[str, float]:
        """Returns seconds by purpose, which add up to ``seconds``; the rest were steps."""
        waited = self.throughput.total + self.throughput.waited
        spent = {**self._spent, "data": self._spent["data"] + waited}
        return spent | {"steps": max(0.0, seconds - sum(spent.values()))}
