"""How fast images come, beside how fast the network takes them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import TypeVar

logger = logging.getLogger("wfnet")

Item = TypeVar("Item")
# Share of the time spent waiting for images from which on the log says so.
_STARVED = 0.2
_WORTH_SAYING = 5.0  # seconds of waiting


class Throughput:
    """Images that arrived and seconds that were spent waiting for them, since the last record.

    A device works on while the host waits, so on a device the share of waiting is what the data
    cost as soon as the device's queue has run dry: steps are looked at every few of them.
    """

    def __init__(self):
        self.told = False
        self._clear()

    def _clear(self) -> None:
        self.images = 0
        self.waited = 0.0
        self.since = time.perf_counter()

    def timed(self, stream: Iterator[Item]) -> Iterator[Item]:
        """The items of ``stream``; the time that each took to come is counted as waiting."""
        while True:
            asked = time.perf_counter()
            try:
                item = next(stream)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - asked
            yield item

    def restart(self) -> None:
        """Leaves out what was no training (a validation, a checkpoint) since the last record."""
        self._clear()

    def record(self) -> dict[str, float]:
        """``images_per_second`` that came, ``data_wait`` (share of the time, 0 to 1); starts anew.

        Says once in the log when the data starve the network.
        """
        seconds = max(time.perf_counter() - self.since, 1e-9)
        share = min(1.0, self.waited / seconds)
        rate = self.images / seconds
        starved = share >= _STARVED and self.waited >= _WORTH_SAYING
        if starved and self.images and not self.told:
            self.told = True
            logger.warning(
                "the data starve the network: %s images/s come, it could take %s (%.0f%% of the "
                "time is spent waiting); more --workers, or --cache, keeps it busy",
                f"{rate:,.0f}", f"{rate / max(1 - share, 1e-3):,.0f}", 100 * share,
            )  # fmt: skip
        self._clear()
        return {"images_per_second": rate, "data_wait": share}
