"""Times of calls on a device, taken in turn, and why a call failed."""

import time
from collections.abc import Callable, Mapping

import torch

from wfnet.services.log import logger

Call = Callable[[], object]


def timed(call: Call, device: torch.device) -> float:
    """Returns the milliseconds of one call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(device)  # another device may be the current one
        start.record(stream)
        call()
        end.record(stream)
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
