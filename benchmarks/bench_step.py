"""One whole untraining step beside its peers: expanded batch in, filters moved.

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
                       what a user gets who asks for no backend: by the table of winners (not by
                       default)

On a CUDA device cuDNN chooses its algorithms by trial, for all columns.
Everything runs in one process, interleaved; medians with the least and the largest value, peak
memory that a step adds, expanded samples per second, and the share of the floor (floors.py, with
this device's measured products and copy). On a CUDA device also where a column's time goes: the
kernels of one step by their time, and the time in which none runs. A column that is impossible says
why. Writes JSON (raw timings, versions, commit, command) and a picture.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

import torch

from wfnet.benchmarking import floors
from wfnet.benchmarking.steps import (
    COLUMNS,
    OURS,
    PEERS,
    StepSettings,
    floors_of,
    make_problem,
    measure,
    print_table,
    summary,
)
from wfnet.benchmarking.timing import about, choose_convolutions_by_trial, device_name, settings_of
from wfnet.cli.classifier import create_classifier
from wfnet.services.files import write_json


def draw(results: dict[str, dict], title: str, path: Path) -> None:
    """Expanded samples per second of every column, one panel per network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {
        name: {c: r for c, r in result["columns"].items() if "impossible" not in r}
        for name, result in results.items()
    }
    shown = {name: rows for name, rows in shown.items() if rows}
    if not shown:
        return
    tallest = max(len(rows) for rows in shown.values())
    figure, axes = pyplot.subplots(
        1, len(shown), figsize=(2.2 + 3.6 * len(shown), 1.2 + 0.3 * tallest), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (name, rows) in zip(axes[0], shown.items(), strict=True):
        values = [row["samples_per_second"] for row in rows.values()]
        low = [v - results[name]["expanded_samples"] / r["largest_ms"] * 1e3
               for v, r in zip(values, rows.values(), strict=True)]  # fmt: skip
        high = [results[name]["expanded_samples"] / r["least_ms"] * 1e3 - v
                for v, r in zip(values, rows.values(), strict=True)]  # fmt: skip
        colours = ["tab:orange" if c.startswith("wfnet/") else "tab:gray" for c in rows]
        axis.barh(list(rows), values, xerr=[low, high], color=colours, ecolor="black", height=0.7)
        axis.invert_yaxis()
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("expanded samples per second")
        floor = results[name]["floor_samples_per_second"].get("fused_with_v")
        if floor is not None:
            axis.axvline(floor, color="tab:blue", linestyle="--", label="floor, fused with v")
            axis.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1.08), frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


# -- command line ----------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", "--model", nargs="+", default=["resnet18"],
        help="timm names, torchvision/NAME, small/NAME",
    )  # fmt: skip
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="images n of a minibatch")
    parser.add_argument("-M", "--label-expansion", type=int, default=3)
    parser.add_argument(
        "--share-images", action=argparse.BooleanOptionalAction, default=True,
        help="the same n / 2 images serve both halves",
    )  # fmt: skip
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=[*PEERS, *OURS])
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--copy-limit", type=float, metavar="GIB",
                        help="masked weight copies that loop, grouped and vmap may make "
                        "(default: 2 on a CPU, 24 on a device)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file; the picture lies beside it")
    args = parser.parse_args(argv)
    names = ("image_size", "batch_size", "label_expansion", "classes", "share_images", "device",
             "channels_last", "repeats", "copy_limit", "seed")  # fmt: skip
    try:
        args.measured = StepSettings(
            **{name: getattr(args, name) for name in names}, dtype=getattr(torch, args.dtype)
        )
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    choose_convolutions_by_trial(device)
    rates = floors.measure_rates(device, getattr(torch, args.dtype))
    print(f"{device_name(device)}: {rates.flops / 1e9:,.0f} GFLOP/s ({args.dtype} product), "
          f"{rates.bandwidth / 1e9:,.1f} GB/s (copy)")  # fmt: skip
    record = {
        "benchmark": "step",
        "settings": settings_of(args),
        **about(device, ["benchmarks/bench_step.py", *(argv or sys.argv[1:])]),
        "rates": {"flops_per_second": rates.flops, "bytes_per_second": rates.bandwidth},
        "networks": {},
    }
    for name in args.models:
        with contextlib.ExitStack() as stack:
            model = create_classifier(
                name, args.classes, in_channels=3, image_size=args.image_size, seed=args.seed
            )
            problem = make_problem(model, args.measured, stack)
            columns = measure(problem, args.columns)
            result = summary(columns, len(problem.batch), floors_of(problem, rates))
        record["networks"][name] = result
        print_table(name, result)
        if args.output:  # after every network: a run that is ended keeps what it has
            write_json(args.output, record)
    if args.output:
        size = f"{args.image_size} px, {args.dtype}, {record['device']}"
        draw(record["networks"], size, args.output.with_suffix(".png"))
    return record


def wrong_columns(record: dict) -> list[str]:
    """Columns that computed something else than the others, as ``network: column``."""
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
