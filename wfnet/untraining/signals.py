"""Stopping a long run: a signal asks for it, the run answers at its next step boundary.

Batch systems end a job with SIGTERM (and SIGKILL some seconds later), people with Ctrl-C. The first
signal lets the step in progress end, a checkpoint is written, and the process leaves with status
128 + signal, as shells and torchrun expect. A second signal ends it at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from wfnet.services.log import logger

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A run that ended at a step boundary because a signal asked for it.

    A ``KeyboardInterrupt``, so that no ``except Exception`` takes it for a failure.

    Attributes:
        signal: number of the signal; the exit status is ``128 + signal``.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = number


class StopSignals:
    """Remembers the first SIGTERM or SIGINT while it is entered; lets the second one kill.

    Elsewhere than in the main thread of a process, and when not ``enabled``, this does nothing.

    Attributes:
        received: number of the signal that came, or 0.
    """

    def __init__(self, enabled: bool = True):
        self.numbers = SIGNALS if enabled else ()
        self.received = 0
        self._process = os.getpid()
        self._inside = contextlib.ExitStack()

    def __enter__(self) -> "StopSignals":
        for number in self.numbers:
            self._inside.enter_context(_handled(number, self._receive))
        return self

    def __exit__(self, *exception: object) -> None:
        self._inside.close()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker: its parent tells it when to leave
            return
        self.received = number
        self._inside.close()  # the next one does what it did before
        logger.warning(
            "%s: a checkpoint is written after this step; once more ends the run at once",
            signal.Signals(number).name,
        )


def lost_workers_wait() -> contextlib.AbstractContextManager[None]:
    """Inside, a data worker that dies is noticed when the next batch is asked for.

    PyTorch's handler of SIGCHLD raises wherever the main thread happens to be, for example between
    the update of the moments and that of the filters. A reader that waits looks for dead workers
    every few seconds anyway.
    """
    return _handled(signal.SIGCHLD, signal.SIG_DFL)


@contextlib.contextmanager
def _handled(number: int, handler: Any) -> Iterator[None]:
    """Another handler of a signal inside; in other threads than the main one, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        # None: a handler that was not set from Python and cannot be put back.
        signal.signal(number, signal.SIG_DFL if before is None else before)
