"""`wfnet baseline`: what filters are compared with, one unlearned model per class."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from wfnet.baselines import (
    METHODS,
    BaselineConfig,
    BaselineModels,
    Origin,
    run_baseline,
)
from wfnet.cli.chosen_images import evaluated_images
from wfnet.cli.evaluate import add_measure_options, add_relearn_options, relearn_config
from wfnet.cli.inputs import (
    check_class_count,
    check_run_folder,
    choose_device,
    class_indices,
    make_classifier,
    open_images,
)
from wfnet.cli.options import (
    HelpFormatter,
    add_compute_options,
    add_data_options,
    add_model_options,
    key_value,
)
from wfnet.cli.runs import check_writable, versions
from wfnet.cli.train import (
    add_training_options,
    chosen_training,
    default_training,
    recorded_training,
)
from wfnet.data import multi_hot_of
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.services.files import write_json

FOLDER = "baselines"
EXAMPLE = """example:
  wfnet baseline runs/wf                    (all methods, all classes; again to go on)
  wfnet baseline runs/wf --methods retrained --classes 0 1 --set neggrad_plus.lr=0.003
  wfnet evaluate runs/wf --tables           (the tables, with the baselines that are there)"""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "baseline",
        help="retrained, random labels, negative gradient, NegGrad+: per class, same measures",
        description="Make and evaluate the usual ways of unlearning, one model per class, with the "
        "measures of `wfnet evaluate`. An interrupted run goes on where it stopped, class by "
        "class, when the command is given again.",
        usage="wfnet baseline RUN [options]",
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(
        run=run, saved=lambda options: "finished classes are kept; the same command goes on"
    )
    parser.add_argument("folder", nargs="?", metavar="RUN", help="folder of a run of untraining")
    parser.add_argument("--resume", metavar="RUN", help="the same, as in timm")
    group = parser.add_argument_group("baselines")
    group.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help=f"of {', '.join(METHODS)} (default: all)",
    )
    group.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="by number or name (default: all)"
    )
    group.add_argument(
        "--set",
        nargs="+",
        default=[],
        type=_setting,
        metavar="METHOD.NAME=VALUE",
        help="settings of a method: " + ", ".join(field.name for field in fields(BaselineConfig)),
    )
    group.add_argument(
        "--keep-models",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the weights of every class and method (default: yes)",
    )
    add_measure_options(group, "of evaluation")
    group.add_argument("--output", metavar="DIR", help=f"folder (default: RUN/{FOLDER})")
    group.add_argument("--config", metavar="FILE", help="options from a file, or a recipe by name")
    add_relearn_options(parser)
    add_training_options(parser, "train-")
    add_data_options(parser)
    add_model_options(parser)
    add_compute_options(parser)
    return parser


def _setting(text: str) -> tuple[str, str, Any]:
    """``neggrad_plus.lr=0.003`` -> method, name, value."""
    method, dot, rest = text.partition(".")
    known = {field.name for field in fields(BaselineConfig)}
    try:
        name, value = key_value(rest)
    except argparse.ArgumentTypeError:
        name, value = "", None
    if not dot or method not in METHODS or name not in known:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not METHOD.NAME=VALUE with a method of {', '.join(METHODS)} and a "
            f"setting of {', '.join(sorted(known))}"
        )
    return method, name, value


def run(options: argparse.Namespace) -> int:
    if not options.folder and not options.resume:
        raise ValueError("name the folder of a run: wfnet baseline RUN")
    folder = Path(options.folder or options.resume)
    if options.threads:
        torch.set_num_threads(options.threads)
    config = check_run_folder(folder)
    output = Path(options.output or folder / FOLDER)
    for method, name, value in options.set:
        if method not in options.methods:
            raise ValueError(f"--set {method}.{name}={value}: {method} is not among --methods")
    configs = {method: _config(method, options) for method in options.methods}
    num_classes = config["num_classes"]
    check_class_count(options, folder, num_classes, "use")
    training = _training(options)
    check_writable(output)
    device = choose_device(options.device)
    original = make_classifier(options, num_classes, str(folder)).to(device)
    data = open_images(options, original, folder=folder)
    if not len(data.train):
        raise ValueError(f"{data.name} has no training images, which baselines need: add train/")
    if multi_hot_of(data.train) is not None:
        raise ValueError(
            f"{data.name} has several labels per image: baselines are of images with one label each"
        )
    test = evaluated_images(options, data, folder, Path(options.output or folder))
    classes = None
    if options.classes:
        classes = class_indices(options.classes, data.classes, num_classes)
    relearn = relearn_config(options)
    origin = Origin(
        original,
        data.train,
        training,
        lambda: make_classifier(options, num_classes, str(folder), trained=False),
        options.workers,
        options.max_corrupt,
    )
    run_options = RunOptions(
        options.batch_size, options.workers, options.max_corrupt, progress=not options.quiet
    )
    for method in options.methods:
        models = BaselineModels(method, output / method, origin, configs[method])
        result = run_baseline(
            models,
            test,
            classes,
            relearn,
            options.zrf_base,
            options.seed,
            run_options,
        )
        write_json(output / f"{method}.json", {**result.as_dict(), "versions": versions()})
        if not options.keep_models:
            models.remove()
        mean = result.evaluation.mean
        text = f"{method:<18} Acc_r {mean.acc_r:.2%}  Acc_f {mean.acc_f:.2%}  ZRF {mean.zrf:.4f}"
        if result.relearning is not None:
            epochs, never = result.relearning.mean
            text += f"  RT {epochs:.1f} ({never})"
        print(text, flush=True)
    print(f"\nin {output}; next:\n  wfnet evaluate {folder} --tables")
    return 0


def _config(method: str, options: argparse.Namespace) -> BaselineConfig:
    config = replace(METHODS[method].defaults, seed=options.seed)
    changes = {name: value for of, name, value in options.set if of == method}
    known = asdict(config)
    for name, value in changes.items():
        if name in METHODS[method].unused:
            other = ": its training has options of its own, --train-lr, --train-epochs, ..."
            raise ValueError(
                f"--set {method}.{name}={value} would change nothing, {method} does not use {name}"
                f"{other if method == 'retrained' else ''}"
            )
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number != isinstance(known[name], int | float):
            raise ValueError(f"--set {method}.{name}={value} must be like {known[name]!r}")
    return replace(config, **changes)


def _training(options: argparse.Namespace) -> dict[str, Any]:
    """How the class is retrained: as the classifier was trained, where that is known."""
    known = recorded_training(options.checkpoint)
    known = default_training(options.model or "") if known is None else known
    training = {**known, **chosen_training(options, "train_")}
    if "retrained" in options.methods and "epochs" not in training:
        raise ValueError(
            f"it is not known how {options.model} was trained, so it cannot be retrained without a "
            "class: give --train-epochs (and --train-lr, --train-opt, ...), or --methods without "
            "retrained"
        )
    return training
