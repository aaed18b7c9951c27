"""`wfnet train`: an ordinary classifier, to be untrained afterwards."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from wfnet.cli.classifier import is_small
from wfnet.cli.inputs import choose_device, count_classes, data_name, make_classifier, open_images
from wfnet.cli.options import (
    HelpFormatter,
    add_compute_options,
    add_config_options,
    add_data_options,
    add_model_options,
    config_changes,
    recorded,
)
from wfnet.cli.runs import RUN_FILE, check_writable, read_run, write_run
from wfnet.data import labels_of
from wfnet.services import settings
from wfnet.services.files import write_tensors
from wfnet.services.locks import folder_lock
from wfnet.training import SMALL_MODEL_SETTINGS, TrainingSettings, accuracy, fit_classifier

logger = logging.getLogger("wfnet")

BASE_NAME = "base.safetensors"
EXAMPLE = """example:
  wfnet train --config digits/resnet --output runs/base
  wfnet untrain --config digits/resnet --checkpoint runs/base/base.safetensors --output runs/wf
  wfnet baseline runs/wf
  wfnet evaluate runs/wf --tables"""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "train",
        help="train a classifier, to be untrained afterwards",
        description="Train a classifier in the ordinary way, from new weights. Its weights go into "
        f"{BASE_NAME} in the output folder, its settings beside them: `wfnet baseline` retrains "
        "with the same ones.",
        usage="wfnet train --data NAME --model NAME --output DIR [options]",
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run, saved=lambda options: "training writes its weights at its end")
    add_data_options(parser)
    add_model_options(parser)
    add_training_options(parser, "")
    group = parser.add_argument_group("output")
    group.add_argument("--output", metavar="DIR", help="folder for weights and settings")
    group.add_argument("--force", action="store_true", help="replace what is in the output folder")
    group.add_argument("--config", metavar="FILE", help="options from a file, or a recipe by name")
    group.add_argument(
        "--seed", type=settings.seed, default=0, metavar="N", help="of everything random"
    )
    add_compute_options(parser)
    return parser


def add_training_options(parser: argparse.ArgumentParser, prefix: str) -> None:
    """Adds ordinary training; names start with ``prefix`` where a command has others of that
    name."""
    group = parser.add_argument_group("training", "Small networks have settings of their own.")
    add_config_options(group, TrainingSettings, prefix=prefix)


def chosen_training(options: argparse.Namespace, prefix: str) -> dict[str, Any]:
    """Returns the arguments of :func:`wfnet.training.fit_classifier` that the command line
    gives."""
    return config_changes(options, TrainingSettings, prefix=prefix)


def recorded_training(checkpoint: str | None) -> dict[str, Any] | None:
    """How the weights in ``checkpoint`` were trained, if `wfnet train` made them."""
    folder = Path(checkpoint).parent if checkpoint else None
    if folder is None or not (folder / RUN_FILE).is_file():
        return None
    run = read_run(folder)
    return dict(run["training"]) if run["command"] == "train" else None


def run(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.output is None:
        raise ValueError("say where the weights are to go: --output DIR")
    if options.pretrained or options.checkpoint:
        raise ValueError("training starts from new weights: leave out --pretrained, --checkpoint")
    folder = Path(options.output)
    check_writable(folder)
    with folder_lock(folder):
        _train(options, folder)
    return 0


def _train(options: argparse.Namespace, folder: Path) -> None:
    device = choose_device(options.device)
    num_classes = count_classes(options)
    found = [name for name in (BASE_NAME, RUN_FILE) if (folder / name).exists()]
    if found and not options.force:
        raise FileExistsError(
            f"{folder / found[0]} exists already: --force replaces it, another --output leaves it"
        )
    model = make_classifier(options, num_classes, data_name(options), trained=False).to(device)
    data = open_images(options, model)
    if not len(data.train):
        raise ValueError(f"{data.name} has no training images: add train/")
    training = default_training(options.model) | chosen_training(options, "")
    if options.amp:
        training["amp"] = "bfloat16"  # `wfnet baseline` retrains in it, too
    print(f"data        {data}\nnetwork     {options.model}, new weights\noutput      {folder}")
    history = fit_classifier(
        model,
        data.train,
        seed=options.seed,
        workers=options.workers,
        channels_last=options.channels_last,
        progress=not options.quiet,
        **training,
    )
    write_tensors(folder / BASE_NAME, model.state_dict(), {"format": "pt"})
    shares = {
        part: accuracy(model, getattr(data, part), workers=options.workers, amp=training.get("amp"))
        for part in ("validation", "test")
        if len(labels_of(getattr(data, part)))
    }
    result = {"accuracy": shares, "loss": history.loss, "seconds": round(history.seconds, 2)}
    write_run(
        folder, "train", recorded(options), training=training, classes=data.classes, result=result
    )
    text = ", ".join(f"{share:.2%} of {part} images" for part, share in shares.items())
    print(
        f"done        {len(history.loss)} epochs in {history.seconds:,.1f} s; correct: {text}\n\n"
        f"next:\n  wfnet untrain ... --checkpoint {folder / BASE_NAME}"
    )


def default_training(model: str) -> dict[str, Any]:
    """Settings of the small networks that have their own; none for others."""
    kind = model.removeprefix("small/") if is_small(model) else ""
    return dict(SMALL_MODEL_SETTINGS.get(kind, {}))
