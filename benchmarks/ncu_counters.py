"""Hardware counters of kernels by Nsight Compute's command line, and what they say bounds a kernel.

Needs Python alone. `ncu` is asked for the counters of :data:`COUNTERS` in its CSV form; counters
that a device or version does not know are left out and reported as missing. Clocks are never
changed (``--clock-control none``): times of kernels under `ncu` are with cold caches, one kernel at
a time.

What bounds a kernel (:func:`bound_by`): of memory, second-level cache, shared memory and tensor
cores the one that comes closest to its peak rate, if it reaches :data:`BOUND` percent of it; else
latency, with the reason that warps wait for most. The percentages are those that the hardware
counts over the whole kernel, start and end included.
"""

from __future__ import annotations

import csv
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PLACES = ("/opt/nvidia/nsight-compute/*/ncu", "/usr/local/cuda*/bin/ncu")
BOUND = 60.0  # percent of a peak rate

_STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
# Warps that wait for each reason, per instruction that is issued. Those that were ready and not
# chosen are no reason to wait.
STALLS = (
    "long_scoreboard", "short_scoreboard", "wait", "barrier", "membar", "math_pipe_throttle",
    "mio_throttle", "lg_throttle", "tex_throttle", "branch_resolving", "dispatch_stall", "drain",
    "no_instruction", "imc_miss", "sleeping", "misc", "gmma",
)  # fmt: skip
# Our names, and those of compute capability 9.0. Percentages are of the peak rate; bytes, seconds.
COUNTERS = {
    "seconds": "gpu__time_duration.sum",
    "memory_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "memory_read_bytes": "dram__bytes_read.sum",
    "memory_write_bytes": "dram__bytes_write.sum",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    # wgmma counts here as mma does.
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "tensor_16_bit_percent":
        "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "wgmma_issue_percent": "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active",
    "shared_read_percent": "l1tex__data_bank_reads.avg.pct_of_peak_sustained_elapsed",
    "shared_write_percent": "l1tex__data_bank_writes.avg.pct_of_peak_sustained_elapsed",
    "shared_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "shared_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "registers_per_thread": "launch__registers_per_thread",
    "waves": "launch__waves_per_multiprocessor",
    **{f"stalled_{reason}": _STALLED.format(reason) for reason in STALLS},
}  # fmt: skip
_SIZES = {"Grid Size": "blocks", "Block Size": "threads_per_block"}  # columns of every report
_UNITS = {
    "s": 1.0, "second": 1.0, "ms": 1e-3, "msecond": 1e-3, "us": 1e-6, "usecond": 1e-6,
    "ns": 1e-9, "nsecond": 1e-9,
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12,
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One launch, with what `ncu` said of it by the names of :data:`COUNTERS`."""

    name: str
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """Counters that were not read."""
        return [name for name in COUNTERS if name not in self.counters]


class Refused(Exception):
    """There are no counters of calls; the message says why, in one sentence.

    Attributes:
        kernels: what was read all the same, and is of nobody knows which call.
    """

    def __init__(self, reason: str, kernels: Sequence[Kernel] = ()):
        super().__init__(reason)
        self.kernels = list(kernels)


def find_ncu(asked: str | None = None) -> str:
    """The program: ``asked``, on PATH, or where toolkits put it, the newest first.

    Raises:
        Refused: if it is nowhere.
    """
    if asked is not None:
        if shutil.which(asked) is None:
            raise Refused(f"{asked} is no program")
        return asked
    found = shutil.which("ncu")
    if found is not None:
        return found
    for pattern in PLACES:
        programs = Path("/").glob(pattern.removeprefix("/"))
        newest = max(programs, key=lambda path: _version(str(path)), default=None)
        if newest is not None:
            return str(newest)
    raise Refused("Nsight Compute (ncu) is not installed")


def _version(path: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path)]


def read_counters(
    ncu: str, program: Sequence[str], folder: Path, seconds: float = 150
) -> list[Kernel]:
    """Launches between cudaProfilerStart and cudaProfilerStop of ``program``, in their order.

    Args:
        folder: for what `ncu` and the program print.
        seconds: after which they are ended, all runs together.

    Raises:
        Refused: if no counters came.
    """
    asked = list(COUNTERS.values())
    end = time.monotonic() + seconds
    while True:
        report, output = folder / "ncu.csv", folder / "ncu.log"
        report.unlink(missing_ok=True)
        command = [
            ncu, "--clock-control", "none", "--profile-from-start", "off", "--target-processes",
            "application-only", "--csv", "--page", "raw", "--print-units", "base", "--metrics",
            ",".join(asked), "--log-file", str(report), *program,
        ]  # fmt: skip
        code = _run(command, output, end - time.monotonic())
        text = report.read_text(errors="replace") if report.exists() else ""
        kernels = parse(text)
        if kernels:
            return kernels
        said = f"{text}\n{output.read_text(errors='replace')}"
        unknown = unknown_counters(said, asked)
        asked = [name for name in asked if name not in unknown]
        if not unknown or not asked:
            raise Refused(why_not(said, code))


def _run(command: Sequence[str], output: Path, seconds: float) -> int | None:
    """Exit code of a command; None if it had to be ended, with all that it had started."""
    environment = {**os.environ, "LC_ALL": "C"}  # numbers with a decimal point
    with open(output, "wb") as file:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=environment,
            )  # fmt: skip
        except OSError as error:
            file.write(f"==ERROR== {command[0]}: {error.strerror}\n".encode())
            return None
        try:
            return process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            file.write(f"==ERROR== ended after {seconds:.0f} s\n".encode())
            return None
        finally:
            if process.poll() is None:
                for pid in [*_descendants(process.pid), process.pid]:
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()


def _descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that these have."""
    parent_of: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            parent_of[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, wanted = [], {pid}
    while wanted:
        wanted = {child for child, parent in parent_of.items() if parent in wanted}
        found += wanted
    return found


def parse(text: str) -> list[Kernel]:
    """Launches in `ncu`'s CSV, whichever of its two forms it has.

    One line per launch, under a line of names and one of units; or one per launch and counter.
    Lines before and after are of the tool and the program. Values that are no numbers are missing.
    """
    lines = text.splitlines()
    first = next((n for n, line in enumerate(lines) if line.startswith('"ID",')), None)
    if first is None:
        return []
    header, *rows = csv.reader(line for line in lines[first:] if line.startswith('"'))
    rows = [dict(zip(header, row, strict=False)) for row in rows if len(row) >= len(header)]
    names = {counter: name for name, counter in COUNTERS.items()}
    kernels: dict[str, Kernel] = {}
    units: dict[str, str] = {}
    for row in rows:
        if not row["ID"]:
            units = row
            continue
        kernel = kernels.setdefault(row["ID"], Kernel(row.get("Kernel Name", "")))
        for column, name in _SIZES.items():
            sizes = re.findall(r"\d+", row.get(column, ""))
            if sizes:
                kernel.counters[name] = float(math.prod(map(int, sizes)))
        found = {counter: (row[counter], units.get(counter, "")) for counter in names.keys() & row}
        if row.get("Metric Name") in names:
            found[row["Metric Name"]] = row.get("Metric Value", ""), row.get("Metric Unit", "")
        for counter, (value, unit) in found.items():
            number = _number(value, unit)
            if number is not None:
                kernel.counters[names[counter]] = number
    return list(kernels.values())


def _number(value: str, unit: str) -> float | None:
    """In seconds, bytes or whatever else it counts; thousands may be set apart by commas."""
    try:
        number = float(value.replace(",", ""))
    except ValueError:
        return None
    return number * _UNITS.get(unit.partition("/")[0], 1.0) if number == number else None


def unknown_counters(said: str, asked: Sequence[str]) -> set[str]:
    """Those that `ncu` says it does not know: it then profiles nothing."""
    complaints = [line for line in said.splitlines() if "Failed to find metric" in line]
    text = "\n".join(complaints).replace("\\", "")
    # A name without a suffix comes back as an expression that allows any.
    end = r"(?!\w|\.\w)"
    return {name for name in asked if re.search(rf"(?<![\w.]){re.escape(name)}{end}", text)}


def why_not(said: str, code: int | None) -> str:
    """One sentence: the first error that `ncu` names, else its first warning, else its end."""
    for kind in ("==ERROR==", "==WARNING=="):
        for line in said.splitlines():
            if line.startswith(kind):
                return f"ncu: {' '.join(line.removeprefix(kind).split())}"
    return f"ncu ended with status {code} and no counters"


# -- what bounds a kernel --------------------------------------------------------------------------

PEAKS = {
    "memory": ("memory_percent",),
    "L2": ("l2_percent",),
    "shared memory": ("shared_read_percent", "shared_write_percent"),
    "tensor cores": ("tensor_percent", "tensor_16_bit_percent"),
}


def bound_by(counters: dict[str, float]) -> tuple[str, str]:
    """What bounds a kernel, and why: ``memory``, ``L2``, ``shared memory``, ``tensor cores``,
    ``latency``, or ``unknown`` where none of these was counted.
    """
    found = {
        what: max(counters[name] for name in names if name in counters)
        for what, names in PEAKS.items()
        if any(name in counters for name in names)
    }
    if not found:
        return "unknown", "no utilisation was counted"
    shown = ", ".join(f"{what} {percent:.0f}%" for what, percent in found.items())
    most = max(found, key=found.__getitem__)
    if found[most] >= BOUND:
        return most, f"of their peak rates: {shown}"
    stalls = {reason: counters.get(f"stalled_{reason}", 0.0) for reason in STALLS}
    reason = max(stalls, key=stalls.__getitem__)
    waits = f"; warps wait most for {reason} ({stalls[reason]:.1f} per issued instruction)"
    return "latency", f"of their peak rates: {shown}{waits if stalls[reason] else ''}"


def bound_by_floor(milliseconds: float, of_products: float, of_bytes: float) -> tuple[str, str]:
    """The same without counters, from a call's time and its two floors in milliseconds.

    Only a call that comes as close to its floor as :data:`BOUND` says is told to be bound by what
    the floor is made of: a slower one may wait for anything.
    """
    floor = max(of_products, of_bytes)
    share = 100 * floor / milliseconds
    made_of = "products" if of_products >= of_bytes else "bytes"
    why = f"without counters: its floor, of {made_of}, is {share:.0f}% of its time"
    if share < BOUND:
        return "unknown", why
    return ("tensor cores" if made_of == "products" else "memory"), why
