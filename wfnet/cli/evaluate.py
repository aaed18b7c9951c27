"""`wfnet evaluate`: the measures of every class, as a table, files and figures."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from wfnet.cli.drawing import draw_evaluation
from wfnet.cli.inputs import (
    check_run_folder,
    class_indices,
    count_classes,
    load_network,
    open_images,
)
from wfnet.cli.options import (
    HelpFormatter,
    add_compute_options,
    add_data_options,
    add_model_options,
    log_base,
    whole,
)
from wfnet.cli.runs import check_writable
from wfnet.data import Dataset
from wfnet.evaluation import EvaluationResult, evaluate
from wfnet.network import WFNet

EXAMPLE = """example:
  wfnet evaluate runs/r50                   (network and data as `wfnet untrain` recorded them)
  wfnet evaluate runs/r50 --data-dir /data/other --retained-rows 20 --output runs/r50-other"""
_PARTS = ("test", "validation", "train")


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "evaluate",
        help="accuracy and ZRF of every class of a run: table, JSON, CSV, figures",
        description="Evaluate filters for all classes: Acc_f (accuracy on the forgotten class, low "
        "is good), Acc_r (accuracy on all others, high is good) and ZRF, next to the original "
        "network's. Every image is run under every row.",
        usage="wfnet evaluate RUN [options]",
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run, saved=lambda options: "evaluation writes its files at its end")
    parser.add_argument("folder", nargs="?", metavar="RUN", help="folder of a run")
    parser.add_argument("--resume", metavar="RUN", help="the same, as in timm")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--split", choices=_PARTS, default="test", help="part of the data")
    group.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="rows, by number or name (default: all)"
    )
    group.add_argument(
        "--zrf-base", type=log_base, default=log_base("e"), metavar="BASE",
        help="base of the logarithm in ZRF: e or 2 (default: e)",
    )  # fmt: skip
    group.add_argument(
        "--retained-rows", type=whole(1), metavar="N",
        help="for many classes: run each image under its own row and N random others, which makes "
        "Acc_r an estimate (default: all rows)",
    )  # fmt: skip
    group.add_argument(
        "-b", "--batch-size", type=whole(1), default=256, metavar="N",
        help="samples of a forward pass: an image under a row each",
    )  # fmt: skip
    group.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of splits and draws")
    group.add_argument(
        "--max-corrupt", type=whole(0), metavar="N", help="corrupt images that are left out"
    )
    group.add_argument("--output", metavar="DIR", help="folder for the results (default: RUN)")
    group.add_argument("--no-figures", action="store_true", help="table, JSON and CSV only")
    add_data_options(parser)
    add_model_options(parser)
    add_compute_options(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    if not options.folder and not options.resume:
        raise ValueError("name the folder of a run: wfnet evaluate RUN")
    folder = Path(options.folder or options.resume)
    if options.threads:
        torch.set_num_threads(options.threads)
    config = check_run_folder(folder)
    output = Path(options.output or folder)
    check_writable(output)
    found = count_classes(options)
    if found != config["num_classes"]:
        raise ValueError(
            f"{options.data or options.data_dir} has {found} classes, the filters in {folder} "
            f"{config['num_classes']}; evaluate on the data that they were made for"
        )
    net, classifier = load_network(options, folder)
    images = getattr(open_images(options, classifier), options.split)
    classes = None
    if options.classes:
        classes = class_indices(options.classes, images.classes, net.num_classes)
    result = evaluate(
        net,
        images,
        classes=classes,
        batch_size=options.batch_size,
        zrf_base=options.zrf_base,
        seed=options.seed,
        retained_rows=options.retained_rows,
        progress=not options.quiet,
        workers=options.workers,
        max_corrupt=options.max_corrupt,
        amp_dtype=torch.bfloat16 if options.amp else None,
        channels_last=options.channels_last,
    )
    result.settings["split"] = options.split
    written = write_results(result, net, images, output, figures=not options.no_figures)
    print(result.table())
    print(f"\nin {output}: {', '.join(written)}  ({result.seconds:.1f} s)")
    return 0


def write_results(
    result: EvaluationResult, net: WFNet, images: Dataset, folder: Path, figures: bool = True
) -> list[str]:
    """Writes JSON, CSV and, where matplotlib is installed, figures; returns their names."""
    result.to_json(folder / "evaluation.json")
    result.to_csv(folder / "evaluation.csv")
    written = ["evaluation.json", "evaluation.csv"]
    return written + (draw_evaluation(result, net, images.classes, folder) if figures else [])
