"""`--classes`: data that have some of a network's classes, and which rows are untrained then."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from wfnet.data import Splits
from wfnet.services.extras import require

_IMAGENET = 1000


def add_classes_option(group: argparse._ActionsContainer) -> None:
    """Adds the option to a command's group."""
    group.add_argument(
        "--classes",
        nargs="*",
        metavar="CLASS",
        help="untrain some classes of a network that knows more, with images of these: numbers or "
        "names that the network has for them, or FOLDER=NUMBER for each class of the data; without "
        "any, all classes of the data. The rows of all others stay at the original",
    )


def network_names(recorded: Sequence[str] | None, num_classes: int) -> list[str] | None:
    """Returns the names of a network's classes, if they are known.

    Args:
        recorded: by the run that made its weights, if one did.
        num_classes: 1,000 are taken for ImageNet's, whose folders are called n01440764 and so on.
    """
    if recorded is not None and len(recorded) == num_classes:
        return list(recorded)
    if num_classes == _IMAGENET:
        try:
            return list(require("timm.data", "timm").ImageNetInfo().label_names())
        except (ImportError, AttributeError):
            return None
    return None


def choose_classes(
    chosen: Sequence[str], found: Sequence[str], num_classes: int, names: Sequence[str] | None
) -> tuple[Tensor, tuple[int, ...]]:
    """Returns the network's number of each class of the data ``[n]``, and the rows to untrain.

    Args:
        chosen: what `--classes` was given.
        found: names of the data's classes.
        num_classes: of the network.
        names: of the network's classes, if they are known.

    Raises:
        ValueError: for a class that the network or the data do not have, or that two folders have.
    """
    pairs = dict(entry.rsplit("=", 1) for entry in chosen if "=" in entry)
    if pairs and len(pairs) < len(chosen):
        raise ValueError("--classes takes classes, or FOLDER=NUMBER for all of them, not both")
    if pairs:
        unknown = [name for name in pairs if name not in found]
        if unknown:
            raise ValueError(f"--classes has {unknown[0]!r}, which is no class of the data")
        numbers = [_number(pairs.get(name, name), num_classes, names) for name in found]
        rows = [number for name, number in zip(found, numbers, strict=True) if name in pairs]
    else:
        numbers = [_number(name, num_classes, names) for name in found]
        rows = [_number(entry, num_classes, names) for entry in chosen] if chosen else numbers
        wrong = next((e for e, row in zip(chosen, rows, strict=False) if row is None), None)
        if wrong is not None:
            raise ValueError(
                f"--classes has {wrong!r}, but the network has classes 0 to {num_classes - 1}"
                f"{', or by their names' if names else ''}"
            )
        if None in numbers and chosen and len(chosen) == len(found):
            numbers = rows  # in the order of the data's classes
    for name, number in zip(found, numbers, strict=True):
        if name in pairs and number is None:
            raise ValueError(
                f"--classes gives {name!r} the class {pairs[name]!r}, but the network has classes "
                f"0 to {num_classes - 1}{', or by their names' if names else ''}"
            )
        if number is None:
            raise ValueError(
                f"which of the network's {num_classes} classes is {name!r}? Say so with --classes "
                f"{name}=NUMBER, for each class of the data"
            )
    if len(set(numbers)) < len(numbers):
        raise ValueError("--classes gives two classes of the data the same number")
    missing = sorted(set(rows) - set(numbers))
    if missing:
        raise ValueError(f"the data have no images of class {missing[0]}, which --classes names")
    return torch.tensor(numbers), tuple(sorted(rows))


def _number(name: str, num_classes: int, names: Sequence[str] | None) -> int | None:
    """Returns the number of a class from its name or number; None if the network has none such."""
    if names is not None and name in names:
        return list(names).index(name)
    if name.isdecimal() and int(name) < num_classes:
        return int(name)
    return None


def with_network_labels(
    data: Splits, numbers: Tensor, num_classes: int, names: Sequence[str] | None
) -> Splits:
    """Returns the data with the labels that the network has for their classes."""
    classes = [str(number) for number in range(num_classes)] if names is None else list(names)
    for name, number in zip(data.classes, numbers.tolist(), strict=True):
        classes[number] = name
    return data.renumbered(numbers, classes)
