"""`wfnet bench`: throughput of a whole untraining step on this machine, beside its peers."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import statistics
from pathlib import Path
from typing import Any

import torch

from wfnet import backends
from wfnet.benchmarking import floors
from wfnet.benchmarking.steps import (
    COLUMNS,
    Column,
    Problem,
    StepSettings,
    floors_of,
    make_problem,
    measure,
    print_table,
    summary,
)
from wfnet.benchmarking.timing import choose_convolutions_by_trial, commit, device_name, timed
from wfnet.cli.classifier import create_classifier
from wfnet.cli.inputs import choose_device
from wfnet.cli.options import HelpFormatter, key_value
from wfnet.services import settings
from wfnet.services.files import write_atomically
from wfnet.version import __version__

EXAMPLE = """example:
  wfnet bench --model resnet50 -b 256 -M 3 --amp
  wfnet bench --model resnet18 vit_tiny_patch16_224 --img-size 64 -b 8 --output steps.csv"""
# Names of timm's benchmark.py where it has the quantity; ours where it has not. Times are in ms,
# parameters in millions; batches are samples: images under a row each.
FIELDS = (
    "model", "column", "train_samples_per_sec", "train_step_time", "train_batch_size",
    "train_img_size", "infer_samples_per_sec", "infer_step_time", "infer_batch_size",
    "infer_img_size", "param_count", "filter_count", "label_expansion", "images", "peak_mib",
    "kernel_launches", "share_of_floor", "dtype", "device", "torch", "wfnet", "commit", "remark",
)  # fmt: skip


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "bench",
        help="throughput against the alternatives, on this machine",
        description="Time one untraining step (label-expanded batch in, filters moved) and one "
        "filtered forward pass of any classifier with random weights and images, beside the same "
        "step as others would write it. Interleaved, medians; nothing is read or downloaded.",
        usage="wfnet bench --model NAME [NAME ...] [options]",
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run, saved=lambda options: "the table is written at the end")
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--model", nargs="+", metavar="NAME",
        help="names of timm, of torchvision (torchvision/resnet50), or small/resnet, ...",
    )  # fmt: skip
    group.add_argument(
        "--model-kwargs", nargs="*", type=key_value, metavar="KEY=VALUE",
        help="arguments of the model's constructor",
    )  # fmt: skip
    group.add_argument(
        "--img-size",
        type=settings.image_size,
        default=224,
        metavar="PIXELS",
        help="of the random images",
    )
    group.add_argument(
        "--num-classes",
        type=settings.class_count,
        default=1000,
        metavar="N",
        help="rows of the filters",
    )
    group.add_argument(
        "-b", "--batch-size", type=settings.int_from(2, 10**6), default=32, metavar="N",
        help="images of a minibatch, even",
    )  # fmt: skip
    group.add_argument(
        "-M", "--label-expansion", type=settings.positive_int, default=3, metavar="M",
        help="rows that each retained image goes through",
    )  # fmt: skip
    group.add_argument(
        "--share-images", action=argparse.BooleanOptionalAction, default=True,
        help="the same n / 2 images serve both halves (default: yes)",
    )  # fmt: skip
    group.add_argument(
        "--columns", nargs="+", choices=COLUMNS, metavar="COLUMN",
        help=f"of {', '.join(COLUMNS)} (default: eager, unmasked, and ours that can run here)",
    )  # fmt: skip
    group.add_argument(
        "--repeats", type=settings.positive_int, default=10, metavar="N", help="timed steps"
    )
    group.add_argument(
        "--seed", type=settings.seed, default=0, metavar="N", help="of everything random"
    )
    group.add_argument(
        "--output", metavar="FILE", help="CSV with the columns of timm's benchmark.py, and more"
    )
    group = parser.add_argument_group("computing")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    group.add_argument("--amp", action="store_true", help="compute in bfloat16 where it is safe")
    group.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, default=True,
        help="memory layout in which convolutions are faster (default: yes)",
    )  # fmt: skip
    group.add_argument("--threads", type=settings.cpu_threads, metavar="N", help="CPU threads")
    return parser


def run(options: argparse.Namespace) -> int:
    if not options.model:
        raise ValueError("there is no network: give --model NAME, for example --model resnet50")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    choose_convolutions_by_trial(device)
    dtype = torch.bfloat16 if options.amp else torch.float32
    settings = StepSettings(
        image_size=options.img_size,
        batch_size=options.batch_size,
        label_expansion=options.label_expansion,
        classes=options.num_classes,
        share_images=options.share_images,
        device=str(device),
        dtype=dtype,
        channels_last=options.channels_last,
        repeats=options.repeats,
        seed=options.seed,
    )
    columns = options.columns or default_columns(device)
    rates = floors.measure_rates(device, dtype)
    print(
        f"{device_name(device)}: {rates.flops / 1e9:,.0f} GFLOP/s (product), "
        f"{rates.bandwidth / 1e9:,.1f} GB/s (copy), {str(dtype).removeprefix('torch.')}"
    )
    rows: list[dict[str, Any]] = []
    for name in options.model:
        model = create_classifier(
            name,
            options.num_classes,
            in_channels=3,
            image_size=options.img_size,
            seed=options.seed,
            options=dict(options.model_kwargs or ()),
        )
        with contextlib.ExitStack() as stack:
            problem = make_problem(model, settings, stack)
            measured = measure(problem, columns)
            floor = floors_of(problem, rates)
            forward = infer_milliseconds(problem)
            rows += table_rows(name, problem, measured, floor, forward)
        print_table(name, summary(measured, len(problem.batch), floor))
        print(f"{'filtered forward pass':26}{forward:9.1f}")
    if options.output:
        write_csv(Path(options.output), rows)
        print(f"\nwritten to {options.output}")
    return 0


def default_columns(device: torch.device) -> list[str]:
    """Two peers that are made in no time, and what this package can do on the device."""
    ours = [f"wfnet/eager/{how}" for how in ("unfused", "fused")]
    if device.type == "cuda":
        ours += [f"wfnet/{name}/captured" for name in backends.KERNELS]
    return ["eager", "unmasked", *ours]


def infer_milliseconds(problem: Problem) -> float:
    """Median time of one forward pass of all samples, each under its row."""
    net, batch = problem.net, problem.batch
    net.fuse = True
    times = []
    with torch.inference_mode(), problem.autocast():
        for repeat in range(problem.settings.repeats + 2):
            milliseconds = timed(
                lambda: net(problem.images, batch.forget, batch.source), problem.device
            )
            if repeat >= 2:  # made, checked, warm
                times.append(milliseconds)
    return statistics.median(times)


def table_rows(
    name: str,
    problem: Problem,
    measured: dict[str, Column],
    floor: dict[str, float | str],
    forward: float,
) -> list[dict[str, Any]]:
    """One row per column, by the names of :data:`FIELDS`."""
    settings, samples = problem.settings, len(problem.batch)
    filters = sum(p.numel() for p in problem.net.filter_parameters())
    weights = sum(p.numel() for p in problem.net.model.parameters()) - filters
    rows = []
    for column, found in summary(measured, samples, floor)["columns"].items():
        row = {
            "model": name,
            "column": column,
            "train_batch_size": samples,
            "train_img_size": settings.image_size,
            "param_count": round(weights / 1e6, 2),
            "filter_count": round(filters / 1e6, 2),
            "label_expansion": settings.label_expansion,
            "images": problem.images.shape[0],
            "dtype": str(settings.dtype).removeprefix("torch."),
            "device": device_name(problem.device),
            "torch": torch.__version__,
            "wfnet": __version__,
            "commit": commit(),
            "remark": found.get("impossible", ""),
        }
        if "impossible" not in found:
            row |= {
                "train_samples_per_sec": round(found["samples_per_second"], 2),
                "train_step_time": round(found["median_ms"], 3),
                "peak_mib": round(found["peak_mebibytes"], 1),
                "kernel_launches": found["kernel_launches"] or "",
            }
            if found["share_of_floor"] is not None:
                row["share_of_floor"] = round(found["share_of_floor"], 4)
        if column == "wfnet/eager/fused":
            row |= {
                "infer_samples_per_sec": round(samples / forward * 1e3, 2),
                "infer_step_time": round(forward, 3),
                "infer_batch_size": samples,
                "infer_img_size": settings.image_size,
            }
        rows.append(row)
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue()))
