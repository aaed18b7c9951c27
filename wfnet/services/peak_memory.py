"""The most memory of tensors that a piece of work takes."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import torch


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that were allocated at a time during ``work()``, beyond those at its start.

    On a CUDA device by the allocator's count; elsewhere from PyTorch's profiler. Scratch memory
    that libraries take without PyTorch (oneDNN's weights in its own layout, for example) is not
    seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _silent_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        work()
    now = peak = 0
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda item: item[0]):
        now += change
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Nothing reaches the descriptor of stderr inside: PyTorch's profiler writes to it directly."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
