"""accuracy and ZRF of every class of a run: table, JSON, CSV, figures

Evaluate filters for all classes: Acc_f (accuracy on the forgotten class, low is good), Acc_r
(accuracy on all others, high is good) and ZRF, next to the original network's. Every image is run
under every row.

example:
  wfnet evaluate runs/r50                   (network and data as `wfnet untrain` recorded them)
  wfnet evaluate runs/r50 --tables          (the paper's tables, with `wfnet baseline`'s results)
  wfnet evaluate runs/r50 --data-dir /data/other --retained-rows 20 --output runs/r50-other
"""

import argparse
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from wfnet.baselines import read_baselines
from wfnet.benchmarking.provenance import versions
from wfnet.cli.chosen_images import add_list_options, evaluated_images
from wfnet.cli.inputs import Run, joined_ranks
from wfnet.cli.options import Group, Parser, add_command, config_changes, log_base
from wfnet.cli.report import draw_run
from wfnet.cli.runs import ATTRIBUTION, check_writable
from wfnet.data import Dataset, Splits, multi_hot_of
from wfnet.evaluation import (
    EvaluationResult,
    MultiLabelResult,
    choose_groups,
    evaluate,
    evaluate_groups,
    evaluate_multi_label,
)
from wfnet.evaluation.attribution import MOST_STEPS, attribution
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.evaluation.paper_tables import check_baselines, make_tables, published
from wfnet.evaluation.partial import network_identity
from wfnet.evaluation.relearning import RelearnConfig, relearn_times
from wfnet.network import WFNet
from wfnet.services import settings
from wfnet.services.files import write_json
from wfnet.services.ranks import Ranks

PARTS = ("test", "validation", "train")
# Settings of the relearn time that are options.
_RELEARN = ("samples", "max_epochs", "optimizer", "lr", "batch_norm")
# What is known of an evaluation that is not finished.
PARTIAL = "unfinished_evaluation"


def add_parser(commands: argparse._SubParsersAction) -> Parser:
    parser = add_command(
        commands,
        run,
        "what is counted is kept; the same command goes on there",
        "RUN [options]",
        resume=True,
    )
    group = parser.group("evaluation")
    group.add_all(
        """
        --classes CLASS...  rows, by number or name (default: all)
        --retained-rows N  for many classes: run each image under its own row and N random others,
            which makes Acc_r an estimate (default: all rows)
        --output DIR  folder for the results (default: RUN)
        --no-figures  table, JSON and CSV only
        """
    )
    add_measure_options(group, "samples of a forward pass: an image under a row each")
    group.add_config()
    _add_table_options(parser)
    add_relearn_options(parser)
    parser.add_inputs()
    return parser


def add_measure_options(group: Group, samples: str) -> None:
    """On which images and how accuracies and ZRF are measured; ``samples`` explains a batch."""
    group.add_all(
        f"""
        --split  part of the data [default: test]
        --eval-list FILE  list of the images to evaluate on
        --zrf-base BASE  base of the logarithm in ZRF: e or 2 [default: e]
        -b --batch-size N  {samples} [default: 256]
        --max-corrupt N  corrupt images that are left out
        """,
        split=PARTS,
        zrf_base=log_base,
        batch_size=settings.batch_size,
        max_corrupt=settings.non_negative_int,
    )
    add_list_options(group)
    group.add_seed()


def add_relearn_options(parser: Parser) -> None:
    """Relearn time: options of `wfnet evaluate --tables` and `wfnet baseline`."""
    group = parser.group("relearn time")
    text = "measure it (default: yes; it needs the training images)"
    group.add("--relearn", text, bool, True)
    group.add_fields(RelearnConfig, *_RELEARN, prefix="relearn-", defaults=RelearnConfig())


def relearn_config(options: argparse.Namespace) -> RelearnConfig | None:
    """Settings of the relearn time; None with ``--no-relearn``."""
    if not options.relearn:
        return None
    changes = config_changes(options, RelearnConfig, *_RELEARN, prefix="relearn-")
    return RelearnConfig(seed=options.seed, **changes)


def _add_table_options(parser: Parser) -> None:
    text = "The paper's Table 1 and Table 2 for this network, with the baselines in RUN."
    group = parser.group("tables", text)
    group.add_all(
        """
        --tables  relearn time, insertion, deletion and groups of classes too, as JSON, CSV,
            Markdown
        --published CELL  published numbers to stand beside, for example cifar10/resnet18
        --baselines DIR  results of `wfnet baseline` (default: RUN/baselines)
        --attribution-steps N  steps of the insertion and deletion curves; 0 for no curves
            [default: 20]
        --group-sizes [N...]  how many classes are forgotten at once; none for no groups
            [default: 2]
        --groups N  groups of each size that are drawn by --seed, where there are more
            [default: 100]
        """,
        attribution_steps=settings.int_from(0, MOST_STEPS),
        group_sizes=settings.int_from(2),
        groups=settings.int_from(1, 100_000),
    )


def run(options: argparse.Namespace) -> None:
    work_on = Run(options)
    with joined_ranks(options) as ranks:
        _run(options, work_on, ranks)


