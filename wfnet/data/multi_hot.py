"""Images with several labels each: a folder of images beside a file of labels, or tensors.

Layout of a folder::

    root/train/labels.csv     image,labels          root/val/labels.csv
    root/train/a.jpg          a.jpg,cat;dog         root/val/...
    root/train/more/b.png     more/b.png,cat

Data sets of this kind have ``multi_hot`` [N, K] bool beside ``labels`` [N]: the rarest true label
of each image, so that drawing images by ``labels`` meets every class about equally often.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wfnet.data.dataset import labels_of
from wfnet.data.encoded import EncodedFiles
from wfnet.data.tensor_images import TensorImages
from wfnet.data.transforms import Transform
from wfnet.services.log import logger

LABEL_FILE = "labels.csv"


def multi_hot_of(dataset: Any) -> Tensor | None:
    """True labels [N, K] bool of a multi-label data set; None for one with a label per image."""
    if isinstance(dataset, torch.utils.data.Subset):
        whole = multi_hot_of(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(dataset.indices)]
    return getattr(dataset, "multi_hot", None)


def truth_of(dataset: Any) -> Tensor:
    """Returns true labels: ``[N]`` int64, or ``[N, K]`` bool where images have several."""
    multi_hot = multi_hot_of(dataset)
    return labels_of(dataset) if multi_hot is None else multi_hot


def is_of(truth: Tensor, *classes: int) -> Tensor:
    """Returns whether one of ``classes`` is true of each image, ``[N]`` bool."""
    if truth.dim() == 2:
        return truth[:, list(classes)].any(1)
    return torch.isin(truth, torch.tensor(classes))


def label_loss(logits: Tensor, truth: Tensor, smoothing: float = 0.0) -> Tensor:
    """Returns the mean loss a classifier learns by: ``logits [n, K]``, of :func:`truth_of`."""
    if truth.dim() == 1:
        return F.cross_entropy(logits, truth, label_smoothing=smoothing)
    return F.binary_cross_entropy_with_logits(logits, truth.float())


def rarest_labels(multi_hot: Tensor) -> Tensor:
    """For each row of [N, K] bool the true label that is rarest over all rows, [N] int64.

    Raises ValueError for a row without a true label, or with nothing but true labels: the one has
    nothing to forget, the other could be retained under no row.
    """
    counts = multi_hot.sum(1)
    for bad, what in ((counts == 0, "no label"), (counts == multi_hot.shape[1], "every label")):
        if bad.any():
            raise ValueError(
                f"image {int(bad.nonzero()[0])} has {what}; a multi-label image must have at least "
                "one label, and lack at least one"
            )
    frequency = multi_hot.sum(0).expand_as(multi_hot)
    return frequency.masked_fill(~multi_hot, len(multi_hot) + 1).argmin(1)


class MultiLabelTensors(TensorImages):
    """`TensorImages` with several labels each: `multi_hot` [N, K] bool takes the labels' place."""

    def __init__(self, images: Tensor, multi_hot: Tensor, classes: Sequence[str], **options: Any):
        multi_hot = torch.as_tensor(multi_hot)
        if multi_hot.shape != (len(images), len(classes)):
            raise ValueError(
                f"multi_hot must be [{len(images)}, {len(classes)}], got {list(multi_hot.shape)}"
            )
        self.multi_hot = multi_hot.bool()
        super().__init__(images, rarest_labels(self.multi_hot), classes, **options)


class MultiLabelFiles(EncodedFiles):
    """Image files under `root` with the labels of a file there, decoded when asked for.

    classes: the class names in their order; None takes those of the file, sorted. Images without a
             label are left out, and the log says how many.

    Raises FileNotFoundError for a missing file of labels or image, ValueError for a file that is
    damaged or names another class.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Transform,
        channels: int = 3,
        classes: Sequence[str] | None = None,
    ):
        root = Path(root)
        path = root / LABEL_FILE
        table = read_labels(path)
        known = {image: labels for image, labels in table.items() if labels}
        if len(known) < len(table):
            logger.warning("%s: %d images have no label: left out", path, len(table) - len(known))
        self.take_files(root, list(known), path)
        names = sorted({name for labels in known.values() for name in labels})
        if classes is not None:
            unknown = sorted(set(names) - set(classes))
            if unknown:
                raise ValueError(f"{path} has the class {unknown[0]!r}, unknown to the other parts")
            names = list(classes)
        number = {name: index for index, name in enumerate(names)}
        multi_hot = torch.zeros(len(known), len(names), dtype=torch.bool)
        for row, labels in enumerate(known.values()):
            multi_hot[row, [number[name] for name in labels]] = True
        super().__init__(rarest_labels(multi_hot), names, transform, channels)
        self.multi_hot = multi_hot


def read_labels(path: Path) -> dict[str, list[str]]:
    """Image -> its labels, from a CSV file with the columns image and labels, separated by `;`.

    Raises FileNotFoundError if it is missing, ValueError if it is something else.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"image", "labels"} <= rows[0].keys():
        raise ValueError(
            f"{path} must have the columns image and labels (cat;dog), and a line for each image"
        )
    split = ((row["image"], (row["labels"] or "").split(";")) for row in rows)
    return {image: [n.strip() for n in names if n.strip()] for image, names in split}
