"""What a data set is to this package: labelled images, read one by one or in batches."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Images that go through the network together."""

    images: Tensor  # [n, C, H, W] float32, normalised
    labels: Tensor  # [n] int64
    indices: Tensor  # [n] int64, positions in the data set


@runtime_checkable
class Dataset(Protocol):
    """A map-style data set with its labels at hand, so that classes are known without decoding.

    `dataset[i]` is `(image float32 [C, H, W], label)`, normalised and ready for the network.
    In-memory sets may also have `batch(indices: LongTensor) -> Batch`.
    """

    labels: Tensor  # [N] int64
    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class CorruptImage(Exception):
    """An image that cannot be decoded. `name` says which, `reason` why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both as args: the error crosses process borders
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def labels_of(dataset: Any) -> Tensor:
    """Labels [N] int64 of any torchvision-like data set, without reading one image.

    Looks for `.labels`, `.targets` and `.samples` (pairs of path and label), follows `Subset` and
    `ConcatDataset`, `TensorDataset` and timm's `.reader`. A `target_transform` is applied, as it is
    to the items. Raises ValueError if none of them is one integer per image.
    """
    if isinstance(dataset, torch.utils.data.Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        return torch.cat([labels_of(part) for part in dataset.datasets])
    if isinstance(dataset, torch.utils.data.TensorDataset):
        candidates = [dataset.tensors[-1]]
    else:
        candidates = [getattr(dataset, name, None) for name in ("labels", "targets")]
        for holder in (dataset, getattr(dataset, "reader", None)):
            samples = getattr(holder, "samples", None)
            if isinstance(samples, (list, tuple)):
                candidates.append([sample[1] for sample in samples])
    for candidate in candidates:
        labels = _as_labels(candidate)
        if labels is not None and len(labels) == len(dataset):
            return _transformed(labels, dataset)
    raise ValueError(
        f"{type(dataset).__name__} has no usable labels: give it an attribute `labels` or "
        "`targets` with one integer per image"
    )


def _as_labels(candidate: Any) -> Tensor | None:
    """A 1-D int64 tensor, or None if the candidate is anything but integers in one dimension."""
    if candidate is None or callable(candidate):
        return None
    try:
        labels = torch.as_tensor(candidate)
    except (TypeError, ValueError, RuntimeError):
        return None
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        return None
    return labels.to(device="cpu", dtype=torch.int64)


def _transformed(labels: Tensor, dataset: Any) -> Tensor:
    """The labels that items have: `labels` [N] through the data set's `target_transform`."""
    if getattr(dataset, "target_transform", None) is None or not len(labels):
        return labels
    values, position = labels.unique(return_inverse=True)
    return torch.tensor([_transformed_label(int(v), dataset) for v in values])[position]


def _transformed_label(label: int, dataset: Any) -> int:
    found = dataset.target_transform(label)
    try:
        return int(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the target_transform of {type(dataset).__name__} makes {found!r} of label {label}; "
            "labels must be integers"
        ) from error


def classes_of(dataset: Any) -> list[str]:
    """Class names: `.classes` if the data set has them, else its label numbers as text.

    Names follow their labels through a `target_transform`; a class of several names, or of none,
    is called by its number.
    """
    classes = getattr(dataset, "classes", None)
    if classes is None and isinstance(dataset, torch.utils.data.Subset):
        return classes_of(dataset.dataset)
    labels = labels_of(dataset)
    count = int(labels.max()) + 1 if len(labels) else 0
    if classes is None:
        return [str(label) for label in range(count)]
    if getattr(dataset, "target_transform", None) is not None and hasattr(dataset, "classes"):
        return _transformed_names([str(name) for name in classes], count, dataset)
    if len(classes) < count:
        raise ValueError(
            f"{type(dataset).__name__} has label {count - 1} but only {len(classes)} class names"
        )
    return [str(name) for name in classes]


def _transformed_names(classes: list[str], count: int, dataset: Any) -> list[str]:
    names: dict[int, list[str]] = {}
    for label, name in enumerate(classes):
        try:
            names.setdefault(_transformed_label(label, dataset), []).append(name)
        except (LookupError, ValueError):  # a label that does not occur need not be transformed
            continue
    last = max((label for label in names if label >= 0), default=-1)
    found = [names.get(label, []) for label in range(max(count, last + 1))]
    return [own[0] if len(own) == 1 else str(label) for label, own in enumerate(found)]


def check_labels(labels: Tensor, classes: Sequence[str]) -> None:
    """Raises ValueError unless labels are [N] integers in 0..len(classes)-1."""
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"labels must be a 1-D tensor of integers, got {labels.dtype} {list(labels.shape)}"
        )
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= len(classes)):
        bad = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise ValueError(f"label {bad} is outside 0..{len(classes) - 1} ({len(classes)} classes)")


# Under these names data sets of dictionaries keep images and labels.
_IMAGE_KEYS = ("image", "images", "pixel_values", "img")
_LABEL_KEYS = ("label", "labels", "target", "class")


def image_and_label(item: Any, name: str) -> tuple[Any, int]:
    """Returns the image and the label of an item: the first two of a tuple, or of a dictionary.

    Args:
        item: what a data set returned.
        name: how errors call it.

    Raises:
        ValueError: for an item that is none of these, or a label that is no integer.
    """
    if isinstance(item, dict):
        keys = [
            next((key for key in keys if key in item), None) for keys in (_IMAGE_KEYS, _LABEL_KEYS)
        ]
        if None in keys:
            raise ValueError(
                f"{name} is a dictionary of {', '.join(map(str, item))}: it needs 'image' and "
                "'label'"
            )
        image, label = (item[key] for key in keys)
    elif isinstance(item, (tuple, list)) and len(item) >= 2:
        image, label = item[0], item[1]
    else:
        raise ValueError(f"{name} is a {type(item).__name__}: an item is (image, label)")
    try:
        return image, operator.index(label)
    except TypeError:
        pass
    raise ValueError(f"{name} has the label {label!r}, which is no integer")


class Selection(torch.utils.data.Dataset):
    """Some items of any data set, in a given order, with their labels and class names.

    The adapter for data sets of other packages: `Selection(theirs)` selects everything.
    """

    def __init__(self, dataset: Any, indices: Tensor | None = None):
        labels = labels_of(dataset)
        self.dataset = dataset
        self.chosen = torch.arange(len(labels)) if indices is None else indices.to(torch.int64)
        self.labels = labels[self.chosen]
        self.classes = classes_of(dataset)
        check_labels(labels, self.classes)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return image_and_label(self.dataset[int(self.chosen[index])], self.name_of(index))

    def select(self, indices: Tensor) -> "Selection":
        return Selection(self.dataset, self.chosen[indices])

    def name_of(self, index: int) -> str:
        return name_of(self.dataset, int(self.chosen[index]))


def select(dataset: Any, indices: Tensor) -> Dataset:
    """The items `indices` [n] of a data set, as a data set; in-memory sets stay in memory."""
    if hasattr(dataset, "select"):
        return dataset.select(indices)
    return Selection(dataset, indices)


def name_of(dataset: Any, index: int) -> str:
    """How the log calls an image: its file where the data set knows one, else its position."""
    if hasattr(dataset, "name_of"):
        return dataset.name_of(index)
    if isinstance(dataset, torch.utils.data.Subset):
        return name_of(dataset.dataset, int(dataset.indices[index]))
    samples = getattr(dataset, "samples", None)
    if isinstance(samples, (list, tuple)):
        return str(samples[index][0])
    return f"{type(dataset).__name__}[{index}]"
