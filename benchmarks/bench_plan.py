"""Every convolution of a network's fused step by every backend: where time goes, who is fastest.

    python benchmarks/bench_plan.py --models resnet18 resnet50 --output runs/plan.json
    python benchmarks/bench_plan.py --models wide_resnet50_2 --winners my_winners.json
    python benchmarks/bench_plan.py --record runs/plan.json --winners wfnet/backends/winners.json

One untraining step runs with all candidates at every convolution, forward (with all that follows)
and input gradient (with the elementwise backward of the layer below): the same tensors, results
compared, interleaved, medians. Operations of one shape and epilogue are measured once. On a CUDA
device the second-level cache is flushed before each call.

`eager` is cuDNN's convolution with passes of PyTorch; beside kernels it is timed with the passes
that make its branch theirs, and without them (`eager alone` in the sums: a plan of its own). The
floor is the longer of products and bytes at the rates that this device was measured to have in
this run. Operations are listed by what they lose to the floor in a whole step; in front of them
stand the sums, for each backend alone and for the fastest at each.

`--winners` records who was fastest in the table that `auto` reads (needs a CUDA device and a
committed checkout): wfnet/backends/winners.json, or a table of one's own that WFNET_WINNERS names.
Writes JSON, after every network, and a picture.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from wfnet import backends
from wfnet.benchmarking import floors
from wfnet.benchmarking.plans import Operation, time_plan
from wfnet.benchmarking.steps import StepSettings, make_problem
from wfnet.benchmarking.timing import (
    about,
    choose_convolutions_by_trial,
    device_name,
    settings_of,
    timed,
)
from wfnet.benchmarking.winners import add_winners, refuse_winners
from wfnet.cli.classifier import create_classifier
from wfnet.fusion import NotFusable
from wfnet.services.files import write_json


class Clock:
    """Milliseconds of a call: CUDA events after flushing L2, or the wall clock."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            self.flush.zero_()
        return timed(call, self.device)


# -- what the numbers say --------------------------------------------------------------------------


def sums(operations: Sequence[dict]) -> dict[str, float | None]:
    """Milliseconds of all convolutions of a step: by one backend, by the fastest at each, floor.

    None for a backend that lacks one of them.
    """
    names = sorted({name for op in operations for name in op["ms"]})
    found: dict[str, float | None] = {}
    for name in names:
        times = [op["ms"].get(name) for op in operations]
        found[name] = None
        if None not in times:
            found[name] = sum(
                len(op["layers"]) * ms for op, ms in zip(operations, times, strict=True)
            )
    alone = [op["alone_ms"].get("eager") for op in operations]
    if alone and None not in alone:
        found["eager alone"] = sum(
            len(op["layers"]) * ms for op, ms in zip(operations, alone, strict=True)
        )
    timed = [op for op in operations if op["ms"]]
    found["fastest at each"] = sum(len(op["layers"]) * min(op["ms"].values()) for op in timed)
    found["floor"] = sum(len(op["layers"]) * op["floor_ms"] for op in operations)
    return found


def lost(operation: dict) -> float:
    """Milliseconds of a step above the floor, with the fastest backend."""
    if not operation["ms"]:
        return 0.0
    return len(operation["layers"]) * (min(operation["ms"].values()) - operation["floor_ms"])


def measurements(record: dict) -> list[dict]:
    """Entries for the table of winners: one for each shape, its epilogues by their share."""
    by_shape: dict[tuple[str, str], list[dict]] = {}
    for network in record["networks"].values():
        for op in network["operations"]:
            if op["shape"] is not None:
                by_shape.setdefault((op["op"], op["shape"]), []).append(op)
    entries = []
    for (op, shape), alike in by_shape.items():
        names = set.intersection(*(set(one["ms"]) for one in alike))
        layers = sum(len(one["layers"]) for one in alike)
        ms = {
            name: sum(len(one["layers"]) * one["ms"][name] for one in alike) / layers
            for name in backends.KERNELS
            if name in names
        }
        alone = {}
        if "eager" in ms and all("eager" in one["alone_ms"] for one in alike):
            times = (len(one["layers"]) * one["alone_ms"]["eager"] for one in alike)
            alone = {"alone_ms": {"eager": sum(times) / layers}}
        entries.append({
            "op": op, "shape": shape, "ms": ms, **alone, "dtype": record["settings"]["dtype"],
            **{name: record[name] for name in ("device", "torch", "triton", "commit")},
        })  # fmt: skip
    return entries


