"""What the scripts of this folder share: options, the record that they write."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from wfnet.benchmarking import roofline
from wfnet.benchmarking.provenance import provenance
from wfnet.benchmarking.steps import Problem, StepSettings, make_problem
from wfnet.benchmarking.timing import choose_convolutions_by_trial
from wfnet.cli.classifier import create_classifier
from wfnet.services.files import write_json

CUDA = torch.cuda.is_available()
DTYPES = ("float32", "bfloat16", "float16")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def make_parser(
    doc: str, repeats: int | None = None, dtype: str | None = None
) -> argparse.ArgumentParser:
    """Returns a parser with the options that scripts share; ``dtype`` is the default."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if CUDA else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, help="timed rounds")
    if dtype is not None:
        parser.add_argument("--dtype", default=dtype, choices=DTYPES)
    return parser


def parse_step(
    parser: argparse.ArgumentParser, argv: list[str] | None, **defaults: object
) -> argparse.Namespace:
    """Adds the options of a whole step and parses; ``measured`` of the result has its settings.

    Args:
        defaults: of ``image_size``, ``batch_size``, ``classes`` and ``share_images``.
    """
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    names = "timm names, torchvision/NAME, small/NAME"
    add("--models", "--model", nargs="+", default=["resnet18"], help=names)
    add("--image-size", type=int)
    add("-b", "--batch-size", type=int, help="images n of a minibatch")
    add("-M", "--label-expansion", type=int, default=3)
    add("--share-images", action=switch, help="the same n / 2 images serve both halves")
    add("--classes", type=int)
    add("--seed", type=int, default=0)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    given = {one.name: getattr(args, one.name) for one in fields(StepSettings) if one.name in args}
    try:
        args.measured = StepSettings(**given | {"dtype": getattr(torch, args.dtype)})
    except ValueError as error:
        parser.error(str(error))
    return args


def begin(
    name: str, args: argparse.Namespace, argv: list[str] | None, *inner: str
) -> dict[str, Any]:
    """Sets threads and cuDNN's choice; returns the start of the record of a run.

    Args:
        name: of the script, without its ending.
        inner: arguments that are no settings.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    choose_convolutions_by_trial(torch.device(args.device))
    words = sys.argv[1:] if argv is None else argv
    return {
        "benchmark": name.removeprefix("bench_"),
        "settings": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
            if name not in inner
        },
        **provenance(args.device, [f"benchmarks/{name}.py", *words]),
    }


def measure_networks(
    record: dict[str, Any],
    args: argparse.Namespace,
    measure: Callable[[Problem, roofline.Rates], dict],
    show: Callable[[str, dict], None],
) -> dict[str, Any]:
    """Measures a step of every network of ``args``; returns the record with the results by name.

    Args:
        record: from :func:`begin`; written after every network, so that a run that is ended keeps
            what it has.
        measure: what is measured of a network, at the rates of this device.
        show: prints a result.
    """
    rates = roofline.measure_rates(torch.device(args.device), args.measured.dtype)
    print(f"{record['device']}: {rates} ({args.dtype})")
    record |= {"rates": rates.as_json(), "networks": {}}
    for name in args.models:
        model = create_classifier(
            name, args.classes, in_channels=3, image_size=args.image_size, seed=args.seed
        )
        record["networks"][name] = result = measure(make_problem(model, args.measured), rates)
        show(name, result)
        if args.output:
            write_json(args.output, record)
    return record
