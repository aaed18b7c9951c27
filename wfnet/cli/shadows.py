"""U-LiRA, KLOM, forget quality of a run's recipe, from shadow rounds

Repeat training and untraining of a run on halves of its training images, N times with other seeds,
and retrain networks without each class on the same halves; then ask whether a model that unlearned
an image, or a class, can be told from one that never saw it. What is made is kept in RUN/shadows,
and the same command, or one with more rounds, goes on there.

example:
  wfnet shadows runs/wf
  wfnet shadows runs/wf -n 16 --classes 3 8 --methods logit_masked random_labels
  wfnet shadows runs/wf --no-retrain        (image by image only: no network is retrained)
"""

import argparse
from pathlib import Path

import torch

from wfnet.baselines import METHODS
from wfnet.benchmarking.provenance import versions
from wfnet.cli.inputs import Run, choose_device
from wfnet.cli.options import Parser, add_command, fuse_of
from wfnet.cli.runs import RUN_FILE, check_writable, read_run
from wfnet.cli.train import add_training_options, training_of
from wfnet.services import settings
from wfnet.services.locks import folder_lock
from wfnet.services.log import logger
from wfnet.shadows import FORGETFUL, ORIGINAL, RETRAINED, Recipe, ShadowRounds, compare
from wfnet.untraining import UntrainConfig
from wfnet.wrapping import wrap

FOLDER = "shadows"
_TRIVIAL = ("logit_masked", "bias_shifted")
# What describes the filters of a run, of its recorded options.
_OF_FILTERS = ("recipe", "alpha_init", "targets", "mask_from", "filter_dtype")


def add_parser(commands: argparse._SubParsersAction) -> Parser:
    parser = add_command(
        commands,
        run,
        "finished rounds and models are kept; the same command goes on",
        "RUN [options]",
    )
    group = parser.group("shadows")
    group.add_all(
        f"""
        -n --rounds N  shadow rounds, in pairs: 6, 8, 10, ... [default: 8]
        --classes CLASS...  classes, by number or name; each costs N trainings (default: all)
        --retrain  retrain networks without each class, the reference for whole classes
            [default: yes]
        --methods NAME...  baselines beside filters and original [default: {" ".join(_TRIVIAL)}]
        --samples N  the most training images of a class [default: 1000]
        --shadow-seed N  of halves and networks [default: 0]
        --output DIR  folder for the results (default: RUN; what is trained stays in RUN/{FOLDER})
        """,
        retrain=bool,
        methods=tuple(METHODS),
        shadow_seed=settings.seed,
    )
    group.add_seed("by which images are split where the run does not say it")
    add_training_options(parser, "train-")
    parser.add_inputs()
    return parser


def run(options: argparse.Namespace) -> None:
    work_on = Run(options)
    output = Path(options.output or work_on.folder)
    check_writable(output)
    rounds = rounds_of(options)
    classes = work_on.class_numbers(options.classes, rounds.data.classes)
    classes = list(range(work_on.num_classes)) if classes is None else classes
    methods = [FORGETFUL, ORIGINAL, *(m for m in options.methods if m != RETRAINED)]
    missing = []
    if options.retrain:
        methods.append(RETRAINED)
    else:
        missing = [
            "without retrained networks it was not measured whether a class is noticed: leave out "
            f"--no-retrain, {options.rounds} trainings for each class"
        ]
    with folder_lock(rounds.folder):
        result = compare(
            rounds, options.rounds, classes, methods, options.samples, missing, not options.quiet
        )
    result.settings["versions"] = versions()
    result.write(output)
    print(result.table())
    for sentence in result.missing:
        print(f"\nnot everything could be measured: {sentence}")
    print(f"\nin {output}: shadows.json, shadows.csv")


def rounds_of(options: argparse.Namespace) -> ShadowRounds:
    """Returns the shadow rounds of the run that the options name.

    Raises:
        FileNotFoundError, ValueError: if its records do not say how it was made.
    """
    work_on = Run(options)
    work_on.check_data()
    recipe = _recipe(options, work_on)
    return ShadowRounds(
        work_on.folder / FOLDER,
        work_on.images(recipe.fresh(0)),
        recipe,
        choose_device(options.device),
        options.shadow_seed,
        options.workers,
    )


def _recipe(options: argparse.Namespace, work_on: Run) -> Recipe:
    """How the network of a run was made, from its records.

    Raises:
        FileNotFoundError, ValueError: if they do not say it.
    """
    record = read_run(work_on.folder)
    training = training_of(options, "train_")
    if "untraining" not in record or record["options"].get("untrain_split") == "val":
        raise ValueError(
            f"{work_on.folder / RUN_FILE} is not of a run that was untrained on training images, "
            "which shadow rounds repeat on halves of them: name such a run"
        )
    if "epochs" not in training:
        raise ValueError(
            f"it is not known how {options.model} was trained, so it cannot be trained again: "
            "give --train-epochs (and --train-lr, --train-opt, ...)"
        )
    if record["options"].get("augment"):
        logger.warning("the run was untrained with --augment; shadow rounds are without")
    about = {name: record["options"].get(name) for name in _OF_FILTERS}
    arguments = {
        "targets": about["targets"],
        "mask_from": about["mask_from"],
        "filter_dtype": getattr(torch, about["filter_dtype"]),
        "backend": options.backend,
        "fuse": fuse_of(options),
    }
    classes = record["untraining"]["classes"]
    given = {**record["untraining"], "classes": None if classes is None else tuple(classes)}
    return Recipe(
        lambda seed: work_on.classifier(trained=False, seed=seed),
        training,
        lambda model: wrap(
            model, work_on.num_classes, about["recipe"], about["alpha_init"], **arguments
        ),
        UntrainConfig(**given),
        {"model": options.model, "model_kwargs": dict(options.model_kwargs or ()), **about},
    )