def write_winners(path: Path, record: dict) -> None:
    """Adds a record's winners to a table.

    Raises:
        SystemExit: if they may not be recorded.
    """
    refusal = refuse_winners("cuda" if record["cuda"] else "cpu", record["commit"])
    if refusal:
        raise SystemExit(refusal)
    add_winners(path, measurements(record))
    print(f"{path} has the winners of {', '.join(record['networks'])}")


def print_network(name: str, network: dict) -> None:
    """The sums, then all operations, what loses most first."""
    print(f"\n{name}: convolutions of a step of {network['samples']} samples", flush=True)
    for who, ms in network["sums"].items():
        print(f"  {who:18}" + ("does not run all of it" if ms is None else f"{ms:9.3f} ms"))
    operations = sorted(network["operations"], key=lost, reverse=True)
    names = sorted({name for op in operations for name in (*op["ms"], *op["failed"])})
    print(f"{'lost ms':>8} {'times':>5}" + "".join(f"{n:>10}" for n in (*names, "floor"))
          + "  operation")  # fmt: skip
    for op in operations:
        times = "".join(f"{op['ms'][n]:10.3f}" if n in op["ms"] else f"{'-':>10}" for n in names)
        what = f"{op['op']} {op['layers'][0]} {op['shape'] or 'with groups'} ({op['epilogue']})"
        print(f"{lost(op):8.3f} {len(op['layers']):5}{times}{op['floor_ms']:10.3f}  {what}")
        for who, reason in op["failed"].items():
            print(f"{'':14}{who}: {reason}")


def draw(record: dict, path: Path) -> None:
    """Milliseconds of a step, operation by operation, by each backend, beside the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    networks = record["networks"]
    longest = max(len(network["operations"]) for network in networks.values())
    figure, axes = pyplot.subplots(
        1, len(networks), figsize=(7 * len(networks), 1.5 + 0.3 * longest), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (name, network) in zip(axes[0], networks.items(), strict=True):
        operations = sorted(network["operations"], key=lost, reverse=True)
        labels = [
            f"{len(op['layers'])} x {op['layers'][0]}, "
            + ("forward" if op["op"] == "fused_conv2d" else "dgrad")
            for op in operations
        ]
        shown = [b for b in backends.KERNELS if any(b in op["ms"] for op in operations)]
        height = 0.8 / max(len(shown), 1)
        for position, backend in enumerate(shown):
            at = [row - 0.4 + (position + 0.5) * height for row in range(len(operations))]
            times = [len(op["layers"]) * op["ms"].get(backend, float("nan")) for op in operations]
            axis.barh(at, times, height, label=backend)
        for row, op in enumerate(operations):
            floor = len(op["layers"]) * op["floor_ms"]
            axis.plot([floor, floor], [row - 0.45, row + 0.45], color="black", linewidth=1.2,
                      label="floor" if row == 0 else None)  # fmt: skip
        axis.set_yticks(range(len(operations)), labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel("milliseconds of a step")
        axis.set_title(f"{name}, {network['samples']} samples", fontsize=10)
        axis.legend(fontsize=8)
    settings = record["settings"]
    title = f"{settings['image_size']} px, {settings['dtype']}, {record['device']}"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


# -- command line ----------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--models", "--model", nargs="+", default=["resnet18"],
                        help="timm names, torchvision/NAME, small/NAME")  # fmt: skip
    parser.add_argument("--image-size", type=int, default=224 if cuda else 32)
    parser.add_argument("-b", "--batch-size", type=int, default=256 if cuda else 8,
                        help="images n of a minibatch")  # fmt: skip
    parser.add_argument("-M", "--label-expansion", type=int, default=3)
    parser.add_argument("--share-images", action=argparse.BooleanOptionalAction, default=False,
                        help="the same n / 2 images serve both halves")  # fmt: skip
    parser.add_argument("--classes", type=int, default=1000 if cuda else 10)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32",
                        choices=["float32", "bfloat16", "float16"])  # fmt: skip
    parser.add_argument("--providers", nargs="+", choices=backends.KERNELS,
                        help="candidates (default: those that can run here)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=15 if cuda else 3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file; the picture lies beside it")
    parser.add_argument("--winners", type=Path, help="the table of winners to add to")
    parser.add_argument("--record", type=Path, metavar="JSON",
                        help="with --winners: those of an earlier run")  # fmt: skip
    args = parser.parse_args(argv)
    if args.record and not args.winners:
        parser.error("--record comes with --winners")
    names = ("image_size", "batch_size", "label_expansion", "classes", "share_images", "device",
             "repeats", "seed")  # fmt: skip
    try:
        args.measured = StepSettings(
            **{name: getattr(args, name) for name in names}, dtype=getattr(torch, args.dtype)
        )
    except ValueError as error:
        parser.error(str(error))
    return args


def candidates(asked: list[str] | None, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Backends to measure; kernels first: a step goes on with what the first one computes.

    Raises:
        SystemExit: if one that was asked for cannot run here.
    """
    x = torch.empty(1, 8, 8, 8, device=device, dtype=dtype)
    weight = torch.empty(8, 8, 3, 3, device=device, dtype=dtype)
    found = []
    for name in reversed(backends.KERNELS):
        if asked is not None and name not in asked:
            continue
        reason = backends.get(name).refuse_conv2d(x, weight, backends.ConvGeometry())
        if reason is None:
            found.append(name)
        elif asked is not None:
            raise SystemExit(f"--providers {name}: {reason}")
        else:
            print(f"without {name}: {reason}")
    return found


