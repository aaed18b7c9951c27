"""`--classes`: data that have some of a network's classes, and which rows are untrained then."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from wfnet.data import Splits
from wfnet.services.extras import require

_IMAGENET = 1000


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


def class_number(label: str, names: Sequence[str] | None, count: int) -> int | None:
    """Returns the number of a class from its name, in any case, or its number; None for none."""
    lowered = [name.lower() for name in names or ()]
    if label in (names or ()):
        return list(names).index(label)
    if lowered.count(label.lower()) == 1:
        return lowered.index(label.lower())
    return int(label) if label.isdecimal() and int(label) < count else None


def choose_classes(
    chosen: Sequence[str], found: Sequence[str], num_classes: int, names: Sequence[str] | None
) -> tuple[Tensor, tuple[int, ...]]:
    """Returns the network's number of each class of the data ``[n]``, and the rows to untrain.

    Args:
        chosen: what `--classes` was given: classes, or FOLDER=CLASS; nothing: all of the data.
        found: names of the data's classes.
        num_classes: of the network.
        names: of the network's classes, if they are known.

    Raises:
        ValueError: for a class that the network or the data do not have, or that two folders have.
    """
    number = partial(class_number, names=names, count=num_classes)
    pairs = dict(entry.rsplit("=", 1) for entry in chosen if "=" in entry)
    if pairs and len(pairs) < len(chosen):
        raise ValueError("--classes takes classes, or FOLDER=NUMBER for all of them, not both")
    for name in pairs:
        if name not in found:
            raise ValueError(f"--classes has {name!r}, which is no class of the data")
    for text in pairs.values() if pairs else chosen:
        if number(text) is None:
            raise ValueError(
                f"--classes has {text!r}, but the network has classes 0 to {num_classes - 1}"
                f"{', or by their names' if names else ''}"
            )
    numbers = [number(pairs.get(name, name)) for name in found]
    rows = [number(text) for text in (pairs.values() if pairs else chosen or found)]
    if None in numbers and not pairs and len(chosen) == len(found):
        numbers = rows  # in the order of the data's classes
    if None in numbers:
        name = found[numbers.index(None)]
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


def with_network_labels(
    data: Splits, numbers: Tensor, num_classes: int, names: Sequence[str] | None
) -> Splits:
    """Returns the data with the labels that the network has for their classes."""
    classes = [str(number) for number in range(num_classes)] if names is None else list(names)
    for name, number in zip(data.classes, numbers.tolist(), strict=True):
        classes[number] = name
    return data.renumbered(numbers, classes)
