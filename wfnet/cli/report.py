"""one self-contained HTML page about a run

Write one HTML page about a run that loads nothing from elsewhere: results of every class (sortable,
with a search), figures, trust checks with what forgetting protects against and what not,
definitions, configuration.

example:
  wfnet report runs/r50
  wfnet report runs/r50 --as-is --output r50.html      (only what the folder holds, no network)

Before it: wfnet evaluate, wfnet trust and wfnet baseline make what the page shows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from wfnet.cli.drawing import draw_run
from wfnet.cli.inputs import Run
from wfnet.cli.options import Parser, add_command
from wfnet.cli.runs import CONFUSION, check_writable
from wfnet.data import Dataset, multi_hot_of
from wfnet.evaluation.confusion import ConfusionChange, confusion_change
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.network import WFNet
from wfnet.pretrained import FILTERS_NAME
from wfnet.report.contents import Contents, read_contents
from wfnet.report.page import write_report
from wfnet.services import settings

# Where there are more classes than this, images run under some of the other rows only.
_ALL_ROWS, _SOME_ROWS = 100, 10


def add_parser(commands: argparse._SubParsersAction) -> Parser:
    parser = add_command(commands, run, "an older report is left as it was", "RUN [options]")
    group = parser.group("report")
    group.add_all(
        """
        --output FILE  HTML file (default: RUN/report.html)
        --as-is  only what the folder holds: no figure is drawn, no network loaded
        -b --batch-size N  samples of a forward pass, for the figure of confusion [default: 256]
        """,
        batch_size=settings.batch_size,
    )
    group.add_seed("of splits and draws")
    parser.add_inputs()
    return parser


def run(options: argparse.Namespace) -> None:
    folder = Path(options.folder)
    path = Path(options.output or folder / "report.html")
    contents = read_contents(folder)
    if path.is_dir():
        raise ValueError(
            f"--output {path} is a folder: name a file, such as {path / 'report.html'}"
        )
    check_writable(path.absolute().parent)
    if not options.as_is:
        _draw(options, contents)
    written = write_report(folder, path)
    print(f"{written} ({written.stat().st_size / 1e6:.1f} MB): open it in a browser")


def _draw(options: argparse.Namespace, contents: Contents) -> None:
    work_on = Run(options)
    net, classifier = work_on.network()
    names = work_on.names or [str(label) for label in range(net.num_classes)]
    change = None
    if options.data or options.data_dir:
        data = work_on.images(classifier)
        names = data.classes
        if multi_hot_of(data.test) is None:
            change = _confusion(options, work_on, net, data.test)
    retrained = {k: (r.acc_r, r.acc_f) for k, r in contents.retrained.items()}
    draw_run(work_on.folder, net, names, contents.evaluation, change, contents.trust, retrained)


def _confusion(
    options: argparse.Namespace, work_on: Run, net: WFNet, images: Dataset
) -> ConfusionChange:
    """The confusion in the folder if it is newer than the filters, else it is counted."""
    path, filters = work_on.folder / CONFUSION, work_on.folder / FILTERS_NAME
    if path.is_file() and path.stat().st_mtime >= filters.stat().st_mtime:
        return ConfusionChange.from_json(path)
    change = confusion_change(
        net,
        images,
        classes=work_on.untrained,
        other_rows=None if net.num_classes <= _ALL_ROWS else _SOME_ROWS,
        seed=options.seed,
        options=RunOptions(options.batch_size, options.workers, progress=not options.quiet),
    )
    change.to_json(path)
    return change
