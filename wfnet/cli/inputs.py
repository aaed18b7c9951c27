"""What a command works on: classifier, images and filtered network, made from its options."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wfnet.cli.chosen_classes import choose_classes, with_network_labels
from wfnet.cli.classifier import check_head, create_classifier, data_settings, is_small
from wfnet.cli.options import DATA_WITH_FILES, fuse_of
from wfnet.cli.runs import RUN_FILE, read_run
from wfnet.data import Splits, cifar10, folder_classes, mnist, open_data
from wfnet.network import WFNet
from wfnet.pretrained import read_config
from wfnet.services.files import readable

logger = logging.getLogger("wfnet")

_GREY = ("digits", "mnist", "glyphs10", "glyphs26", "glyphs100")


def data_name(options: argparse.Namespace) -> str:
    """The data set by name, or the image folder.

    Raises:
        ValueError: if there is neither.
    """
    if not options.data and not options.data_dir:
        raise ValueError(
            "there are no images: give --data-dir DIR (a folder with train/<class>/ and "
            "val/<class>/), or a data set by name, --data digits"
        )
    return options.data or options.data_dir


def count_classes(options: argparse.Namespace) -> int:
    """Classes of the data, without reading an image: files that are missing are noticed now.

    Raises:
        FileNotFoundError, ValueError: if the data are not there.
    """
    name = data_name(options)
    if options.data is None:
        root = Path(name)
        if not root.is_dir():
            raise FileNotFoundError(f"the image folder {root} does not exist")
        return len(folder_classes(root))
    if name in DATA_WITH_FILES and not options.data_dir:
        raise ValueError(f"--data {name} needs --data-dir, the folder with its files")
    if name == "mnist":
        return mnist.count_classes(options.data_dir)
    if name == "cifar10":
        cifar10.found_files(options.data_dir)
    return int(name.removeprefix("glyphs")) if name.startswith("glyphs") else 10


def make_classifier(
    options: argparse.Namespace, num_classes: int | None, origin: str, trained: bool = True
) -> nn.Module:
    """The classifier of ``--model`` for the ``num_classes`` classes of ``origin``, a data set or a
    folder with filters; with new weights if not ``trained``. None: those that it has.

    Raises:
        ValueError: if its head has another number of classes; see :func:`create_classifier`.
    """
    if not options.model:
        raise ValueError("there is no network: give --model NAME, for example --model resnet50")
    if num_classes is not None and options.num_classes not in (None, num_classes):
        raise ValueError(
            f"--num-classes {options.num_classes} does not match {origin}, which has {num_classes} "
            "classes; leave it out, or say with `wfnet untrain --classes` which of the network's "
            "classes these are"
        )
    small = is_small(options.model)
    in_channels = options.in_chans
    if small and in_channels is None:
        in_channels = 1 if options.data in _GREY else 3
    model = create_classifier(
        options.model,
        options.num_classes
        if options.pretrained and trained
        else num_classes or options.num_classes,
        pretrained=options.pretrained and trained,
        checkpoint=options.checkpoint if trained else None,
        in_channels=in_channels,
        image_size=options.img_size,
        seed=options.seed,
        options=dict(options.model_kwargs or ()),
    )
    if num_classes is not None:
        check_head(model, options.model, num_classes, origin)
    if trained and not options.pretrained and not options.checkpoint:
        logger.warning(
            "%s has random weights: nothing it knows can be forgotten; give --pretrained or "
            "--checkpoint FILE",
            options.model,
        )
    return model


def open_images(
    options: argparse.Namespace,
    model: nn.Module,
    augment: bool = False,
    folder: Path | None = None,
    by_names: bool = True,
) -> Splits:
    """Training, validation and test images as the classifier expects them.

    Labels are those that the classes have, by their names, in the run in ``folder`` and in the one
    that made the weights, as far as these are recorded, unless ``by_names`` is False.

    Raises:
        FileNotFoundError, ValueError: for data that are missing, damaged, or of other classes.
    """
    settings = data_settings(model, options.model)
    if is_small(options.model):
        settings["channels"] = _input_channels(model)
    chosen = {
        "image_size": options.img_size,
        "channels": options.in_chans,
        "mean": options.mean,
        "std": options.std,
        "interpolation": options.interpolation,
        "crop_pct": options.crop_pct,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if chosen:
        settings.pop("transform", None)  # it was made for the settings that are replaced
    by_name = options.data is not None
    data = open_data(
        options.data if by_name else options.data_dir,
        options.data_dir if by_name else None,
        **{**settings, **chosen},
        augment=augment,
        validation_fraction=options.val_split,
        train_per_class=options.train_per_class,
        validation_per_class=options.val_per_class,
        class_names=options.class_names,
        seed=options.seed,
        cache=options.cache,
        cache_dir=options.cache_dir,
        device=choose_device(options.device),
    )
    if by_names and folder is not None and untrained_classes(folder) is not None:
        names = read_run(folder)["classes"]
        numbers, _ = choose_classes([], data.classes, len(names), names)
        return with_network_labels(data, numbers, len(names), names)
    for names, origin in known_classes(options, folder) if by_names else ():
        numbered = names == [str(label) for label in range(len(names))]
        if not (numbered and options.class_names):  # classes that are named now for the first time
            data = data.in_known_order(names, origin)
    return data


def untrained_classes(folder: Path) -> list[int] | None:
    """Returns the classes that the run in a folder has untrained; None for all, or if it is not
    recorded."""
    if not (folder / RUN_FILE).is_file():
        return None
    return (read_run(folder).get("untraining") or {}).get("classes")


def known_classes(
    options: argparse.Namespace, folder: Path | None = None
) -> list[tuple[list[str], str]]:
    """Returns recorded class names, and of what: of the run in ``folder``, and of the run that made
    the weights of ``--checkpoint``. The last one's order is that of the network's outputs."""
    found = []
    weights = Path(options.checkpoint).parent if options.checkpoint else None
    for place, command, what in (
        (folder, None, "the run in {}"),
        (weights, "train", "the classifier in {}"),
    ):
        if place is None or not (place / RUN_FILE).is_file():
            continue
        run = read_run(place)
        if run.get("classes") and command in (None, run["command"]):
            found.append((list(run["classes"]), what.format(place)))
    return found


def _input_channels(model: nn.Module) -> int:
    return next(p for p in model.parameters() if p.dim() == 4).shape[1]


def choose_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, or the CPU.

    Raises:
        ValueError: for a device that PyTorch does not know or has not.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); try auto or cpu") from error
    return device


def load_network(options: argparse.Namespace, folder: Path) -> tuple[WFNet, nn.Module]:
    """The filtered network in ``folder`` on its device, and its classifier on the CPU.

    Raises:
        FileNotFoundError, ValueError: for missing, damaged or foreign files.
    """
    device = choose_device(options.device)
    config = check_run_folder(folder)
    if not options.model:
        raise ValueError(
            f"{folder} does not say which network its filters belong to: give --model NAME and "
            "--pretrained or --checkpoint FILE"
        )
    classifier = make_classifier(options, config["num_classes"], str(folder))
    net = WFNet.from_pretrained(folder, classifier, backend=options.backend)
    net.fuse = fuse_of(options)
    net.to(device)
    if options.channels_last:
        net.to(memory_format=torch.channels_last)
    return net, classifier


def check_run_folder(folder: Path) -> dict[str, Any]:
    """The filters' configuration in ``folder``.

    Raises:
        FileNotFoundError, ValueError: if there are no filters.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give that of a run, for example demo")
    return read_config(folder)


