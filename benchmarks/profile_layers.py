"""The slowest masked layers of a network's fused step, with the hardware's counters.

    python benchmarks/profile_layers.py --model resnet50 --columns wfnet/cuda/fused
    python benchmarks/profile_layers.py --model vit_small_patch16_224 --columns wfnet/triton/fused

A fused step runs forward and backward over the expanded minibatch, and every call of the backend
for a masked layer is timed in it (CUDA events, medians): its forward pass with what backward needs
kept, and its input gradient with the layer below finished. Layers that are computed alike are one
row; those that take longest in a step are profiled: the same step once more under `ncu` (Nsight
Compute), which reads the counters of these calls alone.

Beside every call stand its counted products and bytes, and the longer of both at the rates that
this device was measured to have in this run: its floor. What bounds a kernel is what
`ncu_counters.bound_by` says; a call is bound by what bounds the kernel that takes most of it.
Where there is no `ncu`, or it may not read counters, timings and floors stand alone, the record
says why, and `ncu_counters.bound_by_floor` says what little can be said.

Clocks are left as they are. JSON is written after every part. A column that fails costs no other
column, but what takes down the process does: device_run.py gives each a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import ncu_counters
import torch
from ncu_counters import Kernel, Refused

from wfnet import backends
from wfnet.benchmarking import floors
from wfnet.benchmarking.layer_calls import DIRECTIONS, Call, Group, LayerRun, Measured
from wfnet.benchmarking.steps import StepSettings, make_problem
from wfnet.benchmarking.timing import about, device_name, settings_of, short_kernel_name
from wfnet.cli.classifier import create_classifier
from wfnet.services.files import write_json

COLUMNS = tuple(f"wfnet/{name}/fused" for name in backends.KERNELS)
# Starts the calls of one layer and direction among the launches that `ncu` sees; nothing else in a
# step spins.
_MARK = "spin_kernel"


# -- times -----------------------------------------------------------------------------------------


def layer_row(group: Group, rates: floors.Rates) -> dict:
    """JSON of layers that are computed alike: one call of each direction, and all of a step."""
    row: dict[str, object] = {"layers": group.layers, "step_ms": group.milliseconds}
    for direction in DIRECTIONS:
        measured = getattr(group, direction)
        row[direction] = None if measured is None else call_row(measured, rates)
    return row


def call_row(measured: Measured, rates: floors.Rates) -> dict:
    """JSON of one call: milliseconds, work, floor."""
    work, median = measured.work, measured.median
    floor = rates.seconds(work.flops, work.size) * 1e3
    return {
        "median_ms": median,
        "least_ms": min(measured.milliseconds),
        "largest_ms": max(measured.milliseconds),
        "flops": work.flops,
        "bytes": work.size,
        "floor_ms": floor,
        "share_of_floor": floor / median,
        "tflops": work.flops / median / 1e9,
        "gbs": work.size / median / 1e6,
    }


def print_layers(column: str, rows: Sequence[dict]) -> None:
    total = sum(row["step_ms"] for row in rows)
    print(f"\n{column}: {total:.3f} ms of a step in {sum(len(r['layers']) for r in rows)} layers")
    print(f"{'ms of step':>10} {'times':>5} {'forward':>9} {'of floor':>8} {'backward':>9} "
          f"{'of floor':>8}  layer")  # fmt: skip
    for row in rows:
        cells = ""
        for direction in DIRECTIONS:
            call = row[direction]
            cells += " " * 19 if call is None else (
                f" {call['median_ms']:9.3f} {call['share_of_floor']:8.0%}"
            )  # fmt: skip
        print(f"{row['step_ms']:10.3f} {len(row['layers']):5}{cells}  {row['layers'][0]}")


# -- counters --------------------------------------------------------------------------------------


def profiled_step(run: LayerRun, layers: Sequence[str], cuda: bool) -> list[Call]:
    """A step of which the profiler sees the calls of ``layers`` alone, each after a mark.

    Returns:
        The calls, in the order in which they ran.
    """
    calls: list[Call] = []

    def seen(call: Call, method: str, arguments: dict, compute: Callable) -> object:
        if call.layer not in layers:
            return compute()
        calls.append(call)
        if not cuda:
            return compute()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
        result = compute()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        return result

    run.watch(seen)
    return calls


def kernels_of(calls: Sequence[Call], kernels: Sequence[Kernel]) -> dict[Call, list[Kernel]]:
    """The launches of each call: those behind its mark.

    Raises:
        Refused: if there are not as many marks as calls, so that nobody knows whose is whose.
    """
    parts: list[list[Kernel]] = []
    for kernel in kernels:
        if _MARK in kernel.name:
            parts.append([])
        elif parts:
            parts[-1].append(kernel)
    if len(parts) != len(calls):
        raise Refused(f"ncu saw {len(parts)} calls where {len(calls)} were made", kernels)
    return dict(zip(calls, parts, strict=True))


def counters_of(
    arguments: argparse.Namespace, column: str, layers: Sequence[str]
) -> dict[Call, list[Kernel]]:
    """What `ncu` counts in one more step, in a process of its own.

    Raises:
        Refused: with the reason if there are no counters.
    """
    if arguments.ncu is None and not arguments.measured.device.startswith("cuda"):
        raise Refused("counters are those of a CUDA device")
    ncu = ncu_counters.find_ncu(arguments.ncu)
    with tempfile.TemporaryDirectory() as folder:
        calls = Path(folder) / "calls.json"
        program = [sys.executable, __file__, *_same_problem(arguments), "--columns", column,
                   "--layers", *layers, "--calls", str(calls)]  # fmt: skip
        kernels = ncu_counters.read_counters(ncu, program, Path(folder), arguments.ncu_seconds)
        try:
            made = [Call(**call) for call in json.loads(calls.read_text())]
        except (OSError, ValueError):
            raise Refused("the profiled step did not end", kernels) from None
    return kernels_of(made, kernels)


def _same_problem(arguments: argparse.Namespace) -> list[str]:
    """Options of the command line that make the same network and minibatch."""
    measured = arguments.measured
    return [
        "--model", arguments.model, "--image-size", str(measured.image_size), "-b",
        str(measured.batch_size), "-M", str(measured.label_expansion), "--classes",
        str(measured.classes), "--device", measured.device, "--dtype", arguments.dtype, "--seed",
        str(measured.seed),
    ]  # fmt: skip


def profile_row(call: Call, row: dict, kernels: Sequence[Kernel], rates: floors.Rates) -> dict:
    """JSON of a call's kernels and of what bounds it.

    Args:
        row: from :func:`call_row`.
        kernels: empty where there are no counters.
    """
    if not kernels:
        of_products, of_bytes = row["flops"] / rates.flops, row["bytes"] / rates.bandwidth
        bound, why = ncu_counters.bound_by_floor(
            row["median_ms"], of_products * 1e3, of_bytes * 1e3
        )
        return {**asdict(call), "kernels": [], "bound_by": bound, "why": why}
    found = [kernel_row(kernel) for kernel in kernels]
    longest = max(found, key=lambda one: one["counters"].get("seconds", 0.0))
    return {
        **asdict(call),
        "kernels": found,
        "bound_by": longest["bound_by"],
        "why": f"{longest['name']}, {longest['why']}",
    }


def kernel_row(kernel: Kernel) -> dict:
    """JSON of one launch."""
    bound, why = ncu_counters.bound_by(kernel.counters)
    return {
        "name": short_kernel_name(kernel.name),
        "counters": kernel.counters,
        "missing": kernel.missing,
        "bound_by": bound,
        "why": why,
    }


def print_profile(rows: Sequence[dict]) -> None:
    for row in rows:
        print(f"{row['layer']}, {row['direction']}: {row['bound_by']} ({row['why']})")
        for kernel in row["kernels"]:
            counters = kernel["counters"]
            shown = ", ".join(
                f"{name} {counters[name]:,.6g}"
                for name in ("seconds", "memory_read_bytes", "memory_write_bytes", "l2_hit_percent",
                             "shared_conflicts", "occupancy_percent", "registers_per_thread")
                if name in counters
            )  # fmt: skip
            print(f"    {kernel['name']}: {shown}")
            if kernel["missing"]:
                print(f"    not read: {', '.join(kernel['missing'])}")


# -- command line ----------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", default="resnet50",
                        help="timm name, torchvision/NAME, small/NAME")  # fmt: skip
    parser.add_argument("--columns", nargs="+", choices=COLUMNS,
                        default=[c for c in COLUMNS if cuda == ("eager" not in c)])  # fmt: skip
    parser.add_argument("--image-size", type=int, default=224 if cuda else 32)
    parser.add_argument("-b", "--batch-size", type=int, default=256 if cuda else 8,
                        help="images n of a minibatch")  # fmt: skip
    parser.add_argument("-M", "--label-expansion", type=int, default=3)
    parser.add_argument("--classes", type=int, default=1000 if cuda else 10)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32",
                        choices=["float32", "bfloat16", "float16"])  # fmt: skip
    parser.add_argument("--repeats", type=int, default=10 if cuda else 3, help="timed steps")
    parser.add_argument("--slowest", type=int, default=3, metavar="N", help="layers to profile")
    parser.add_argument("--ncu", metavar="PROGRAM", help="default: where toolkits put it")
    parser.add_argument("--ncu-seconds", type=float, default=150, metavar="SECONDS",
                        help="after which a column's profile is given up")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file")
    inner = parser.add_argument_group("the step that this script has ncu look at")
    inner.add_argument("--layers", nargs="+", help="whose calls are profiled, in one step")
    inner.add_argument("--calls", type=Path, help="JSON file for these calls, in their order")
    arguments = parser.parse_args(argv)
    if (arguments.layers is None) != (arguments.calls is None):
        parser.error("--layers and --calls come together")
    if arguments.calls and len(arguments.columns) != 1:
        parser.error("--calls takes one of --columns")
    if arguments.slowest < 1:
        parser.error(f"--slowest must be at least 1, got {arguments.slowest}")
    names = ("image_size", "batch_size", "label_expansion", "classes", "device", "repeats", "seed")
    try:
        arguments.measured = StepSettings(
            **{name: getattr(arguments, name) for name in names}, share_images=False,
            dtype=getattr(torch, arguments.dtype),
        )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    return arguments


@contextlib.contextmanager
def layer_run(arguments: argparse.Namespace, column: str) -> Iterator[LayerRun]:
    """The network of a column and its minibatch, ready to run."""
    with contextlib.ExitStack() as stack:
        model = create_classifier(
            arguments.model, arguments.classes, in_channels=3, image_size=arguments.image_size,
            seed=arguments.seed,
        )  # fmt: skip
        yield LayerRun(make_problem(model, arguments.measured, stack), column.split("/")[1])


def look_at_one_step(arguments: argparse.Namespace) -> None:
    """What runs under `ncu`: a step to warm up, then one of which it sees the chosen calls."""
    with layer_run(arguments, arguments.columns[0]) as run:
        run.step()
        cuda = run.problem.device.type == "cuda"
        calls = profiled_step(run, arguments.layers, cuda)
    write_json(arguments.calls, [asdict(call) for call in calls])


def timed_layers(arguments: argparse.Namespace, column: str) -> list[Group]:
    """What a column's layers take; nothing of the network is held afterwards."""
    with layer_run(arguments, column) as run:
        return run.measure(arguments.repeats)


