"""`wfnet evaluate`: the measures of every class, as a table, files and figures."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from wfnet.baselines import read_baselines
from wfnet.cli.chosen_images import add_list_options, evaluated_images
from wfnet.cli.drawing import draw_run
from wfnet.cli.inputs import Run, data_name, joined_ranks
from wfnet.cli.options import (
    RECIPE_OR_FILE,
    Group,
    add_command,
    add_compute_options,
    add_data_options,
    add_model_options,
    add_seed_option,
    config_changes,
    log_base,
)
from wfnet.cli.runs import ATTRIBUTION, check_writable, versions
from wfnet.data import Dataset, Splits, multi_hot_of
from wfnet.data.standard_files import standard_name
from wfnet.evaluation import (
    EvaluationResult,
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
from wfnet.evaluation.partial import network_identity
from wfnet.evaluation.relearning import RelearnConfig, relearn_times
from wfnet.network import WFNet
from wfnet.services import settings
from wfnet.services.files import write_json
from wfnet.services.ranks import Ranks

EXAMPLE = """\
  wfnet evaluate runs/r50                   (network and data as `wfnet untrain` recorded them)
  wfnet evaluate runs/r50 --tables          (the paper's tables, with `wfnet baseline`'s results)
  wfnet evaluate runs/r50 --data-dir /data/other --retained-rows 20 --output runs/r50-other"""
PARTS = ("test", "validation", "train")
# What is known of an evaluation that is not finished.
PARTIAL = "unfinished_evaluation"


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = add_command(
        commands,
        run,
        "what is counted is kept; the same command goes on there",
        help="accuracy and ZRF of every class of a run: table, JSON, CSV, figures",
        description="Evaluate filters for all classes: Acc_f (accuracy on the forgotten class, low "
        "is good), Acc_r (accuracy on all others, high is good) and ZRF, next to the original "
        "network's. Every image is run under every row.",
        arguments="RUN [options]",
        example=EXAMPLE,
    )
    parser.add_argument("folder", nargs="?", metavar="RUN", help="folder of a run")
    parser.add_argument("--resume", metavar="RUN", help="the same, as in timm")
    group = Group(parser, "evaluation")
    group.add("--classes CLASS", "rows, by number or name (default: all)", nargs="+")
    group.add(
        "--retained-rows N",
        "for many classes: run each image under its own row and N random others, which makes Acc_r "
        "an estimate (default: all rows)",
        settings.positive_int,
    )
    text = "how other code departs from the definition of ZRF"
    group.add("--zrf-mode", text, tuple(ZRF_MODES), "definition")
    add_measure_options(group, "samples of a forward pass: an image under a row each")
    group.add("--output DIR", "folder for the results (default: RUN)")
    group.add("--config FILE", RECIPE_OR_FILE)
    group.add("--no-figures", "table, JSON and CSV only")
    _add_table_options(parser)
    add_relearn_options(parser)
    add_data_options(parser)
    add_model_options(parser)
    add_compute_options(parser)
    return parser


def add_measure_options(group: Group, samples: str) -> None:
    """On which images and how accuracies and ZRF are measured; ``samples`` explains a batch."""
    group.add("--split", "part of the data", PARTS, "test")
    group.add("--eval-list FILE", "list of the images to evaluate on")
    add_list_options(group)
    text = "base of the logarithm in ZRF: e or 2 (default: e)"
    group.add("--zrf-base BASE", text, log_base, log_base("e"))
    group.add("-b --batch-size N", samples, settings.batch_size, 256)
    add_seed_option(group)
    group.add("--max-corrupt N", "corrupt images that are left out", settings.non_negative_int)


def add_relearn_options(parser: argparse.ArgumentParser) -> None:
    """Relearn time: options of `wfnet evaluate --tables` and `wfnet baseline`."""
    group = Group(parser, "relearn time")
    text = "measure it (default: yes; it needs the training images)"
    group.add("--relearn", text, bool, True)
    group.add_fields(RelearnConfig, prefix="relearn-", defaults=RelearnConfig())


def relearn_config(options: argparse.Namespace) -> RelearnConfig | None:
    """Settings of the relearn time; None with ``--no-relearn``."""
    if not options.relearn:
        return None
    changes = config_changes(options, RelearnConfig, prefix="relearn-")
    return RelearnConfig(seed=options.seed, **changes)


def _add_table_options(parser: argparse.ArgumentParser) -> None:
    text = "The paper's Table 1 and Table 2 for this network, with the baselines in RUN."
    group = Group(parser, "tables", text)
    group.add(
        "--tables",
        "relearn time, insertion, deletion and groups of classes too, as JSON, CSV, Markdown",
    )
    group.add(
        "--published CELL",
        "published numbers to stand beside, for example cifar10/resnet18 (default: those of the "
        "same data and backbone)",
    )
    group.add("--baselines DIR", "results of `wfnet baseline` (default: RUN/baselines)")
    text = "steps of the insertion and deletion curves; 0 for no curves"
    group.add("--attribution-steps N", text, settings.int_from(0, MOST_STEPS), 20)
    group.add(
        "--attribution-order",
        "which gates count as most relevant: the lowest (the paper's), or the farthest from 1",
        tuple(ORDERS),
        "lowest",
    )
    text = "how many classes are forgotten at once; none for no groups (default: 2)"
    group.add("--group-sizes N", text, settings.int_from(2), [2], nargs="*")
    text = "groups of each size that are drawn by --seed, where there are more"
    group.add("--groups N", text, settings.int_from(1, 100_000), 100)


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
            zrf_mode=options.zrf_mode,
            **{**vars(how), "records": partial / "counts.safetensors"},
        )
    if not ranks.first:
        return
    result.settings["split"] = options.split
    result.to_json(output / "evaluation.json")
    result.to_csv(output / "evaluation.csv")
    written = ["evaluation.json", "evaluation.csv"]
    if isinstance(result, EvaluationResult) and not options.no_figures:
        written += draw_run(output, net, images.classes, result)
    print(result.table())
    if options.tables:
        evaluated = {"net": net, "images": images, "classes": classes}
        how = replace(how, ranks=None)
        written += _write_tables(options, data, result, baselines, output, evaluated, how)
    print(f"\nin {output}: {', '.join(written)}  ({result.seconds:.1f} s)")
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
    check_baselines(baselines, options.zrf_base, options.zrf_mode, relearning)
    return baselines


def _check_table_data(
    options: argparse.Namespace, data: Splits, baselines: list[dict[str, Any]]
) -> None:
    if multi_hot_of(data.test) is not None:
        raise ValueError(
            "the paper's tables are of images with one label each: leave out --tables to evaluate "
            "average precisions"
        )
    for baseline in baselines:
        for record in baseline["evaluation"]["classes"]:
            if data.classes[record["index"]] != record["name"]:
                raise ValueError(
                    f"baseline {baseline['method']} is of other classes: its class "
                    f"{record['index']} is {record['name']!r}, that of {data.name} "
                    f"{data.classes[record['index']]!r}; give the --baselines of this run"
                )
    if options.relearn and not len(data.train):
        raise ValueError(
            f"{data.name} has no training images, from which the relearn time is measured: give "
            "--no-relearn"
        )


def _write_tables(
    options: argparse.Namespace,
    data: Splits,
    result: EvaluationResult,
    baselines: list[dict[str, Any]],
    output: Path,
    evaluated: dict[str, Any],
    how: RunOptions,
) -> list[str]:
    """Measures what else the tables need, prints and writes them; returns the names."""
    net, images, classes = evaluated.values()

    def kept_in(name: str) -> RunOptions:
        return replace(how, records=output / PARTIAL / name)

    written = ["tables.json", "tables.csv", "tables.md"]
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
        written.append("relearning.json")
    if options.attribution_steps:
        curves = attribution(
            net,
            images,
            classes,
            options.attribution_steps,
            options.attribution_order,
            options.seed,
            options=kept_in(ATTRIBUTION),
        )
        write_json(output / ATTRIBUTION, curves.as_dict())
        written.append(ATTRIBUTION)
    groups = []
    for size in dict.fromkeys(options.group_sizes):
        if classes is None and size < net.num_classes:
            chosen = choose_groups(net.num_classes, size, options.groups, options.seed)
            kept = kept_in(f"groups_of_{size}.json")
            groups.append(evaluate_groups(net, images, chosen, kept))
    own = None
    if options.split == "test" and classes is None:
        own = _own_cell(options, net, data, images)
    title = f"{data.name} x {options.model}"
    cell = options.published or own
    tables = make_tables(title, result, relearning, curves, baselines, groups, cell)
    if cell != own:
        tables.settings["published"] = (
            "these data, this network or these classes are others than the paper's, as far as "
            "their content shows"
        )
    tables.settings["versions"] = versions()
    tables.write(output)
    print(f"\n{tables.markdown()}")
    return written


def _own_cell(options: argparse.Namespace, net: WFNet, data: Splits, images: Dataset) -> str | None:
    """The published cell of the same experiment: all classes of the same test images."""
    known = standard_name(data_name(options), options.data_dir, data.classes)
    # Of ImageNet the paper takes some images of each class, of the others all.
    if known != "imagenet" and len(images) != len(data.test):
        return None
    parameters = sum(p.numel() for p in net.model.parameters())
    parameters -= sum(p.numel() for p in net.filter_parameters())
    return published_cell(known, options.model or "", parameters)
