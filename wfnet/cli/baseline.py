"""masked logits, retrained, random labels, NegGrad+, ...: per class, same measures

Make and evaluate the usual ways of unlearning, one model per class, with the measures of `wfnet
evaluate`. An interrupted run goes on where it stopped, class by class, when the command is given
again.

example:
  wfnet baseline runs/wf                    (all methods, all classes; again to go on)
  wfnet baseline runs/wf --methods retrained --classes 0 1 --set neggrad_plus.lr=0.003
  wfnet evaluate runs/wf --tables           (the tables, with the baselines that are there)
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

from wfnet.baselines import (
    METHODS,
    BaselineConfig,
    BaselineModels,
    Origin,
    run_baseline,
)
from wfnet.cli.chosen_images import evaluated_images
from wfnet.cli.evaluate import (
    add_measure_options,
    add_relearn_options,
    relearn_config,
)
from wfnet.cli.inputs import Run, choose_device
from wfnet.cli.options import Parser, add_command, key_value
from wfnet.cli.runs import check_writable, versions
from wfnet.cli.train import add_training_options, training_of
from wfnet.data import multi_hot_of
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.services.files import write_json

FOLDER = "baselines"
_SETTINGS = [field.name for field in fields(BaselineConfig)]


def add_parser(commands: argparse._SubParsersAction) -> Parser:
    parser = add_command(
        commands,
        run,
        "finished classes are kept; the same command goes on",
        "RUN [options]",
        resume=True,
    )
    group = parser.group("baselines")
    group.add_all(
        f"""
        --methods NAME...  of {", ".join(METHODS)} [default: {" ".join(METHODS)}]
        --classes CLASS...  by number or name (default: all)
        --keep-models  keep the weights of every class and method [default: yes]
        --output DIR  folder (default: RUN/{FOLDER})
        """,
        methods=tuple(METHODS),
        keep_models=bool,
    )
    text = f"settings of a method: {', '.join(_SETTINGS)}"
    group.add("--set METHOD.NAME=VALUE", text, key_value, [], nargs="+")
    add_measure_options(group, "of evaluation")
    group.add_config()
    add_relearn_options(parser)
    add_training_options(parser, "train-")
    parser.add_inputs()
    return parser


def run(options: argparse.Namespace) -> None:
    work_on = Run(options)
    output = Path(options.output or work_on.folder / FOLDER)
    configs = _configs(options)
    work_on.check_data()
    training = training_of(options, "train_")
    if "retrained" in options.methods and "epochs" not in training:
        raise ValueError(
            f"it is not known how {options.model} was trained, so it cannot be retrained without a "
            "class: give --train-epochs (and --train-lr, --train-opt, ...), or --methods without "
            "retrained"
        )
    check_writable(output)
    original = work_on.classifier().to(choose_device(options.device))
    data = work_on.images(original)
    if not len(data.train):
        raise ValueError(f"{data.name} has no training images, which baselines need: add train/")
    if multi_hot_of(data.train) is not None:
        raise ValueError(
            f"{data.name} has several labels per image: baselines are of images with one label each"
        )
    test = evaluated_images(options, data, work_on.folder, Path(options.output or work_on.folder))
    classes = work_on.class_numbers(options.classes, data.classes)
    origin = Origin(
        original,
        data.train,
        training,
        lambda: work_on.classifier(trained=False),
        options.workers,
        options.max_corrupt,
    )
    how = RunOptions(
        options.batch_size, options.workers, options.max_corrupt, progress=not options.quiet
    )
    for method in options.methods:
        models = BaselineModels(method, output / method, origin, configs[method])
        result = run_baseline(
            models, test, classes, relearn_config(options), options.zrf_base, options.seed, how
        )
        write_json(output / f"{method}.json", {**result.as_dict(), "versions": versions()})
        if not options.keep_models:
            models.remove()
        mean = result.evaluation.mean
        text = f"{method:<18} Acc_r {mean.acc_r:.2%}  Acc_f {mean.acc_f:.2%}  ZRF {mean.zrf:.4f}"
        if result.relearning is not None:
            epochs, never = result.relearning.mean.values()
            text += f"  RT {epochs:.1f} ({never})"
        print(text, flush=True)
    print(f"\nin {output}; next:\n  wfnet evaluate {work_on.folder} --tables")


def _configs(options: argparse.Namespace) -> dict[str, BaselineConfig]:
    """Returns the settings of each method: its defaults, and what ``--set`` changes."""
    configs = {name: replace(METHODS[name].defaults, seed=options.seed) for name in options.methods}
    for key, value in options.set:
        method, _, name = key.partition(".")
        if method not in configs or name not in _SETTINGS or name in METHODS[method].unused:
            raise ValueError(
                f"--set {key}={value} would change nothing: give METHOD.NAME=VALUE with one of "
                f"--methods and a setting that it uses, of {', '.join(_SETTINGS)}"
            )
        configs[method] = replace(configs[method], **{name: value})
    return configs
