"""How the cost of a step grows with batch, label expansion, classes and image size.

    python benchmarks/bench_scaling.py --model resnet18 --columns eager wfnet/eager/fused

One quantity at a time is doubled from the base settings; columns are those of bench_step.py,
interleaved, medians. Writes JSON after every point, and a picture: milliseconds over each quantity.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
from pathlib import Path

import torch
from script import CUDA, begin, chart, make_parser

from wfnet.benchmarking.steps import COLUMNS, StepSettings, make_problem, measure
from wfnet.cli.classifier import create_classifier
from wfnet.services.files import write_json

QUANTITIES = {
    "batch_size": "images n",
    "label_expansion": "label expansion M",
    "classes": "classes",
    "image_size": "image size (px)",
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=7, dtype="bfloat16" if CUDA else "float32")
    ours = ["wfnet/triton/captured", "wfnet/cuda/captured"] if CUDA else ["wfnet/eager/fused"]
    add = parser.add_argument
    add("--model", default="resnet50" if CUDA else "small/resnet")
    add("--image-size", type=int, default=112 if CUDA else 32)
    add("-b", "--batch-size", type=int, default=64 if CUDA else 8)
    add("-M", "--label-expansion", type=int, default=2)
    add("--classes", type=int, default=250 if CUDA else 10)
    add("--doublings", type=int, default=2)
    add("--columns", nargs="+", choices=COLUMNS, default=["eager", "unmasked", *ours])
    return parser.parse_args(argv)


def draw(record: dict, columns: list[str], path: Path) -> None:
    settings = record["settings"]
    title = f"{settings['model']}, one quantity doubled at a time; {record['device']}"
    with chart(path, len(QUANTITIES), (12, 3.2), title) as axes:
        for axis, (quantity, label) in zip(axes, QUANTITIES.items(), strict=True):
            points = [point for point in record["points"] if point["quantity"] == quantity]
            for column in columns:
                shown = [
                    (point["value"], point["columns"][column]["median_ms"])
                    for point in points
                    if column in point["columns"]
                ]
                axis.plot(*zip(*shown, strict=True), marker="o", markersize=4, label=column)
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.set_xlabel(label)
        axes[0].set_ylabel("ms per step")
        axes[0].legend(fontsize=7)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    base = StepSettings(
        image_size=args.image_size,
        batch_size=args.batch_size,
        classes=args.classes,
        label_expansion=args.label_expansion,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        repeats=args.repeats,
    )
    record = begin("bench_scaling", args, argv)
    points = record["points"] = []
    doublings = range(args.doublings + 1)
    for quantity, doubling in ((q, d) for q in QUANTITIES for d in doublings):
        value = getattr(base, quantity) * 2**doubling
        settings = dataclasses.replace(base, **{quantity: value})
        model = create_classifier(
            args.model, settings.classes, in_channels=3, image_size=settings.image_size
        )
        with contextlib.ExitStack() as stack:
            measured = measure(make_problem(model, settings, stack), args.columns)
        found = {
            name: {
                "median_ms": statistics.median(column.milliseconds),
                "milliseconds": column.milliseconds,
                "peak_mebibytes": column.peak_mebibytes,
            }
            for name, column in measured.items()
            if column.impossible is None
        }
        points.append({"quantity": quantity, "value": value, "columns": found})
        times = ", ".join(f"{name} {row['median_ms']:.1f} ms" for name, row in found.items())
        print(f"{quantity} {value}: {times}", flush=True)
        if args.output:
            write_json(args.output, record)
    if args.output:
        draw(record, args.columns, args.output.with_suffix(".png"))
    return record


if __name__ == "__main__":
    main()
