"""train a classifier, to be untrained afterwards

Train a classifier in the ordinary way, from new weights. Its weights go into base.safetensors in
the output folder, its settings beside them: `wfnet baseline` retrains with the same ones.

example:
  wfnet train --config digits/resnet --output runs/base
  wfnet untrain --config digits/resnet --checkpoint runs/base/base.safetensors --output runs/wf
  wfnet baseline runs/wf
  wfnet evaluate runs/wf --tables
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from wfnet.cli.classifier import is_small
from wfnet.cli.inputs import choose_device, count_classes, data_name, make_classifier, open_images
from wfnet.cli.option_files import DESCRIPTION, command_parser, option_words
from wfnet.cli.options import Parser, add_command, config_changes, make_parser
from wfnet.cli.runs import BASE_NAME, RUN_FILE, check_writable, read_run, write_run
from wfnet.data import labels_of
from wfnet.services.files import write_tensors
from wfnet.services.locks import folder_lock
from wfnet.training import SMALL_MODEL_SETTINGS, TrainingSettings, accuracy, fit_classifier

# Settings that are options, in the order of the help.
_SETTINGS = ("epochs", "lr", "optimizer", "schedule", "batch_size", "weight_decay")
_SETTINGS += ("label_smoothing", "shift")


def add_parser(commands: argparse._SubParsersAction) -> Parser:
    parser = add_command(
        commands,
        run,
        "training writes its weights at its end",
        "--data NAME --model NAME --output DIR [options]",
    )
    add_training_options(parser, "")
    group = parser.group("output")
    group.add("--output DIR", "folder for weights and settings")
    group.add("--force", "replace what is in the output folder")
    group.add_config()
    group.add_seed()
    parser.add_inputs()
    return parser


def add_training_options(parser: Parser, prefix: str) -> None:
    """Adds ordinary training; names start with ``prefix`` where a command has others of that
    name."""
    group = parser.group("training", "Small networks have settings of their own.")
    group.add_fields(TrainingSettings, *_SETTINGS, prefix=prefix)


def training_of(options: argparse.Namespace, prefix: str = "") -> dict[str, Any]:
    """Returns arguments of :func:`wfnet.training.fit_classifier`.

    As the weights in ``--checkpoint`` were trained, if that is recorded, else as small networks
    are; what the command line gives comes first.
    """
    folder = Path(options.checkpoint).parent if options.checkpoint else None
    known = {}
    if options.model and is_small(options.model):
        known = SMALL_MODEL_SETTINGS.get(options.model.removeprefix("small/"), {})
    if folder is not None and (folder / RUN_FILE).is_file():
        record = read_run(folder)
        known = record["training"] if record["command"] == "train" else known
    return {**known, **config_changes(options, TrainingSettings, *_SETTINGS, prefix=prefix)}


def run(options: argparse.Namespace) -> None:
    if options.output is None:
        raise ValueError("say where the weights are to go: --output DIR")
    if options.pretrained or options.checkpoint:
        raise ValueError("training starts from new weights: leave out --pretrained, --checkpoint")
    folder = Path(options.output)
    check_writable(folder)
    with folder_lock(folder):
        _train(options, folder)


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
    training = training_of(options)
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
    write_run(folder, options, training=training, classes=data.classes, result=result)
    text = ", ".join(f"{share:.2%} of {part} images" for part, share in shares.items())
    print(
        f"done        {len(history.loss)} epochs in {history.seconds:,.1f} s; correct: {text}\n\n"
        f"next:\n  wfnet untrain {shlex.join(_inputs(options))} --checkpoint {folder / BASE_NAME}"
    )


def _inputs(options: argparse.Namespace) -> list[str]:
    """Returns data and network as they are described on a command line, where not by default."""
    known = {name: value for name, value in vars(options).items() if name in DESCRIPTION}
    known |= {name: dict(known[name]) for name in ("model_kwargs",) if known[name]}
    command = make_parser([sys.modules[__name__]])
    plain = vars(command.parse_args(["train"]))
    changed = {name: value for name, value in known.items() if value != plain[name]}
    return option_words(command_parser(command, "train"), changed)
