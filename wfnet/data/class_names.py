"""Classes are known by their names: labels of other data are brought into the order known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from wfnet.data.dataset import Batch, Dataset, classes_of, labels_of, name_of, select
from wfnet.data.multi_hot import multi_hot_of

_SHOWN = 3


def numbers_by_name(found: Sequence[str], known: Sequence[str], what: str, origin: str) -> Tensor:
    """Returns the number of each class of ``found`` among ``known``, ``[K]`` int64.

    Args:
        found: class names of some data.
        known: class names in the order of a network's outputs or of a run.
        what: the data, for the error: "/data/birds".
        origin: where ``known`` comes from: "the run in runs/a".

    Raises:
        ValueError: if they are not the same names, each once.
    """
    number = {name: index for index, name in enumerate(known)}
    if len(found) == len(known) == len(number) and set(found) == number.keys():
        return torch.tensor([number[name] for name in found], dtype=torch.int64)
    if list(found) == list(known):  # a name that occurs twice is no reason to refuse the same list
        return torch.arange(len(known))
    raise ValueError(
        f"{what} has other classes than {origin}: {_difference(found, known)}. The numbers of "
        "classes would mean something else; use the data that it was made for, or give its classes "
        "the same names (--class-names, where they are only numbered)"
    )


def _difference(found: Sequence[str], known: Sequence[str]) -> str:
    parts = []
    for names, others, where in ((found, known, "there"), (known, found, "here")):
        missing = [repr(name) for name in names if name not in set(others)]
        if missing:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            parts.append(f"{', '.join(missing[:_SHOWN])}{more} is not known {where}")
    return "; ".join(parts) or f"{len(found)} names, not {len(known)}, or one of them twice"


def in_known_order(dataset: Dataset, known: Sequence[str], what: str, origin: str) -> Dataset:
    """Returns the data set with the labels that its classes have among ``known``.

    The data set itself where the order is the same; arguments and errors as
    :func:`numbers_by_name`.
    """
    numbers = numbers_by_name(classes_of(dataset), known, what, origin)
    if torch.equal(numbers, torch.arange(len(numbers))):
        return dataset
    return Renumbered(dataset, numbers, known)


class Renumbered(torch.utils.data.Dataset):
    """A data set whose classes have other numbers.

    Args:
        dataset: not changed.
        numbers: ``[K]`` int64: the new number of each of its classes.
        classes: names in the new order.
    """

    def __init__(self, dataset: Dataset, numbers: Tensor, classes: Sequence[str]):
        self.dataset, self.numbers, self.classes = dataset, numbers, list(classes)
        self.labels = numbers[labels_of(dataset)]
        multi_hot = multi_hot_of(dataset)
        if multi_hot is not None:
            self.multi_hot = multi_hot[:, numbers.argsort()]
        if hasattr(dataset, "root"):
            self.root = dataset.root
        # Only what the data set can do: readers look for these methods.
        for name in ("batch", "stream"):
            if hasattr(dataset, name):
                setattr(self, name, getattr(self, f"_{name}"))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, _ = self.dataset[index]
        return image, int(self.labels[index])

    def select(self, indices: Tensor) -> Renumbered:
        """The chosen images as a data set of their own."""
        return Renumbered(select(self.dataset, indices), self.numbers, self.classes)

    def name_of(self, index: int) -> str:
        """How the log calls an image."""
        return name_of(self.dataset, index)

    def _batch(self, indices: Tensor) -> Batch:
        return self._renumbered(self.dataset.batch(indices))

    def _stream(self, *arguments: Any) -> Iterator[Batch]:
        for batch in self.dataset.stream(*arguments):
            yield self._renumbered(batch)

    def _renumbered(self, batch: Batch) -> Batch:
        return batch._replace(labels=self.labels[batch.indices.cpu()].to(batch.labels.device))
