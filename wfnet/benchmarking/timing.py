"""Time and memory of a step on this machine, and where a number comes from."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from wfnet.version import __version__

logger = logging.getLogger("wfnet")

Step = Callable[[], Tensor]  # one step; returns its loss


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one step, or of any call."""
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


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel within a step; copies and fills of memory are rows too."""

    name: str  # demangled, without namespaces and parameters
    launches: int
    microseconds: float
    share: float  # of the time of all rows


@dataclass(frozen=True)
class DeviceWork:
    """What a step has a CUDA device do.

    Attributes:
        launches: kernels that it starts, those of a graph's replay too.
        busy_microseconds: time in which anything runs on the device; kernels side by side count
            once. What a step takes beyond that, the device waits.
        kernels: by time, the longest first; its sum is larger than ``busy_microseconds`` where
            kernels run side by side.
    """

    launches: int
    busy_microseconds: float
    kernels: tuple[KernelTime, ...]

    def table(self, rows: int) -> list[KernelTime]:
        """The ``rows`` longest kernels, then the sum of all others, if there are more."""
        if len(self.kernels) <= rows:
            return list(self.kernels)
        others = self.kernels[rows:]
        total = KernelTime(
            f"{len(others)} others",
            sum(kernel.launches for kernel in others),
            sum(kernel.microseconds for kernel in others),
            sum(kernel.share for kernel in others),
        )
        return [*self.kernels[:rows], total]


def device_work(step: Step, device: torch.device) -> DeviceWork | None:
    """The kernels of one step on a CUDA device, and their time.

    None on a CPU, and where the profiler may not look at the device.
    """
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            step()
            torch.cuda.synchronize()
        events = profile.events()
    except (AssertionError, RuntimeError) as error:  # the step itself has run many times
        logger.info("kernels are not counted: %s", error)
        return None
    work = work_of(events)
    if not work.kernels:
        logger.info("kernels are not counted: the profiler saw none")
        return None
    return work


def work_of(events: Iterable[FunctionEvent]) -> DeviceWork:
    """Sums the profiler's events of one step by kernel."""
    spans: list[tuple[float, float]] = []
    found: dict[str, list[float]] = {}
    launches = 0
    for event in events:
        # Ranges that the program names are laid over the device's time line as well.
        if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        start, end = event.time_range.start, event.time_range.end
        spans.append((start, end))
        found.setdefault(short_kernel_name(event.name), []).append(end - start)
        launches += not event.name.startswith(("Memcpy", "Memset"))
    total = sum(map(sum, found.values()))
    rows = [
        KernelTime(name, len(times), sum(times), sum(times) / total if total else 0.0)
        for name, times in found.items()
    ]
    rows.sort(key=lambda row: (-row.microseconds, row.name))
    return DeviceWork(launches, _covered(spans), tuple(rows))


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    covered, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


_NAME_LENGTH = 120


def short_kernel_name(name: str) -> str:
    """A kernel's name, demangled, without namespaces, result and parameters; at most 120 letters.

    Template arguments stay: they tell kernels of one function apart.
    """
    if name.startswith("_Z"):
        name = torch._C._demangle(name)
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    if name.endswith(")") and not name.startswith(("Memcpy", "Memset")):
        depth = 0
        for place in range(len(name) - 1, 0, -1):
            depth += {")": 1, "(": -1}.get(name[place], 0)
            if depth == 0:
                name = name[:place]
                break
    name = " ".join(re.sub(r"\b\w+::", "", name).split())
    return name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 3]}..."


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


def settings_of(arguments: argparse.Namespace, *inner: str) -> dict[str, object]:
    """A command line's arguments as JSON takes them, without ``measured`` and ``inner`` ones."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in ("measured", *inner)
    }


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


def choose_convolutions_by_trial(device: torch.device) -> None:
    """Has cuDNN time its algorithms once for every shape, for the rest of the process.

    What everybody sets who measures convolutions, so that peers are at their best; `wfnet.untrain`
    leaves it off, because a choice by time may differ from run to run, and with it the last bits.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
