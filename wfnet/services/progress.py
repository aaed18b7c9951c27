"""Progress of long loops on stderr: a bar on a terminal, now and then a line in a log."""

import sys
from typing import TextIO

from tqdm import tqdm

_BAR_SECONDS = 0.2
_LOG_SECONDS = 30.0
_LOG_LINE = (
    "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
)


class Progress(tqdm):
    """A tqdm bar on a terminal; in a log file the same text as a line now and then.

    Use it as a context manager, or close it. ``update(n)`` counts, ``set_postfix(loss=...)`` adds
    values to the text.

    Args:
        total: number of steps.
        title: what is being done, at the start of the text.
        wanted: False shows nothing.
        done: steps that are done already; they do not count for the rate.
        unit: name of a step.
        leave: keep the last state on the screen, and put the first and the last one into a log.
        log_seconds: least time between two lines in a log.
    """

    # tqdm's thread that watches for bars that are late: it does not survive a fork.
    monitor_interval = 0

    def __init__(
        self,
        total: int,
        title: str,
        wanted: bool = True,
        *,
        done: int = 0,
        unit: str = "it",
        leave: bool = False,
        log_seconds: float = _LOG_SECONDS,
    ):
        live = sys.stderr.isatty()
        seconds = _BAR_SECONDS if live else log_seconds
        super().__init__(
            total=total,
            initial=done,
            desc=title,
            unit=unit,
            leave=leave,
            disable=not wanted,
            file=sys.stderr if live else _LogLines(sys.stderr),
            bar_format=None if live else _LOG_LINE,
            mininterval=seconds,
            miniters=1,  # look at the clock at every step: their durations differ
            delay=0 if leave else seconds,
        )

    def set_postfix(self, **values: object) -> None:
        """Shows ``values`` behind the count from the next refresh on."""
        super().set_postfix(refresh=False, **values)


class _LogLines:
    """A text stream for tqdm: what it would overwrite in place becomes lines."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()
