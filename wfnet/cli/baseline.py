"""trivial ones, retrained, SCRUB, SalUn, SSD, ...: one model per class, same measures

Make and evaluate the usual ways of unlearning, one model per class, with the measures of `wfnet
evaluate`. The settings of each are chosen on validation images first. An interrupted run goes on
where it stopped, class by class, when the command is given again.

example:
  wfnet baseline --methods                  (what methods there are, and what is tuned)
  wfnet baseline runs/wf                    (all methods, all classes; again to go on)
  wfnet baseline runs/wf --methods retrained scrub --classes 0 1 --set scrub.lr=0.003
  wfnet evaluate runs/wf --tables           (the tables, with the baselines that are there)
"""

import argparse
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from wfnet.baselines import (
    METHODS,
    BaselineConfig,
    BaselineModels,
    Origin,
    run_baseline,
    tune,
    written,
)
from wfnet.benchmarking.provenance import versions
from wfnet.cli.chosen_images import evaluated_images
from wfnet.cli.evaluate import add_measure_options, add_relearn_options, relearn_config
from wfnet.cli.inputs import Run, choose_device
from wfnet.cli.options import Parser, add_command, key_value
from wfnet.cli.runs import check_writable
from wfnet.cli.train import add_training_options, training_of
from wfnet.data import multi_hot_of
from wfnet.evaluation import Scores
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.evaluation.plain_models import evaluate_group_models
from wfnet.services import settings
from wfnet.services.files import write_json

FOLDER = "baselines"


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
        --methods [NAME...]  of {", ".join(METHODS)}; without a name: list them
            [default: {" ".join(METHODS)}]
        --classes CLASS...  by number or name, 3+8 for classes that are forgotten together (default:
            all)
        --tune-classes N  try the grid of each method on so many classes and validation images, and
            take the best settings; 0: settings as they are [default: 2]
        --keep-models  keep the weights of every class and method [default: yes]
        --output DIR  folder (default: RUN/{FOLDER})
        """,
        methods=tuple(METHODS),
        tune_classes=settings.non_negative_int,
        keep_models=bool,
    )
    text = "settings of a method, which are not tuned then (--methods lists them)"
    group.add("--set METHOD.NAME=VALUE", text, key_value, [], nargs="+")
    add_measure_options(group, "of evaluation")
    group.add_config()
    add_relearn_options(parser)
    add_training_options(parser, "train-")
    parser.add_inputs()
    return parser


def run(options: argparse.Namespace) -> None:
    if not options.methods:
        print(_listed())
        return
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
    test = evaluated_images(options, data, work_on.folder, Path(options.output or work_on.folder))
    classes = work_on.class_groups(options.classes, data.classes)
    groups = [forget for forget in classes or () if isinstance(forget, tuple)]
    singles = [forget for forget in classes or () if isinstance(forget, int)] or None
    origin = Origin(
        original,
        data.train,
        training,
        lambda seed: work_on.classifier(trained=False, seed=seed),
        options.workers,
        options.max_corrupt,
    )
    several = multi_hot_of(data.train) is not None
    methods = options.methods
    if methods == list(METHODS) and (several or groups):  # none was asked for by name
        methods = [name for name in methods if METHODS[name].several]
    for name in methods:
        METHODS[name].check(origin, groups[0] if groups else 0)
    relearn = None if several else relearn_config(options)
    how = RunOptions(
        options.batch_size, options.workers, options.max_corrupt, progress=not options.quiet
    )
    tuned_on = _spread(work_on.untrained or range(work_on.num_classes), options.tune_classes)
    if tuned_on and not len(data.validation):
        raise ValueError(
            f"{data.name} has no validation images, on which settings are tuned: give --val-split, "
            "or --tune-classes 0"
        )
    for method in methods:
        fixed = {key.partition(".")[2] for key, _ in options.set if key.startswith(f"{method}.")}
        records = output / method / "tuning.json"
        config, tried = tune(
            method, origin, data.validation, tuned_on, configs[method], fixed, records, how
        )
        models = BaselineModels(method, output / method, origin, config)
        if groups:
            found = evaluate_group_models(models, original, test, groups, how)
            write_json(output / f"{method}_groups.json", {"method": method, **found.as_dict()})
            print(_line(method, found.mean, " ".join(map(written, groups))), flush=True)
        if groups and not singles:
            continue
        about = relearn, options.zrf_base, options.seed, how
        result = run_baseline(models, test, singles, *about)
        content = {**result.as_dict(), "tuning": tried, "versions": versions()}
        write_json(output / f"{method}.json", content)
        if not options.keep_models:
            models.remove()
        mean, more = result.evaluation.mean, ""
        if isinstance(mean, Scores):
            mean, more = asdict(mean), f"ZRF {mean.zrf:.4f}"
        if result.relearning is not None:
            epochs, never = result.relearning.mean.values()
            more += f"  RT {epochs:.1f} ({never})"
        print(_line(method, mean, more), flush=True)
    print(f"\nin {output}; next:\n  wfnet evaluate {work_on.folder} --tables")


def _line(method: str, mean: Mapping[str, float], more: str) -> str:
    """Returns what the terminal shows of a method: accuracies, or average precisions."""
    names = {"acc_r": "Acc_r", "acc_f": "Acc_f", "map_r": "mAP_r", "ap_f": "AP_f"}
    shown = [f"{title} {mean[name]:.2%}" for name, title in names.items() if name in mean]
    return "  ".join([f"{method:<18}", *shown, more])


def _configs(options: argparse.Namespace) -> dict[str, BaselineConfig]:
    """Returns the settings of each method: its defaults, and what ``--set`` changes."""
    configs = {name: replace(METHODS[name].defaults, seed=options.seed) for name in options.methods}
    for key, value in options.set:
        method, _, name = key.partition(".")
        known = _settings(method) if method in configs else []
        if name not in known:
            names = f", of {', '.join(known)}" if known else ""
            raise ValueError(
                f"--set {key}={value} would change nothing: give METHOD.NAME=VALUE with one of "
                f"--methods and a setting that it uses{names}"
            )
        configs[method] = replace(configs[method], **{name: value})
    return configs


def _settings(method: str) -> list[str]:
    return [name for name in vars(METHODS[method].defaults) if name not in METHODS[method].unused]


def _spread(classes: Sequence[int], count: int) -> list[int]:
    """Returns ``count`` of the classes, evenly spread, whatever ``--classes`` says."""
    count = min(count, len(classes))
    return [classes[(2 * number + 1) * len(classes) // (2 * count)] for number in range(count)]


def _listed() -> str:
    """Returns a text with all methods, their settings and their budgets."""
    lines = []
    for name, method in METHODS.items():
        lines.append(f"{name}: {inspect.getdoc(method).partition(chr(10))[0]}")
        shown = [f"{key}={getattr(method.defaults, key)}" for key in _settings(name)]
        if shown:
            lines.append(f"    settings: {', '.join(shown)}")
        if method.grid:
            names = ", ".join(method.grid[0])
            lines.append(f"    tuned: {names}; {len(method.grid)} settings are tried")
    return "\n".join(lines)