def main(argv: list[str] | None = None) -> dict | None:
    args = parse(argv)
    if args.record:
        write_winners(args.winners, json.loads(args.record.read_text()))
        return None
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    provenance = about(device, ["benchmarks/bench_plan.py", *(argv or sys.argv[1:])])
    refusal = args.winners and refuse_winners(device.type, provenance["commit"])
    if refusal:
        raise SystemExit(refusal)
    choose_convolutions_by_trial(device)
    names = candidates(args.providers, device, dtype)
    rates = floors.measure_rates(device, dtype)
    print(f"{device_name(device)}: {rates.flops / 1e9:,.0f} GFLOP/s ({args.dtype} product), "
          f"{rates.bandwidth / 1e9:,.1f} GB/s (copy); {', '.join(names)}")  # fmt: skip
    record = {
        "benchmark": "plan",
        "settings": settings_of(args),
        **provenance,
        "rates": {"flops_per_second": rates.flops, "bytes_per_second": rates.bandwidth},
        "networks": {},
    }
    for model in args.models:
        record["networks"][model] = found = measure(model, args, names, Clock(device), rates)
        print_network(model, found)
        if args.output:  # after every network: a run that is ended keeps what it has
            write_json(args.output, record)
        if args.winners:
            write_winners(args.winners, record)
    if args.output:
        draw(record, args.output.with_suffix(".png"))
    return record


def measure(
    model: str, args: argparse.Namespace, names: list[str], clock: Clock, rates: floors.Rates
) -> dict:
    """JSON of one network."""

    def progress(operation: Operation) -> None:
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in operation.medians().items())
        print(f"  {operation.op} {operation.shape} ({operation.epilogue}): {times}", flush=True)

    with contextlib.ExitStack() as stack:
        network = create_classifier(
            model, args.classes, in_channels=3, image_size=args.image_size, seed=args.seed
        )
        problem = make_problem(network, args.measured, stack)
        try:
            operations = time_plan(problem, names, clock, args.repeats, progress)
        except (NotFusable, RuntimeError) as error:
            raise SystemExit(f"{model}: {error}") from error
    rows = [
        {
            **asdict(op),
            "ms": op.medians(),
            "alone_ms": op.alone_medians(),
            "floor_ms": op.floor_ms(rates),
        }
        for op in operations
    ]
    return {"samples": len(problem.batch), "sums": sums(rows), "operations": rows}


def failures(record: dict) -> list[str]:
    """Operations at which a backend failed, or computed something else."""
    return [
        f"{network}: {who} at {op['op']} {op['shape']}: {reason}"
        for network, found in record["networks"].items()
        for op in found["operations"]
        for who, reason in op["failed"].items()
    ]


if __name__ == "__main__":
    done = main()
    failed = [] if done is None else failures(done)
    if failed:
        sys.exit("\n".join(failed))
