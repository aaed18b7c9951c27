"""`wfnet report`: one page about a run, with tables, figures, trust checks and definitions."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from wfnet.cli.drawing import draw_report
from wfnet.cli.inputs import check_run_folder, load_network, open_images, untrained_classes
from wfnet.cli.options import (
    HelpFormatter,
    add_compute_options,
    add_data_options,
    add_model_options,
)
from wfnet.cli.runs import CONFUSION, RUN_FILE, check_writable, read_run
from wfnet.data import multi_hot_of
from wfnet.evaluation.confusion import ConfusionChange, confusion_change
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.network import WFNet
from wfnet.report.contents import Contents, read_contents
from wfnet.report.page import write_report
from wfnet.services import settings

EXAMPLE = """example:
  wfnet report runs/r50
  wfnet report runs/r50 --as-is --output r50.html      (only what the folder holds, no network)

Before it: wfnet evaluate, wfnet trust and wfnet baseline make what the page shows."""
# Where there are more classes than this, images run under some of the other rows only.
_ALL_ROWS, _SOME_ROWS = 100, 10


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "report",
        help="one self-contained HTML page about a run",
        description="Write one HTML page about a run that loads nothing from elsewhere: results of "
        "every class (sortable, with a search), figures, trust checks with what forgetting "
        "protects against and what not, definitions, configuration.",
        usage="wfnet report RUN [options]",
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run, saved=lambda options: "an older report is left as it was")
    parser.add_argument("folder", metavar="RUN", help="folder of a run")
    group = parser.add_argument_group("report")
    group.add_argument("--output", metavar="FILE", help="HTML file (default: RUN/report.html)")
    group.add_argument(
        "--as-is",
        action="store_true",
        help="only what the folder holds: no figure is drawn, no network loaded",
    )
    group.add_argument(
        "-b",
        "--batch-size",
        type=settings.batch_size,
        default=256,
        metavar="N",
        help="samples of a forward pass, for the figure of confusion",
    )
    group.add_argument(
        "--seed", type=settings.seed, default=0, metavar="N", help="of splits and draws"
    )
    add_data_options(parser)
    add_model_options(parser)
    add_compute_options(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    folder = Path(options.folder)
    if options.threads:
        torch.set_num_threads(options.threads)
    path = Path(options.output or folder / "report.html")
    contents = read_contents(folder)
    if path.is_dir():
        raise ValueError(
            f"--output {path} is a folder: name a file, such as {path / 'report.html'}"
        )
    check_writable(path.absolute().parent)
    if not options.as_is:
        check_run_folder(folder)
        _draw(options, folder, contents)
    written = write_report(folder, path)
    print(f"{written} ({written.stat().st_size / 1e6:.1f} MB): open it in a browser")
    return 0


def _draw(options: argparse.Namespace, folder: Path, contents: Contents) -> None:
    net, classifier = load_network(options, folder)
    run = read_run(folder) if (folder / RUN_FILE).is_file() else {}
    names = run.get("classes") or [str(label) for label in range(net.num_classes)]
    change = data = None
    if options.data or options.data_dir:
        data = open_images(options, classifier, folder=folder)
        names = data.classes
    if data is not None and multi_hot_of(data.test) is None:
        change = _confusion(options, folder, net, data.test)
    draw_report(
        folder,
        net,
        names,
        contents.evaluation,
        change,
        contents.trust,
        {k: (r.acc_r, r.acc_f) for k, r in contents.retrained.items()},
    )


def _confusion(
    options: argparse.Namespace, folder: Path, net: WFNet, images: object
) -> ConfusionChange:
    """The confusion in the folder if it is newer than the filters, else it is counted."""
    path = folder / CONFUSION
    filters = folder / "wf_model.safetensors"
    if path.is_file() and path.stat().st_mtime >= filters.stat().st_mtime:
        return ConfusionChange.from_json(path)
    change = confusion_change(
        net,
        images,
        classes=untrained_classes(folder),
        other_rows=None if net.num_classes <= _ALL_ROWS else _SOME_ROWS,
        seed=options.seed,
        options=RunOptions(options.batch_size, options.workers, progress=not options.quiet),
    )
    change.to_json(path)
    return change
