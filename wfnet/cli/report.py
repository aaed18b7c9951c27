"""one self-contained HTML page about a run

Write one HTML page about a run that loads nothing from elsewhere: what forgetting protects against
and what not, what attacks bring back, methods side by side, results of every class, figures,
definitions, configuration. Tables sort by a click, classes are searched by name, methods chosen.

example:
  wfnet report runs/r50
  wfnet report runs/r50 --as-is --output r50.html      (only what the folder holds, no network)

Before it: wfnet evaluate, wfnet trust and wfnet baseline make what the page shows.
"""

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wfnet.cli.inputs import Run
from wfnet.cli.options import Parser, add_command
from wfnet.cli.runs import ATTRIBUTION, CONFUSION, check_writable
from wfnet.data import Dataset, multi_hot_of
from wfnet.evaluation.attribution import AttributionRecord, AttributionResult
from wfnet.evaluation.confusion import ConfusionChange, confusion_change
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.network import WFNet
from wfnet.pretrained import FILTERS_NAME
from wfnet.report import figures
from wfnet.report.contents import Contents, Evaluation, read_contents
from wfnet.report.page import write_report
from wfnet.services import settings
from wfnet.services.log import logger
from wfnet.services.records import read_json

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
    group.add_seed("of draws; images are split as in the run")
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
    draw_run(work_on.folder, net, names, contents.evaluation, change)


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


def draw_run(
    folder: Path,
    net: WFNet,
    names: Sequence[str],
    result: Evaluation | None = None,
    change: ConfusionChange | None = None,
) -> None:
    """Draws every figure that its arguments allow, where matplotlib is installed.

    Args:
        folder: of the run; its ``attribution.json`` is drawn, too.
        net: the filtered network.
        names: of all classes.
        result, change: results, where there are any.
    """
    if not _can_draw():
        return
    rows = list(range(net.num_classes))
    if result is not None:
        rows = [record.index for record in result.records]
        figures.overview(result, net, folder / "overview.png")
    figures.gate_heatmap(net, folder / "gates.png", classes=rows, names=names)
    figures.association_graph(net, folder / "associations.png", names=names, classes=rows)
    if change is not None:
        figures.confusion(change, folder / "confusion.png")
    path = folder / ATTRIBUTION
    if path.is_file():
        curves = read_json(path, _curves, "curves of `wfnet evaluate`", "delete it")
        figures.insertion_deletion(curves, folder / "attribution.png")


def _curves(content: Mapping[str, Any]) -> AttributionResult:
    records = [AttributionRecord(**record) for record in content["classes"]]
    return AttributionResult(content["shares"], records, content["settings"], content["seconds"])


def draw_training(history: Sequence[Mapping[str, object]], folder: Path) -> None:
    """Draws losses and accuracies of untraining, where matplotlib is installed."""
    if _can_draw():
        figures.training_curves(history, folder / "training_curves.png")


def _can_draw() -> bool:
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        logger.warning("no figures: matplotlib is not installed (`pip install wfnet[viz]`)")
    return found
