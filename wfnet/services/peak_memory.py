"""The most memory of tensors that a piece of work takes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from wfnet.services.quiet import silent_stderr


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
        silent_stderr(),
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
