"""Time and memory of a step on this machine, and where a number comes from."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from wfnet.version import __version__

logger = logging.getLogger("wfnet")

Step = Callable[[], Tensor]  # one step; returns its loss


def timed(step: Step, device: torch.device) -> float:
    """Milliseconds of one step."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def peak_mebibytes(step: Step, device: torch.device) -> float:
    """Largest amount of tensor memory that one step adds to what is allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _silent_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        step()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    now = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        now += change
        peak = max(peak, now)
    return peak / 2**20


def graph_pool_mebibytes(device: torch.device) -> float:
    """Memory that all CUDA graphs of the process keep: a replay allocates nothing; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    segments = torch.cuda.memory_snapshot()
    return (
        sum(s["total_size"] for s in segments if tuple(s.get("segment_pool_id", (0, 0))) != (0, 0))
        / 2**20
    )


def kernel_launches(step: Step, device: torch.device) -> int | None:
    """Kernels that a step starts on a CUDA device, those of a graph's replay too.

    None on a CPU, and where the profiler may not look at the device.
    """
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            step()
            torch.cuda.synchronize()
    except (AssertionError, RuntimeError) as error:  # the step itself has run many times
        logger.info("kernels are not counted: %s", error)
        return None
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len([e for e in kernels if not e.name.startswith(("Memcpy", "Memset"))])


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's library writes about itself to the descriptor, past `sys.stderr`."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def commit() -> str:
    """The checkout's commit, "+changes" if files differ from it.

    WFNET_COMMIT names it where files were copied without their repository; else "unknown" there.
    """
    told = os.environ.get("WFNET_COMMIT")
    if told:
        return told
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return (head.stdout.strip() or "unknown") + ("+changes" if dirty.stdout.strip() else "")


def device_name(device: torch.device) -> str:
    """The device as people call it; of a CPU, the threads too."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor()}, {torch.get_num_threads()} threads"


def _nvidia_smi(device: torch.device, query: str) -> str:
    """What the driver's tool answers to ``--query-gpu=query``; "unknown" if it does not."""
    try:
        found = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader",
             f"--id={device.index or 0}"],
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


def clocks(device: torch.device) -> str:
    """Clock rates at this moment: a GPU's as its driver tells them, the mean over a CPU's cores."""
    if device.type == "cuda":
        return _nvidia_smi(device, "clocks.sm,clocks.mem,power.limit")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    rates = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return f"{sum(rates) / len(rates):.0f} MHz" if rates else "unknown"


def about(device: torch.device | str, command: Sequence[str]) -> dict[str, str | None]:
    """What belongs beside every number: device, driver, clocks, versions, commit, command, date.

    Args:
        command: script and arguments, as they were typed.
    """
    device = torch.device(device)
    found: dict[str, str | None] = {
        "device": device_name(device),
        "clocks": clocks(device),
        "python": platform.python_version(),
        "driver": _nvidia_smi(device, "driver_version") if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }
    for package in ("torch", "triton", "timm", "torchvision", "numpy", "scikit-learn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {
        "wfnet": __version__,
        "commit": commit(),
        "command": " ".join(["python", *command]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
