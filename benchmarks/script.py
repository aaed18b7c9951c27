"""What the scripts of this folder share: options, the record that they write."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from wfnet.benchmarking.provenance import provenance
from wfnet.benchmarking.timing import choose_convolutions_by_trial

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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, help="timed rounds")
    if dtype is not None:
        parser.add_argument("--dtype", default=dtype, choices=DTYPES)
    return parser


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
