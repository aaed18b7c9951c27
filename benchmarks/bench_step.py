"""One whole untraining step beside its alternatives: expanded batch in, filters moved.

    python benchmarks/bench_step.py --models resnet18 vit_tiny_patch16_224 --image-size 64 -b 16

A step is forward and backward over the label-expanded batch and one optimiser step. Columns, with
the same weights, filters, images, labels, objective, dtype and layout for all:

    loop               a masked weight copy and a convolution per sample
    grouped            the batch folded into one grouped convolution (transformers: one batched
                       product) with masked copies
    vmap               torch.func.vmap over masked copies
    eager              the ordinary layer, then broadcast multiplies, in PyTorch with autograd
    compile            torch.compile of `eager` (mode max-autotune on a CUDA device)
    unmasked           the same frozen network without masks: forward and gradients down to the
                       first masked layer, no optimiser
    unmasked_compiled  torch.compile of it
    wfnet/BACKEND/unfused, /fused, /captured
                       this package; fused: one plan with the backward chain; captured: the same
                       as a CUDA graph (CUDA devices only)
    wfnet/eager/compiled, /compiled_captured
                       the plan with torch.compile of what lies between the convolutions
    wfnet/auto/unfused, /fused, /captured
                       what a user gets who asks for no backend (not by default)

With --distil every column also runs the original network on the images of the minibatch and retains
by distillation, as the default recipe does; `compile` compiles that, too. On a CUDA device cuDNN
chooses its algorithms by trial, for all columns.
Before a column is timed, its filter gradients are compared with those of `eager` in fp32: they may
be off by 2e-3, or by twice as much as those of `eager` in the same dtype. Everything runs in one
process, interleaved; columns that take more than a quarter of a device's memory run by themselves.
Medians with the least and the largest value, peak memory that a step adds, expanded samples per
second, and the share of the roofline (with this device's measured products and copy). On a CUDA
device also the kernels of one step by their time. A column that is impossible says why. Writes JSON
(raw timings, versions, commit, command) and a picture.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from script import begin, make_parser

from wfnet.backends.autotune import DEFAULT_SECONDS
from wfnet.benchmarking.roofline import measure_rates
from wfnet.benchmarking.steps import (
    BASELINES,
    COLUMNS,
    OURS,
    StepSettings,
    make_problem,
    measure,
    print_table,
)
from wfnet.cli.classifier import create_classifier
from wfnet.report.figures.style import AFTER, BEFORE, RETAINED, picture
from wfnet.services.files import write_json


def draw(record: dict, path: Path) -> None:
    """Draws expanded samples per second of every column, one panel per network."""
    shown = {
        name: {c: row for c, row in result["columns"].items() if "impossible" not in row}
        for name, result in record["networks"].items()
    }
    shown = {name: rows for name, rows in shown.items() if rows}
    if not shown:
        return
    size = 2.2 + 3.6 * len(shown), 1.4 + 0.3 * max(map(len, shown.values()))
    with picture(path, *size) as figure:
        axes = figure.subplots(1, len(shown), squeeze=False)[0]
        for axis, (name, rows) in zip(axes, shown.items(), strict=True):
            result = record["networks"][name]
            rates, low, high = (
                [result["expanded_samples"] / row[time] * 1e3 for row in rows.values()]
                for time in ("median_ms", "largest_ms", "least_ms")
            )
            errors = [np.subtract(rates, low), np.subtract(high, rates)]
            colours = [AFTER if c.startswith("wfnet/") else BEFORE for c in rows]
            axis.barh(list(rows), rates, xerr=errors, color=colours, height=0.7)
            axis.invert_yaxis()
            axis.set(title=name, xlabel="expanded samples per second")
            roof = result["floor_samples_per_second"].get("fused_with_v")
            if roof is not None:
                axis.axvline(roof, color=RETAINED, linestyle="--", label="roofline")
                axis.legend()
        settings = record["settings"]
        figure.suptitle(f"{settings['image_size']} px, {settings['dtype']}, {record['device']}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=15, dtype="float32")
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    names = "timm names, torchvision/NAME, small/NAME"
    add("--models", "--model", nargs="+", default=["resnet18"], help=names)
    add("--image-size", type=int, default=32)
    add("-b", "--batch-size", type=int, default=32, help="images n of a minibatch")
    add("-M", "--label-expansion", type=int, default=3)
    shared = "the same n / 2 images serve both halves"
    add("--share-images", action=switch, default=True, help=shared)
    add("--classes", type=int, default=10)
    add("--seed", type=int, default=0)
    add("--channels-last", action=switch, default=True)
    add("--distil", action=switch, default=False)
    add("--tune", type=float, default=DEFAULT_SECONDS, help="seconds, of the columns of auto")
    add("--columns", nargs="+", choices=COLUMNS, default=[*BASELINES, *OURS])
    args = parser.parse_args(argv)
    given = {one.name: getattr(args, one.name) for one in fields(StepSettings)}
    try:
        args.measured = StepSettings(**given | {"dtype": getattr(torch, args.dtype)})
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    record = begin("bench_step", args, argv, "measured")
    rates = measure_rates(torch.device(args.device), args.measured.dtype)
    print(f"{record['device']}: {rates} ({args.dtype})")
    record |= {"rates": rates.as_json(), "networks": {}}
    for name in args.models:
        model = create_classifier(
            name, args.classes, in_channels=3, image_size=args.image_size, seed=args.seed
        )
        problem = make_problem(model, args.measured)
        record["networks"][name] = result = measure(problem, args.columns, rates)
        print_table(name, result)
        if args.output:  # after every network: a run that is ended keeps what it has
            write_json(args.output, record)
    if args.output:
        draw(record, args.output.with_suffix(".png"))
    return record


def wrong_columns(record: dict) -> list[str]:
    """Returns columns that computed something else than the others, as ``network: column``."""
    return [
        f"{network}: {column}"
        for network, result in record["networks"].items()
        for column, row in result["columns"].items()
        if row.get("wrong")
    ]


if __name__ == "__main__":
    wrong = wrong_columns(main())
    if wrong:
        sys.exit(f"columns that compute something else: {', '.join(wrong)}")
