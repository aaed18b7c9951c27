"""Time, peak memory and kernels of a call on this machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType

from wfnet.services.peak_memory import peak_bytes

logger = logging.getLogger("wfnet")

Call = Callable[[], object]


def timed(call: Call, device: torch.device) -> float:
    """Returns the milliseconds of one call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def interleaved(
    calls: Mapping[str, Call],
    repeats: int,
    clock: Callable[[Call], float],
    at_most: Mapping[str, int] | None = None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times calls in turn, round after round, so that a drift of clock rates meets all alike.

    Args:
        repeats: timed rounds.
        at_most: fewer rounds for calls that take long, by name.

    Returns:
        The milliseconds of every call by name, and for those that raised the reason. One that
        raised is not called again, and costs no other its time.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    for repeat in range(repeats):
        for name, call in calls.items():
            if name in failed or repeat >= (at_most or {}).get(name, repeats):
                continue
            try:
                milliseconds[name].append(clock(call))
            except Exception as error:  # of compilers, drivers and our own code
                logger.info("%s failed", name, exc_info=True)
                failed[name] = reason_of(error)
    return milliseconds, failed


def reason_of(error: Exception) -> str:
    """Returns the first line of an error, after its class where that is no plain refusal."""
    reason = next(iter(str(error).strip().splitlines()), "")
    if reason and isinstance(error, ValueError | RuntimeError):
        return reason
    return f"{type(error).__name__}: {reason}"


def choose_convolutions_by_trial(device: torch.device) -> None:
    """Has cuDNN time its algorithms once for every shape, for the rest of the process.

    What everybody sets who measures convolutions, so that baselines are at their best;
    `wfnet.untrain` leaves it off, because a choice by time may differ from run to run, and with it
    the last bits.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True


# -- memory ----------------------------------------------------------------------------------------


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


# -- kernels ---------------------------------------------------------------------------------------

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