def check_class_count(options: argparse.Namespace, folder: Path, filters: int, remedy: str) -> None:
    """Compares the classes of the data with those that the filters in ``folder`` were made for.

    Raises:
        ValueError: if they differ; the sentence ends with ``remedy``.
    """
    found = count_classes(options)
    if found != filters and untrained_classes(folder) is None:
        raise ValueError(
            f"{options.data or options.data_dir} has {found} classes, the filters in {folder} "
            f"{filters}; {remedy} the data that they were made for"
        )


def class_indices(labels: Sequence[str], names: Sequence[str] | None, count: int) -> list[int]:
    """Class numbers from numbers or names, each once.

    Raises:
        ValueError: for one that does not exist.
    """
    found = []
    lowered = [name.lower() for name in names or ()]
    for label in map(readable, labels):
        if names and label in names:
            found.append(list(names).index(label))
        elif lowered.count(label.lower()) == 1:
            found.append(lowered.index(label.lower()))
        elif label.isdigit() and int(label) < count:
            found.append(int(label))
        else:
            known = ", ".join((names or ())[:5]) + (", ..." if len(names or ()) > 5 else "")
            raise ValueError(
                f"there is no class {label!r}: classes are numbered 0 to {count - 1}"
                f"{f', or called by their names ({known})' if known else ''}"
            )
    return list(dict.fromkeys(found))
