"""What a data set is to this package: labelled images, read one by one or in batches."""

import copy
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

Images = TypeVar("Images", bound="LabelledImages")


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
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def is_decoding_error(error: Exception) -> bool:
    """Whether an error of an image decoder says "this file is damaged".

    Pillow raises OSError without an errno for damaged data (SyntaxError for some PNG files); an
    OSError with an errno comes from the system (a lost disk, too many open files) and is no
    property of the image.
    """
    if isinstance(error, OSError):
        return error.errno is None
    return isinstance(error, SyntaxError) or type(error).__name__ == "DecompressionBombError"


# Names of columns, and of the entries of items that are dicts, in the packages of Hugging Face.
IMAGE_NAMES = ("pixel_values", "image", "img")
LABEL_NAMES = ("labels", "label")


def is_table(dataset: Any) -> bool:
    """Whether a data set is a `datasets.Dataset`: a table with columns, read at random."""
    return hasattr(dataset, "column_names") and hasattr(dataset, "__len__")  # no stream


def _label_column(dataset: Any) -> str:
    for name in LABEL_NAMES:
        if name in dataset.column_names:
            return name
    raise ValueError(
        f"the data set has columns {', '.join(dataset.column_names)}: call that of the classes "
        "`label` (rename_column)"
    )


def labels_of(dataset: Any) -> Tensor:
    """Labels [N] int64 of any torchvision-like data set, without reading one image.

    Looks for `.labels`, `.targets` and `.samples` (pairs of path and label), follows `Subset` and
    `ConcatDataset`, `TensorDataset` and timm's `.reader`, and takes the column `labels` or `label`
    of a `datasets.Dataset`. Raises ValueError if none of them is one
    integer per image. `wfnet.data.batches` refuses items with other labels, such as those that a
    `target_transform` makes.
    """
    if isinstance(dataset, torch.utils.data.Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        return torch.cat([labels_of(part) for part in dataset.datasets])
    candidates = [getattr(dataset, name, None) for name in ("labels", "targets")]
    if is_table(dataset):
        candidates.append(list(dataset.with_format(None)[_label_column(dataset)]))
    if isinstance(dataset, torch.utils.data.TensorDataset):
        candidates.append(dataset.tensors[-1])
    for holder in (dataset, getattr(dataset, "reader", None)):
        samples = getattr(holder, "samples", None)
        if isinstance(samples, (list, tuple)):
            candidates.append([sample[1] for sample in samples])
    for candidate in candidates:
        try:
            labels = torch.as_tensor(candidate)
        except (TypeError, ValueError, RuntimeError):  # None, a method, or no numbers
            continue
        if labels.shape == (len(dataset),) and not labels.is_floating_point():
            return labels.to(device="cpu", dtype=torch.int64)
    raise ValueError(
        f"{type(dataset).__name__} has no usable labels: give it an attribute `labels` or "
        "`targets` with one integer per image"
    )


def classes_of(dataset: Any) -> list[str]:
    """Class names: `.classes` if the data set has them, else its label numbers as text."""
    if isinstance(dataset, torch.utils.data.Subset):
        return classes_of(dataset.dataset)
    labels = labels_of(dataset)
    count = int(labels.max()) + 1 if len(labels) else 0
    classes = getattr(dataset, "classes", None)
    if is_table(dataset):
        classes = getattr(dataset.features[_label_column(dataset)], "names", None)
    if classes is None:
        return [str(label) for label in range(count)]
    if len(classes) < count:
        raise ValueError(
            f"{type(dataset).__name__} has label {count - 1} but only {len(classes)} class names"
        )
    return [str(name) for name in classes]


def check_labels(labels: Tensor, classes: Sequence[str]) -> None:
    """Raises ValueError unless labels are [N] integers in 0..len(classes)-1."""
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"labels must be a 1-D tensor of integers, got {labels.dtype} {list(labels.shape)}"
        )
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if len(outside):
        raise ValueError(
            f"label {int(outside[0])} is outside 0..{len(classes) - 1} ({len(classes)} classes)"
        )


def image_and_label_of(item: Any, name: str) -> tuple[Any, Any]:
    """Returns the image and the label of an item: its first two values, or the entries
    `pixel_values`, `image` or `img` and `labels` or `label` of a dict.

    Raises ValueError, which calls the item by `name`, for anything else.
    """
    if isinstance(item, Mapping):
        pair = [next((k for k in ks if k in item), None) for ks in (IMAGE_NAMES, LABEL_NAMES)]
        if None not in pair:
            return item[pair[0]], item[pair[1]]
        raise ValueError(
            f"{name} has {', '.join(map(str, item))}: an item that is a dict has `pixel_values` or "
            "`image`, and `labels` or `label`"
        )
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise ValueError(f"{name} is a {type(item).__name__}: an item is (image, label)")
    return item[0], item[1]


def image_and_label(item: Any, name: str) -> tuple[Any, int]:
    """:func:`image_and_label_of`, with an integer as label."""
    image, label = image_and_label_of(item, name)
    try:
        return image, operator.index(label)
    except TypeError as error:
        raise ValueError(f"{name} has the label {label!r}, which is no integer") from error


class LabelledImages(torch.utils.data.Dataset):
    """Base of this package's data sets: what can be done with labels alone.

    labels:    [N] int64.
    classes:   their names.
    multi_hot: [N, K] bool, all true labels of images with several; else None.
    per_image: names of the attributes with an entry for each image.
    """

    labels: Tensor
    classes: list[str]
    multi_hot: Tensor | None = None
    per_image: tuple[str, ...] = ("labels", "multi_hot")

    def __len__(self) -> int:
        return len(self.labels)

    def select(self: Images, indices: Tensor) -> Images:
        """The chosen images as a data set of their own."""
        chosen = copy.copy(self)
        for name in self.per_image:
            values = getattr(self, name)
            if values is not None:
                positions = indices if torch.is_tensor(values) else indices.numpy()
                setattr(chosen, name, values[positions])
        return chosen

    def renumbered(self: Images, numbers: Tensor, classes: Sequence[str]) -> Images:
        """The same images; class k has the number `numbers[k]`, and `classes` are the new names."""
        other = copy.copy(self)
        other.labels, other.classes = numbers[self.labels], list(classes)
        if self.multi_hot is not None:
            other.multi_hot = self.multi_hot[:, numbers.argsort()]
        return other


class Selection(LabelledImages):
    """Some items of any data set, in a given order, with their labels and class names.

    The adapter for data sets of other packages: `Selection(theirs)` selects everything.
    """

    per_image = ("labels", "multi_hot", "chosen")

    def __init__(self, dataset: Any, indices: Tensor | None = None):
        labels = labels_of(dataset)
        self.dataset = dataset
        self.chosen = torch.arange(len(labels)) if indices is None else indices.to(torch.int64)
        self.labels = labels[self.chosen]
        self.classes = classes_of(dataset)
        check_labels(labels, self.classes)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return image_and_label(self.dataset[int(self.chosen[index])], self.name_of(index))

    def name_of(self, index: int) -> str:
        return name_of(self.dataset, int(self.chosen[index]))


def select(dataset: Any, indices: Tensor) -> Dataset:
    """The items `indices` [n] of a data set, as a data set; in-memory sets stay in memory."""
    if hasattr(dataset, "select") and not is_table(dataset):
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
