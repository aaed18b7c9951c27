"""How many CPU threads compute: as many as measure fastest where nobody has said a number."""

import os
import statistics
import time

import torch
from torch.nn import functional as F

_SAID_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_MOST = 64
_CALLS = 3
_GAIN = 0.9  # more threads must take less than this part of the time of fewer


def choose_threads(given: int | None = None) -> None:
    """Sets PyTorch's CPU threads: to ``given``, or to what computes fastest at the moment.

    Threads that share a core spin at their barriers: on a busy machine two are many times slower
    than one. Nothing changes where ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS`` is set.
    """
    if given is not None:
        torch.set_num_threads(given)
    elif not any(os.environ.get(name) for name in _SAID_BY):
        torch.set_num_threads(fastest_threads(min(_MOST, torch.get_num_threads())))


def fastest_threads(most: int) -> int:
    """Returns which of 1, 2, 4 ... ``most`` threads run a small convolution fastest.

    Takes some hundredths of a second for each. The present number is set again afterwards.
    """
    before, best, fastest = torch.get_num_threads(), 1, float("inf")
    x, weight = torch.ones(16, 48, 16, 16), torch.ones(64, 48, 3, 3)
    counts = [1 << n for n in range(most.bit_length()) if 1 << n < most] + [most]
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            seconds = _median_seconds(x, weight)
            if seconds < _GAIN * fastest:
                best, fastest = threads, seconds
    finally:
        torch.set_num_threads(before)
    return best


def _median_seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    found = []
    with torch.inference_mode():
        F.conv2d(x, weight, padding=1)  # threads are started, kernels chosen
        for _ in range(_CALLS):
            started = time.perf_counter()
            F.conv2d(x, weight, padding=1)
            found.append(time.perf_counter() - started)
    return statistics.median(found)
