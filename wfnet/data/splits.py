"""Training, validation and test parts, and how they are drawn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wfnet.data.dataset import Dataset, select


@dataclass(frozen=True)
class Splits:
    """A data set in three parts without overlap.

    Networks and filters learn from `train`, settings are chosen on `validation`, and `test` is for
    results alone. `seed` is the seed of the drawing.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    classes: list[str]
    name: str
    seed: int

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def renumbered(self, numbers: Tensor, classes: Sequence[str]) -> "Splits":
        """Returns the parts with `numbers[k]` as the label of class k; `classes` are its names."""
        if list(classes) == self.classes:
            return self
        train, validation, test = (
            part.renumbered(numbers, classes) for part in (self.train, self.validation, self.test)
        )
        return Splits(train, validation, test, list(classes), self.name, self.seed)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.num_classes} classes, {len(self.train)} training, "
            f"{len(self.validation)} validation and {len(self.test)} test images (seed {self.seed})"
        )


def stratified_split(
    labels: Tensor, fraction: float, seed: int, classes: Sequence[str] | None = None
) -> tuple[Tensor, Tensor]:
    """Split the positions of `labels` [N]: (rest, held out), both sorted, without overlap.

    Every class gives `fraction` of its images, rounded, at least one and never all.
    Raises ValueError for a fraction outside (0, 1) and for a class with a single image.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, got {fraction}")
    if not len(labels):
        raise ValueError("there are no images to split")
    rest, held_out = [], []
    for label, positions in _shuffled_classes(labels, seed):
        if len(positions) < 2:
            name = label if classes is None else classes[label]
            raise ValueError(
                f"class {name!r} has a single image and cannot be split in two parts: "
                "add images of it or leave the class out"
            )
        count = min(max(round(fraction * len(positions)), 1), len(positions) - 1)
        held_out.append(positions[:count])
        rest.append(positions[count:])
    return torch.cat(rest).sort().values, torch.cat(held_out).sort().values


def _shuffled_classes(labels: Tensor, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Yields each label with the positions of its images, in an order drawn by seed."""
    generator = torch.Generator().manual_seed(seed)
    for label in labels.unique().tolist():
        positions = (labels == label).nonzero().flatten()
        yield label, positions[torch.randperm(len(positions), generator=generator)]


def split_dataset(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """`stratified_split` of a data set: (the rest, the held-out part)."""
    rest, held_out = stratified_split(dataset.labels, fraction, seed, dataset.classes)
    return select(dataset, rest), select(dataset, held_out)


def limit_per_class(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Positions [n], sorted: at most `per_class` of each class of `labels` [N], drawn by seed."""
    if per_class < 1:
        raise ValueError(f"the limit per class must be 1 or more, got {per_class}")
    chosen = [positions[:per_class] for _, positions in _shuffled_classes(labels, seed)]
    return torch.cat(chosen).sort().values if chosen else torch.empty(0, dtype=torch.int64)
