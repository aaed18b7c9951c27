"""Every masked layer of a network's fused step by every backend: where time goes, who is fastest.

    python benchmarks/bench_plan.py --models resnet18 resnet50 --output runs/plan.json

One untraining step is run, and every backend makes every call of it that multiplies on the same
operands, forward (with all that follows) and input gradient (with the elementwise backward of the
layer below): what `auto` does to choose, without a limit of time. A backend whose results differ
from PyTorch's at a call has no time there. The roofline is the longer of products and bytes at the
rates that this device was measured to have in this run. Calls are listed by what they lose to the
roofline in a step; in front of them stand the sums, for each backend and for the fastest at each
call.

Writes JSON after every network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from script import CUDA, begin, make_parser, measure_networks, parse_step

from wfnet.backends import KERNELS
from wfnet.backends.autotune import default_candidates
from wfnet.benchmarking.layer_times import time_layers
from wfnet.benchmarking.roofline import Rates
from wfnet.benchmarking.steps import Problem


def lost(row: dict) -> float:
    """Returns the milliseconds above the roofline, with the fastest backend."""
    return min(row["ms"].values()) - row["floor_ms"] if row["ms"] else 0.0


def sums(rows: Sequence[dict]) -> dict[str, float]:
    """Returns milliseconds of all calls of a step: by one backend, by the fastest at each, floor.

    A backend that lacks one of them has no sum.
    """
    names = sorted({name for row in rows for name in row["ms"]})
    found = {
        name: sum(row["ms"][name] for row in rows)
        for name in names
        if all(name in row["ms"] for row in rows)
    }
    found["fastest at each"] = sum(min(row["ms"].values()) for row in rows if row["ms"])
    return found | {"floor": sum(row["floor_ms"] for row in rows)}


def print_network(name: str, network: dict) -> None:
    """Prints the sums, then all calls, what loses most first."""
    print(f"\n{name}: masked layers in a step of {network['samples']} samples", flush=True)
    for who, reason in network["failed"].items():
        print(f"  {who}: {reason}")
    for who, ms in network["sums"].items():
        print(f"  {who:18}{ms:9.3f} ms")
    names = sorted({name for row in network["calls"] for name in row["ms"]})
    print(f"{'lost ms':>8}" + "".join(f"{who:>10}" for who in (*names, "floor")) + "  call")
    for row in sorted(network["calls"], key=lost, reverse=True):
        times = (row["ms"].get(who, float("nan")) for who in names)
        cells = "".join(f"{ms:10.3f}" for ms in (*times, row["floor_ms"]))
        print(f"{lost(row):8.3f}{cells}  {row['layer']} {row['direction']} {row['shapes']}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, 15 if CUDA else 3, "bfloat16" if CUDA else "float32")
    add = parser.add_argument
    add("--providers", nargs="+", choices=[*default_candidates()], default=KERNELS)
    image_size, batch_size, classes = (224, 256, 1000) if CUDA else (32, 8, 10)
    sizes = {"image_size": image_size, "batch_size": batch_size, "classes": classes}
    return parse_step(parser, argv, **sizes, share_images=False)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)

    def measure(problem: Problem, rates: Rates) -> dict:
        calls, failed = time_layers(problem, args.providers, args.repeats, rates)
        samples = len(problem.batch)
        return {"samples": samples, "failed": failed, "sums": sums(calls), "calls": calls}

    record = begin("bench_plan", args, argv, "measured")
    return measure_networks(record, args, measure, print_network)


def failures(record: dict) -> list[str]:
    """Returns the backends that lack times: they cannot run, fail, or compute something else."""
    return [
        f"{network}: {who}: {reason}"
        for network, found in record["networks"].items()
        for who, reason in found["failed"].items()
    ]


if __name__ == "__main__":
    failed = failures(main())
    if failed:
        sys.exit("\n".join(failed))