def measure(
    arguments: argparse.Namespace, column: str, rates: floors.Rates, keep: Callable[[], None],
    into: dict,
) -> None:  # fmt: skip
    """Fills ``into`` with times, then counters; ``keep`` writes what there is."""
    rows = [layer_row(group, rates) for group in timed_layers(arguments, column)]
    into["layers"] = rows
    print_layers(column, rows)
    keep()
    slowest = rows[: arguments.slowest]
    if arguments.measured.device.startswith("cuda"):
        torch.cuda.empty_cache()  # the profiled process wants the same memory
    into["counters"], found = "read", {}
    try:
        found = counters_of(arguments, column, [row["layers"][0] for row in slowest])
    except Refused as reason:
        into["counters"] = str(reason)
        if reason.kernels:
            into["of_unknown_calls"] = [kernel_row(kernel) for kernel in reason.kernels]
        print(f"no counters: {reason}")
    into["profiled"] = [
        profile_row(call, row[direction], found.get(call, []), rates)
        for row in slowest
        for direction in DIRECTIONS
        if row[direction] is not None
        for call in [Call(row["layers"][0], direction)]
    ]
    print_profile(into["profiled"])
    keep()


def main(argv: list[str] | None = None) -> dict | None:
    arguments = parse(argv)
    if arguments.calls:
        look_at_one_step(arguments)
        return None
    device, dtype = torch.device(arguments.device), arguments.measured.dtype
    rates = floors.measure_rates(device, dtype)
    print(f"{device_name(device)}: {rates.flops / 1e9:,.0f} GFLOP/s ({arguments.dtype} product), "
          f"{rates.bandwidth / 1e9:,.1f} GB/s (copy); {arguments.model}")  # fmt: skip
    record = {
        "benchmark": "layers",
        "settings": settings_of(arguments, "layers", "calls"),
        **about(device, ["benchmarks/profile_layers.py", *(argv or sys.argv[1:])]),
        "rates": {"flops_per_second": rates.flops, "bytes_per_second": rates.bandwidth},
        "columns": {},
    }

    def keep() -> None:
        if arguments.output:
            write_json(arguments.output, record)

    for column in arguments.columns:
        into = record["columns"][column] = {}
        try:
            measure(arguments, column, rates, keep, into)
        except Exception as error:  # of compilers, drivers and our own code
            traceback.print_exc()
            reason = next(iter(str(error).strip().splitlines()), "")
            into["failed"] = f"{type(error).__name__}: {reason}"
            keep()
    return record


if __name__ == "__main__":
    made = main()
    failed = {} if made is None else {
        name: column["failed"] for name, column in made["columns"].items() if "failed" in column
    }  # fmt: skip
    if failed:
        sys.exit("\n".join(f"{name}: {reason}" for name, reason in failed.items()))
