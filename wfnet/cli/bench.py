"""throughput against the alternatives, on this machine

Time one untraining step (label-expanded batch in, filters moved) and one filtered forward pass of
any classifier with random weights and images, beside the same step as others would write it.
Interleaved, medians; nothing is read or downloaded.

example:
  wfnet bench --model resnet50 -b 256 -M 3 --amp
  wfnet bench --model resnet18 vit_tiny_patch16_224 --img-size 64 -b 8 --output steps.csv
"""

import argparse
import statistics
import sys
from dataclasses import asdict
from typing import Any

import torch

from wfnet import backends
from wfnet.benchmarking import roofline
from wfnet.benchmarking.provenance import commit, device_name, provenance
from wfnet.benchmarking.steps import (
    COLUMNS,
    Problem,
    StepSettings,
    make_problem,
    measure,
    print_table,
)
from wfnet.cli.classifier import create_classifier
from wfnet.cli.inputs import choose_device
from wfnet.cli.options import Parser, add_command, config_changes
from wfnet.services.clock import timed
from wfnet.services.files import write_json
from wfnet.services.records import write_csv
from wfnet.version import __version__

# Settings that are options, in the order of the help.
_SETTINGS = ("image_size", "classes", "batch_size", "label_expansion", "share_images", "distil")
_SETTINGS += ("tune", "repeats", "seed")


def add_parser(commands: argparse._SubParsersAction) -> Parser:
    parser = add_command(
        commands, run, "the table is written at the end", "--model NAME [NAME ...] [options]"
    )
    group = parser.group("what is measured")
    group.add_all(
        f"""
        --model NAME...  names of timm, of torchvision (torchvision/resnet50), or small/resnet, ...
        --columns COLUMN...  of {", ".join(COLUMNS)} (default: eager, unmasked, and ours that can
            run here)
        --output FILE  CSV with the columns of timm's benchmark.py, and more; FILE.json: all that
            was measured, every kernel and every time
        """,
        columns=tuple(COLUMNS),
    )
    group.add_fields(StepSettings, *_SETTINGS, defaults=StepSettings())
    group.add_model_kwargs()
    parser.group("computing").add_device()
    return parser


def run(options: argparse.Namespace) -> None:
    if not options.model:
        raise ValueError("there is no network: give --model NAME, for example --model resnet50")
    device = choose_device(options.device)
    if device.type == "cuda":  # as everybody does who measures: baselines are at their best
        torch.backends.cudnn.benchmark = True
    dtype = torch.bfloat16 if options.amp else torch.float32
    how = {"device": str(device), "dtype": dtype, "channels_last": options.channels_last}
    settings = StepSettings(**config_changes(options, StepSettings, *_SETTINGS), **how)
    columns = options.columns
    if columns is None:  # two baselines that are made in no time, and what can run here
        kernels = (*backends.KERNELS, "auto") if device.type == "cuda" else ()
        ours = ["wfnet/eager/unfused", "wfnet/eager/fused"]
        columns = ["eager", "unmasked", *ours, *(f"wfnet/{name}/captured" for name in kernels)]
    rates = roofline.measure_rates(device, dtype)
    print(f"{device_name(device)}: {rates}, {str(dtype).removeprefix('torch.')}")
    about = {"models": options.model, "columns": columns, "threads": torch.get_num_threads()}
    about = asdict(settings) | about | {"dtype": str(dtype).removeprefix("torch.")}
    record = {"benchmark": "step", "settings": about, "rates": rates.as_json(), "networks": {}}
    record |= provenance(device, ["-m", "wfnet", *sys.argv[1:]])
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
        problem = make_problem(model, settings)
        result = measure(problem, columns, rates)
        forward = infer_milliseconds(problem)
        record["networks"][name] = result
        rows += table_rows(name, problem, result["columns"], forward)
        print_table(name, result)
        print(f"{'filtered forward pass':26}{forward:9.1f}")
        if options.output:  # after every network: a run that is ended keeps what it has
            if options.output.endswith(".json"):
                write_json(options.output, record)
            else:
                heads = dict.fromkeys(head for row in rows for head in row)
                write_csv(options.output, rows, list(heads))
    if options.output:
        print(f"\nwritten to {options.output}")
    wrong = [
        f"{name}: {column}"
        for name, result in record["networks"].items()
        for column, row in result["columns"].items()
        if row.get("wrong")
    ]
    if wrong:
        raise ValueError(f"columns that compute something else: {', '.join(wrong)}")


def infer_milliseconds(problem: Problem) -> float:
    """Returns the median time of one forward pass of all samples, each under its row."""
    net, batch = problem.net, problem.batch
    net.fuse = True

    def forward() -> object:
        return net(problem.images, batch.forget, batch.source)

    with torch.inference_mode(), problem.autocast():
        calls = range(2 + problem.settings.repeats)  # made, checked, measured
        times = [timed(forward, problem.device) for _ in calls]
    return statistics.median(times[2:])


def table_rows(
    name: str, problem: Problem, columns: dict[str, dict], forward: float
) -> list[dict[str, Any]]:
    """Returns one row per column, by the names of timm's benchmark.py where it has the quantity.

    Times are in ms, parameters in millions; batches are samples: images under a row each.
    """
    settings, samples = problem.settings, len(problem.batch)
    filters = sum(p.numel() for p in problem.net.filter_parameters())
    weights = sum(p.numel() for p in problem.net.model.parameters()) - filters
    about = {
        "model": name,
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
    }
    rows = []
    for column, found in columns.items():
        row = {"column": column, **about, "remark": found.get("impossible", "")}
        if "impossible" not in found:
            share = found["share_of_floor"]
            row |= {
                "train_samples_per_sec": round(found["samples_per_second"], 2),
                "train_step_time": round(found["median_ms"], 3),
                "peak_mib": round(found["peak_mebibytes"], 1),
                "kernel_launches": found["kernel_launches"],
                "gradient_error": found["gradient_error"],
                "share_of_floor": None if share is None else round(share, 4),
            }
        if column == "wfnet/eager/fused":
            row |= {
                "infer_samples_per_sec": round(samples / forward * 1e3, 2),
                "infer_step_time": round(forward, 3),
                "infer_batch_size": samples,
                "infer_img_size": settings.image_size,
            }
        rows.append(row)
    return rows