def _run(options: argparse.Namespace, work_on: Run, ranks: Ranks) -> None:
    output = Path(options.output or work_on.folder)
    work_on.check_data()
    baselines = _check_options(options, work_on)
    check_writable(output)
    net, classifier = work_on.network()
    data = work_on.images(classifier)
    if options.tables:
        _check_table_data(options, data, baselines)
    with ranks.first_ahead():
        images = evaluated_images(options, data, work_on.folder, output)
    classes = work_on.class_numbers(options.classes, images.classes)
    partial = output / PARTIAL
    how = RunOptions(
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
        result = evaluate_multi_label(net, images, classes, options=how)
    else:
        result = evaluate(
            net,
            images,
            classes,
            zrf_base=options.zrf_base,
            seed=options.seed,
            retained_rows=options.retained_rows,
            **{**vars(how), "records": partial / "counts.safetensors"},
        )
    if not ranks.first:
        return
    result.settings["split"] = options.split
    result.to_json(output / "evaluation.json")
    result.to_csv(output / "evaluation.csv")
    if not options.no_figures:
        draw_run(output, net, images.classes, result)
    print(result.table())
    if options.tables:
        how = replace(how, ranks=None)
        _write_tables(options, data, result, baselines, output, (net, images, classes), how)
    made = "evaluation.json, evaluation.csv" + ", tables.json, tables.md" * options.tables
    print(f"\nin {output}: {made}  ({result.seconds:.1f} s)")
    shutil.rmtree(partial, ignore_errors=True)


# -- tables: options are checked first, the long work comes last ----------------------------------


def _check_options(options: argparse.Namespace, work_on: Run) -> list[dict[str, Any]]:
    """Returns the results of baselines that ``--tables`` shows.

    Raises:
        FileNotFoundError, ValueError: for options or baselines that do not fit.
    """
    cells = published()["cells"]
    if options.published is not None and options.published not in cells:
        raise ValueError(
            f"nothing was published for {options.published!r}; there is {', '.join(cells)}"
        )
    if not options.tables:
        return []
    count = work_on.num_classes
    for size in options.group_sizes:
        # Pairs are the default: a network of two classes goes without.
        if size >= count and (size, count) != (2, 2):
            raise ValueError(
                f"--group-sizes {size} leaves none of the {count} classes to retain: give numbers "
                f"from 2 to {count - 1}"
            )
    if options.baselines and not Path(options.baselines).is_dir():
        raise FileNotFoundError(
            f"--baselines {options.baselines} is no folder; give that of `wfnet baseline`"
        )
    baselines = read_baselines(options.baselines or work_on.folder / "baselines")
    relearn = relearn_config(options)
    relearning = None if relearn is None else asdict(relearn)
    check_baselines(baselines, options.zrf_base, relearning)
    return baselines


def _check_table_data(
    options: argparse.Namespace, data: Splits, baselines: list[dict[str, Any]]
) -> None:
    if multi_hot_of(data.test) is not None:
        if options.published is not None:
            raise ValueError(
                f"{data.name} has several labels per image: nothing was published of average "
                "precisions; leave out --published"
            )
        # Of images with one label each: confidence in the class, accuracy on it.
        options.relearn, options.attribution_steps = False, 0
    for baseline in baselines:
        classes = baseline["evaluation"]["classes"]
        if any(data.classes[record["index"]] != record["name"] for record in classes):
            raise ValueError(
                f"baseline {baseline['method']} is of other classes than those of {data.name}; "
                "give the --baselines of this run"
            )
    if options.relearn and not len(data.train):
        raise ValueError(
            f"{data.name} has no training images, from which the relearn time is measured: give "
            "--no-relearn"
        )


def _write_tables(
    options: argparse.Namespace,
    data: Splits,
    result: EvaluationResult | MultiLabelResult,
    baselines: list[dict[str, Any]],
    output: Path,
    evaluated: tuple[WFNet, Dataset, list[int] | None],
    how: RunOptions,
) -> None:
    """Measures what else the tables need, prints and writes them."""
    net, images, classes = evaluated

    def kept_in(name: str) -> RunOptions:
        return replace(how, records=output / PARTIAL / name)

    relearning = curves = None
    relearn = relearn_config(options)
    if relearn is not None:
        relearning = relearn_times(
            net.bake,
            data.train,
            images,
            net.bake(None),
            classes,
            relearn,
            kept_in("relearning.json"),
            network_identity(net),
        )
        write_json(output / "relearning.json", relearning.as_dict())
    if options.attribution_steps:
        curves = attribution(
            net,
            images,
            classes,
            options.attribution_steps,
            options.seed,
            options=kept_in(ATTRIBUTION),
        )
        write_json(output / ATTRIBUTION, curves.as_dict())
    groups = []
    for size in dict.fromkeys(options.group_sizes):
        if classes is None and size < net.num_classes:
            chosen = choose_groups(net.num_classes, size, options.groups, options.seed)
            kept = kept_in(f"groups_of_{size}.json")
            groups.append(evaluate_groups(net, images, chosen, kept))
    title = f"{data.name} x {options.model}"
    tables = make_tables(title, result, relearning, curves, baselines, groups, options.published)
    tables.settings["versions"] = versions()
    tables.write(output)
    print(f"\n{tables.markdown()}")
