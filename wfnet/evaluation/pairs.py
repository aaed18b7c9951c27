"""Which image is run under which row, and how often each class was right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wfnet.evaluation import metrics
from wfnet.services import settings
from wfnet.services.settings import check_value

# Images whose rows are drawn together: bounds the memory of the random keys (images x rows).
_DRAWN_TOGETHER = 1024


def check_classes(classes: Sequence[int] | None, labels: Tensor, num_classes: int) -> Tensor:
    """The rows to evaluate, ``[R]`` int64."""
    if num_classes < 2:
        raise ValueError(
            f"the network has {num_classes} class; unlearning needs one to forget and one to retain"
        )
    if not len(labels):
        raise ValueError("the data set is empty; evaluation needs images")
    low, high = (int(value) for value in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"the data set has label {low if low < 0 else high}, but the network's {num_classes} "
            f"classes run from 0 to {num_classes - 1}; evaluate on the data it was made for"
        )
    try:
        rows = torch.arange(num_classes) if classes is None else torch.as_tensor(classes)
    except (TypeError, ValueError, RuntimeError):  # no numbers
        rows = torch.empty(0)
    if rows.dim() != 1 or not rows.numel() or rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(
            f"classes must be one or more integers, or None for all classes; got {classes!r}"
        )
    rows = rows.to(device="cpu", dtype=torch.int64)
    outside = rows[(rows < 0) | (rows >= num_classes)]
    if len(outside):
        raise ValueError(
            f"class {int(outside[0])} in classes is out of range: the network's classes run from "
            f"0 to {num_classes - 1}"
        )
    if len(rows.unique()) != len(rows):
        raise ValueError(f"classes must name each class once; got {rows.tolist()}")
    count = torch.bincount(labels, minlength=num_classes)
    empty = rows[count[rows] == 0]
    if len(empty):
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise ValueError(
            f"class {int(empty[0])}{more} has no image in the data set; name the classes to "
            "evaluate in classes="
        )
    if int((count > 0).sum()) < 2:
        raise ValueError(
            f"all images of the data set are of class {low}; Acc_r needs images of other classes"
        )
    return rows


def check_settings(seed: int, zrf_base: float, retained_rows: int | None, rows: int) -> None:
    """Raises ValueError for settings of a measure that are out of range; ``rows``: how many."""
    metrics.check_base(zrf_base)
    check_value("seed", seed, settings.seed)
    if retained_rows is None:
        return
    if settings.int_from(1, rows - 1).violation(retained_rows):
        raise ValueError(
            f"retained_rows must lie in 1 .. {rows - 1} (the other rows of {rows}), or be None for "
            f"all; got {retained_rows}"
        )


class Pairing:
    """Under which rows each image is run.

    Args:
        classes: ``[R]``, the class of each row; positions in it are called row positions.
        labels: ``[N]``, labels of the data set.
        retained_rows: random rows per image besides its own; None for all rows.
    """

    def __init__(self, classes: Tensor, labels: Tensor, retained_rows: int | None, seed: int):
        self.classes = classes
        self.position = torch.full((int(max(classes.max(), labels.max())) + 1,), -1)
        self.position[classes] = torch.arange(len(classes))
        self.drawn: Tensor | None = None  # [N, 1 + r] row positions; own row first, or -1
        if retained_rows is None:
            self.pairs = len(labels) * len(classes)
            return
        generator = torch.Generator().manual_seed(seed)
        self.drawn = torch.cat(
            [self._draw(part, retained_rows, generator) for part in labels.split(_DRAWN_TOGETHER)]
        )
        self.pairs = int((self.drawn >= 0).sum())
        retained = torch.bincount(self.drawn[:, 1:].flatten(), minlength=len(classes))
        if not retained.all():
            row = int(classes[retained.argmin()])
            raise ValueError(
                f"retained_rows={retained_rows} leaves row {row} without a retained image; use "
                "more retained rows or another seed"
            )

    def _draw(self, labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
        own = self.position[labels].unsqueeze(1)
        keys = torch.rand(len(labels), len(self.classes), generator=generator)
        has_row = own.squeeze(1) >= 0
        keys[has_row] = keys[has_row].scatter(1, own[has_row], -1.0)  # never drawn as another row
        return torch.cat((own, keys.topk(count, dim=1).indices), 1)

    def of(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of the images ``indices [n]``, image by image.

        Returns:
            Positions in ``indices`` and row positions, both ``[P]``.
        """
        if self.drawn is None:
            count = len(self.classes)
            image = torch.arange(len(indices)).repeat_interleave(count)
            return image, torch.arange(count).repeat(len(indices))
        drawn = self.drawn[indices]
        image, column = (drawn >= 0).nonzero(as_tuple=True)
        return image, drawn[image, column]


class Hits:
    """Counts of samples, and of those whose class is among the k largest logits.

    Attributes:
        seen: ``[R, K]`` int64: samples of class k under row position r.
        right: by k the hits among them, like ``seen``.
    """

    def __init__(
        self,
        rows: int,
        num_classes: int,
        device: torch.device,
        top_k: tuple[int, ...] = (1, metrics.TOP_K),
    ):
        shape = (rows, num_classes)
        self.seen = torch.zeros(shape, dtype=torch.int64, device=device)
        self.right = {k: torch.zeros_like(self.seen) for k in top_k}

    def add(self, logits: Tensor, labels: Tensor, row: Tensor | None = None) -> None:
        """Counts samples: ``logits [p, K]``, ``labels [p]``, ``row [p]`` (all 0 if None)."""
        cell = labels if row is None else row * self.seen.shape[1] + labels
        self.seen.view(-1).index_add_(0, cell, torch.ones_like(labels))
        for k, counts in self.right.items():
            counts.view(-1).index_add_(0, cell, metrics.topk_hits(logits, labels, k).long())

    def tables(self) -> dict[str, Tensor]:
        """All counts by name: ``seen``, ``top1``, ``top5``."""
        return {"seen": self.seen, **{f"top{k}": counts for k, counts in self.right.items()}}


def accuracies(seen: Tensor, top1: Tensor, top5: Tensor, classes: Tensor) -> dict[str, Tensor]:
    return {
        "acc_r": metrics.accuracy_retain(top1, seen, classes),
        "acc_f": metrics.accuracy_forget(top1, seen, classes),
        "acc_r_top5": metrics.accuracy_retain(top5, seen, classes),
        "acc_f_top5": metrics.accuracy_forget(top5, seen, classes),
    }


def zrf_per_class(divergence: list[Tensor], own_class: Tensor, classes: Tensor) -> Tensor:
    """1 - mean divergence over the samples of each class, ``[R]``."""
    size = int(classes.max()) + 1
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, own_class, torch.cat(divergence))
    return 1 - (total / torch.bincount(own_class, minlength=size))[classes]
