"""`wfnet evaluate`: the measures of every class, as a table, files and figures."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from wfnet.baselines import read_baselines
from wfnet.cli.chosen_images import add_list_options, evaluated_images
from wfnet.cli.drawing import draw_evaluation
from wfnet.cli.inputs import (
    check_class_count,
    check_run_folder,
    choose_device,
    class_indices,
    data_name,
    load_network,
    open_images,
    untrained_classes,
)
from wfnet.cli.options import (
    HelpFormatter,
    add_compute_options,
    add_config_options,
    add_data_options,
    add_model_options,
    config_changes,
    log_base,
)
from wfnet.cli.runs import check_writable, versions
from wfnet.data import Dataset, Splits, multi_hot_of
from wfnet.data.standard_files import standard_name
from wfnet.evaluation import (
    EvaluationResult,
    MultiLabelResult,
    choose_groups,
    evaluate,
    evaluate_groups,
    evaluate_multi_label,
)
from wfnet.evaluation.attribution import MOST_STEPS, ORDERS, attribution
from wfnet.evaluation.metrics import ZRF_MODES
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.evaluation.paper_tables import (
    check_baselines,
    make_tables,
    published,
    published_cell,
)
from wfnet.evaluation.relearning import RelearnConfig, relearn_times
from wfnet.network import WFNet
from wfnet.services import settings
from wfnet.services.files import write_json
from wfnet.services.ranks import Ranks, joined, local_device

EXAMPLE = """example:
  wfnet evaluate runs/r50                   (network and data as `wfnet untrain` recorded them)
  wfnet evaluate runs/r50 --tables          (the paper's tables, with `wfnet baseline`'s results)
  wfnet evaluate runs/r50 --data-dir /data/other --retained-rows 20 --output runs/r50-other"""
PARTS = ("test", "validation", "train")
# What is known of an evaluation that is not finished.
PARTIAL = "unfinished_evaluation"


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
    parser.set_defaults(
        run=run, saved=lambda options: "what is counted is kept; the same command goes on there"
    )
    parser.add_argument("folder", nargs="?", metavar="RUN", help="folder of a run")
    parser.add_argument("--resume", metavar="RUN", help="the same, as in timm")
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="rows, by number or name (default: all)"
    )
    group.add_argument(
        "--retained-rows",
        type=settings.positive_int,
        metavar="N",
        help="for many classes: run each image under its own row and N random others, which makes "
        "Acc_r an estimate (default: all rows)",
    )
    group.add_argument(
        "--zrf-mode",
        choices=tuple(ZRF_MODES),
        default="definition",
        help="how other code departs from the definition of ZRF",
    )
    add_measure_options(group, "samples of a forward pass: an image under a row each")
    group.add_argument("--output", metavar="DIR", help="folder for the results (default: RUN)")
    group.add_argument("--config", metavar="FILE", help="options from a file, or a recipe by name")
    group.add_argument("--no-figures", action="store_true", help="table, JSON and CSV only")
    _add_table_options(parser)
    add_relearn_options(parser)
    add_data_options(parser)
    add_model_options(parser)
    add_compute_options(parser)
    return parser


def add_measure_options(group: argparse._ActionsContainer, samples: str) -> None:
    """On which images and how accuracies and ZRF are measured; ``samples`` explains a batch."""
    group.add_argument("--split", choices=PARTS, default="test", help="part of the data")
    group.add_argument("--eval-list", metavar="FILE", help="list of the images to evaluate on")
    add_list_options(group)
    group.add_argument(
        "--zrf-base",
        type=log_base,
        default=log_base("e"),
        metavar="BASE",
        help="base of the logarithm in ZRF: e or 2 (default: e)",
    )
    group.add_argument(
        "-b", "--batch-size", type=settings.batch_size, default=256, metavar="N", help=samples
    )
    group.add_argument(
        "--seed", type=settings.seed, default=0, metavar="N", help="of everything random"
    )
    group.add_argument(
        "--max-corrupt",
        type=settings.non_negative_int,
        metavar="N",
        help="corrupt images that are left out",
    )


def add_relearn_options(parser: argparse.ArgumentParser) -> None:
    """Relearn time: options of `wfnet evaluate --tables` and `wfnet baseline`."""
    group = parser.add_argument_group("relearn time")
    group.add_argument(
        "--relearn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure it (default: yes; it needs the training images)",
    )
    add_config_options(group, RelearnConfig, prefix="relearn-", defaults=RelearnConfig())


def relearn_config(options: argparse.Namespace) -> RelearnConfig | None:
    """Settings of the relearn time; None with ``--no-relearn``."""
    if not options.relearn:
        return None
    changes = config_changes(options, RelearnConfig, prefix="relearn-")
    return RelearnConfig(seed=options.seed, **changes)


def _add_table_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "tables", "The paper's Table 1 and Table 2 for this network, with the baselines in RUN."
    )
    group.add_argument(
        "--tables",
        action="store_true",
        help="relearn time, insertion, deletion and groups of classes too, as JSON, CSV, Markdown",
    )
    group.add_argument(
        "--published",
        metavar="CELL",
        help="published numbers to stand beside, for example cifar10/resnet18 (default: those of "
        "the same data and backbone)",
    )
    group.add_argument(
        "--baselines", metavar="DIR", help="results of `wfnet baseline` (default: RUN/baselines)"
    )
    group.add_argument(
        "--attribution-steps",
        type=settings.int_from(0, MOST_STEPS),
        default=20,
        metavar="N",
        help="steps of the insertion and deletion curves; 0 for no curves",
    )
    group.add_argument(
        "--attribution-order",
        choices=ORDERS,
        default="lowest",
        help="which gates count as most relevant: the lowest (the paper's), or the farthest from 1",
    )
    group.add_argument(
        "--group-sizes",
        nargs="*",
        type=settings.int_from(2),
        default=[2],
        metavar="N",
        help="how many classes are forgotten at once; none for no groups (default: 2)",
    )
    group.add_argument(
        "--groups",
        type=settings.int_from(1, 100_000),
        default=100,
        metavar="N",
        help="groups of each size that are drawn by --seed, where there are more",
    )


def run(options: argparse.Namespace) -> int:
    if not options.folder and not options.resume:
        raise ValueError("name the folder of a run: wfnet evaluate RUN")
    folder = Path(options.folder or options.resume)
    if options.threads:
        torch.set_num_threads(options.threads)
    with contextlib.ExitStack() as inside:
        ranks = inside.enter_context(joined(local_device(choose_device(options.device))))
        if not ranks.first:
            nowhere = inside.enter_context(open(os.devnull, "w"))
            inside.enter_context(contextlib.redirect_stdout(nowhere))
        _run(options, folder, ranks)
    return 0


def _run(options: argparse.Namespace, folder: Path, ranks: Ranks) -> None:
    config = check_run_folder(folder)
    output = Path(options.output or folder)
    check_class_count(options, folder, config["num_classes"], "evaluate on")
    _check_published(options.published)
    tables = _TableParts(options, folder, config["num_classes"]) if options.tables else None
    check_writable(output)
    net, classifier = load_network(options, folder)
    data = open_images(options, classifier, folder=folder)
    if tables is not None:
        tables.check_data(data)
    with ranks.first_ahead():
        images = evaluated_images(options, data, folder, output)
    classes = untrained_classes(folder)
    if options.classes:
        classes = class_indices(options.classes, images.classes, net.num_classes)
    partial = output / PARTIAL
    run_options = RunOptions(
        options.batch_size,
        options.workers,
        options.max_corrupt,
        torch.bfloat16 if options.amp else None,
        options.channels_last,
        not options.quiet,
        partial / "average_precisions.json",
        ranks,
    )
    if multi_hot_of(images) is not None:
        result = evaluate_multi_label(net, images, classes, options=run_options)
    else:
        result = evaluate(
            net,
            images,
            classes,
            zrf_base=options.zrf_base,
            seed=options.seed,
            retained_rows=options.retained_rows,
            zrf_mode=options.zrf_mode,
            **{**vars(run_options), "records": partial / "counts.safetensors"},
        )
    if not ranks.first:
        return
    result.settings["split"] = options.split
    figures = not options.no_figures and isinstance(result, EvaluationResult)
    written = write_results(result, net, images, output, figures)
    print(result.table())
    if tables is not None:
        written += tables.write(net, data, images, classes, result, output, run_options)
    print(f"\nin {output}: {', '.join(written)}  ({result.seconds:.1f} s)")
    shutil.rmtree(partial, ignore_errors=True)


def _check_published(cell: str | None) -> None:
    cells = published()["cells"]
    if cell is not None and cell not in cells:
        raise ValueError(f"nothing was published for {cell!r}; there is {', '.join(cells)}")


class _TableParts:
    """What ``--tables`` adds: its options are checked first, the long work comes last.

    Raises:
        ValueError: for options or baselines that do not fit.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, num_classes: int):
        self.options = options
        for size in options.group_sizes:
            # Pairs are the default: a network of two classes goes without.
            if size >= num_classes and (size, num_classes) != (2, 2):
                raise ValueError(
                    f"--group-sizes {size} leaves none of the {num_classes} classes to retain: "
                    f"give numbers from 2 to {num_classes - 1}"
                )
        self.relearn = relearn_config(options)
        if options.baselines and not Path(options.baselines).is_dir():
            raise FileNotFoundError(
                f"--baselines {options.baselines} is no folder; give that of `wfnet baseline`"
            )
        self.baselines = read_baselines(options.baselines or folder / "baselines")
        relearning = None if self.relearn is None else asdict(self.relearn)
        check_baselines(self.baselines, options.zrf_base, options.zrf_mode, relearning)

    def check_data(self, data: Splits) -> None:
        """Raises ValueError for data on which the tables cannot be made."""
        if multi_hot_of(data.test) is not None:
            raise ValueError(
                "the paper's tables are of images with one label each: leave out --tables to "
                "evaluate average precisions"
            )
        for baseline in self.baselines:
            for record in baseline["evaluation"]["classes"]:
                if data.classes[record["index"]] != record["name"]:
                    raise ValueError(
                        f"baseline {baseline['method']} is of other classes: its class "
                        f"{record['index']} is {record['name']!r}, that of {data.name} "
                        f"{data.classes[record['index']]!r}; give the --baselines of this run"
                    )
        if self.relearn is not None and not len(data.train):
            raise ValueError(
                f"{data.name} has no training images, from which the relearn time is measured: "
                "give --no-relearn"
            )

    def _own_cell(
        self, net: WFNet, data: Splits, images: Dataset, classes: list[int] | None
    ) -> str | None:
        """The published cell of the same experiment: all classes of the same test images."""
        options = self.options
        if options.split != "test" or classes is not None:
            return None
        known = standard_name(data_name(options), options.data_dir, data.classes)
        # Of ImageNet the paper takes some images of each class, of the others all.
        if known != "imagenet" and len(images) != len(data.test):
            return None
        parameters = sum(p.numel() for p in net.model.parameters())
        parameters -= sum(p.numel() for p in net.filter_parameters())
        return published_cell(known, options.model or "", parameters)

    def write(
        self,
        net: WFNet,
        data: Splits,
        images: Dataset,
        classes: list[int] | None,
        result: EvaluationResult,
        output: Path,
        run_options: RunOptions,
    ) -> list[str]:
        """Measures what else the tables need, prints and writes them; returns the names."""
        options = self.options

        def kept_in(name: str) -> RunOptions:
            return replace(run_options, records=output / PARTIAL / name, ranks=None)

        written = ["tables.json", "tables.csv", "tables.md"]
        relearning = curves = None
        if self.relearn is not None:
            relearning = relearn_times(
                net,
                data.train,
                images,
                classes=classes,
                config=self.relearn,
                options=kept_in("relearning.json"),
            )
            write_json(output / "relearning.json", relearning.as_dict())
            written.append("relearning.json")
        if options.attribution_steps:
            curves = attribution(
                net,
                images,
                classes,
                options.attribution_steps,
                options.attribution_order,
                options.seed,
                options=kept_in("attribution.json"),
            )
            write_json(output / "attribution.json", curves.as_dict())
            written.append("attribution.json")
        groups = []
        for size in dict.fromkeys(options.group_sizes):
            if classes is not None or size >= net.num_classes:
                continue
            chosen = choose_groups(net.num_classes, size, options.groups, options.seed)
            kept = kept_in(f"groups_of_{size}.json")
            groups.append(evaluate_groups(net, images, chosen, kept))
        title = f"{data.name} x {options.model}"
        own = self._own_cell(net, data, images, classes)
        cell = options.published or own
        tables = make_tables(title, result, relearning, curves, self.baselines, groups, cell)
        if cell != own:
            tables.settings["published"] = (
                "these data, this network or these classes are others than the paper's, as far as "
                "their content shows"
            )
        tables.settings["versions"] = versions()
        tables.to_json(output / "tables.json")
        tables.to_csv(output / "tables.csv")
        tables.to_markdown(output / "tables.md")
        print(f"\n{tables.markdown()}")
        return written


def write_results(
    result: EvaluationResult | MultiLabelResult,
    net: WFNet,
    images: Dataset,
    folder: Path,
    figures: bool = True,
) -> list[str]:
    """Writes JSON, CSV and, where matplotlib is installed, figures; returns their names."""
    result.to_json(folder / "evaluation.json")
    result.to_csv(folder / "evaluation.csv")
    written = ["evaluation.json", "evaluation.csv"]
    return written + (draw_evaluation(result, net, images.classes, folder) if figures else [])
