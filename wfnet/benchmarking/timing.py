"""Time, peak memory and kernels of a call on this machine."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType

from wfnet.services.clock import Call
from wfnet.services.peak_memory import peak_bytes

logger = logging.getLogger("wfnet")


def peak_mebibytes(call: Call, device: torch.device) -> float:
    """Returns the most tensor memory that one call adds to what is allocated before it."""
    return peak_bytes(call, device) / 2**20


def graph_pool_mebibytes(device: torch.device) -> float:
    """Returns the memory that all CUDA graphs of the process keep: a replay allocates nothing."""
    if device.type != "cuda":
        return 0.0
    pools = (
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
    )
    return sum(pools) / 2**20


_NAME_LENGTH = 120


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel within a step; copies and fills of memory are rows too."""

    name: str  # cut after 120 letters
    launches: int
    microseconds: float


def kernels_of(call: Call, device: torch.device) -> list[KernelTime] | None:
    """Returns the kernels that one call starts, those of a graph's replay too, the longest first.

    None on a CPU, or where the profiler sees no kernel.
    """
    if device.type != "cuda":
        return None
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        events = profile.key_averages()
    except (AssertionError, RuntimeError) as error:  # the call itself has run many times
        logger.info("kernels are not counted: %s", error)
        return None
    found = [
        KernelTime(event.key[:_NAME_LENGTH], event.count, event.self_device_time_total)
        for event in events
        # Ranges that the program names are laid over the device's time line as well.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return sorted(found, key=lambda kernel: -kernel.microseconds) or None
