"""How the cost of a step grows with batch, label expansion, classes and image size.

    python benchmarks/bench_scaling.py --model resnet18 --columns eager wfnet/eager/fused

One quantity at a time is doubled from the base settings; columns are those of bench_step.py,
interleaved, medians. Writes JSON after every point, and a picture: milliseconds and peak memory
over each quantity.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
from pathlib import Path

import torch

from wfnet.benchmarking.steps import COLUMNS, StepSettings, make_problem, measure
from wfnet.benchmarking.timing import about, choose_convolutions_by_trial, device_name, settings_of
from wfnet.cli.classifier import create_classifier
from wfnet.services.files import write_json

QUANTITIES = {
    "batch_size": "images n", "label_expansion": "label expansion M", "classes": "classes",
    "image_size": "image size (px)",
}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ours = ["wfnet/triton/captured", "wfnet/cuda/captured"] if cuda else ["wfnet/eager/fused"]
    parser.add_argument("--model", default="resnet50" if cuda else "small/resnet")
    parser.add_argument("--image-size", type=int, default=112 if cuda else 32)
    parser.add_argument("-b", "--batch-size", type=int, default=64 if cuda else 8)
    parser.add_argument("-M", "--label-expansion", type=int, default=2)
    parser.add_argument("--classes", type=int, default=250 if cuda else 10)
    parser.add_argument("--doublings", type=int, default=2)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32",
                        choices=["float32", "bfloat16"])  # fmt: skip
    parser.add_argument("--columns", nargs="+", choices=COLUMNS,
                        default=["eager", "unmasked", *ours])  # fmt: skip
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--output", type=Path, help="JSON file; the picture lies beside it")
    return parser.parse_args(argv)


def draw(points: list[dict], columns: list[str], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(QUANTITIES), figsize=(12, 5.5), layout="constrained")
    for place, (quantity, label) in enumerate(QUANTITIES.items()):
        for row, (key, what) in enumerate(
            (("median_ms", "ms per step"), ("peak_mebibytes", "peak MiB"))
        ):
            axis = axes[row][place]
            for column in columns:
                shown = [
                    (p["value"], p["columns"][column][key])
                    for p in points
                    if p["quantity"] == quantity and column in p["columns"]
                ]
                axis.plot(*zip(*shown, strict=True), marker="o", markersize=4, label=column)
            axis.set_xscale("log", base=2)
            axis.set_xticks([x for x, _ in shown], [str(x) for x, _ in shown])
            axis.minorticks_off()
            axis.set_ylim(bottom=0)
            axis.set_xlabel(label)
            axis.spines[["top", "right"]].set_visible(False)
            if place == 0:
                axis.set_ylabel(what)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    base = StepSettings(
        image_size=args.image_size, batch_size=args.batch_size, classes=args.classes,
        label_expansion=args.label_expansion, device=args.device,
        dtype=getattr(torch, args.dtype), repeats=args.repeats,
    )  # fmt: skip
    points = []
    device = torch.device(args.device)
    choose_convolutions_by_trial(device)
    result = {
        "benchmark": "scaling",
        "settings": settings_of(args),
        **about(device, ["benchmarks/bench_scaling.py", *(argv or sys.argv[1:])]),
        "points": points,
    }
    for quantity in QUANTITIES:
        for doubling in range(args.doublings + 1):
            value = getattr(base, quantity) * 2**doubling
            settings = dataclasses.replace(base, **{quantity: value})
            model = create_classifier(
                args.model, settings.classes, in_channels=3, image_size=settings.image_size
            )
            with contextlib.ExitStack() as stack:
                problem = make_problem(model, settings, stack)
                measured = measure(problem, args.columns)
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
                write_json(args.output, result)
    if args.output:
        title = (
            f"{args.model}: n = {base.batch_size}, M = {base.label_expansion}, {base.classes} "
            f"classes, {base.image_size} px, one of them doubled; {device_name(device)}"
        )
        draw(points, args.columns, title, args.output.with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()
