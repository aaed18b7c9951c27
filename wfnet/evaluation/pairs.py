"""Which image is run under which row, and how often each class was right."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from wfnet.data import Dataset, classes_of
from wfnet.evaluation import metrics
from wfnet.evaluation.pair_engine import Chunk, Measure, all_pairs
from wfnet.services import settings
from wfnet.services.settings import check_value

# Images whose rows are drawn together: bounds the memory of the random keys (images x rows).
_DRAWN_TOGETHER = 1024


def check_classes(classes: Sequence[int] | None, labels: Tensor, num_classes: int) -> Tensor:
    """The rows to evaluate, ``[R]`` int64: ``classes``, or all of the network.

    Raises:
        ValueError: for classes or ``labels`` of the data that do not fit the network.
    """
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise ValueError(
            f"the data set has label {int(outside[0])}, but the network's {num_classes} classes "
            f"run from 0 to {num_classes - 1}; evaluate on the data it was made for"
        )
    rows = classes.tolist() if isinstance(classes, Tensor) else classes
    rows = list(range(num_classes) if rows is None else rows)
    known = all(isinstance(row, Integral) and 0 <= row < num_classes for row in rows)
    if not rows or not known or len(set(rows)) != len(rows):
        raise ValueError(
            "classes must be different integers, one or more, from 0 to "
            f"{num_classes - 1}, or None for all; got {rows}"
        )
    present = set(labels.tolist())
    empty = [row for row in rows if row not in present]
    if empty:
        raise ValueError(
            f"class {empty[0]} has no image in the data set; name those to evaluate in classes="
        )
    if len(present) < 2:
        raise ValueError(
            f"all images of the data set are of class {rows[0]}; Acc_r needs images of others"
        )
    return torch.tensor(rows)


def unreadable(what: str) -> ValueError:
    """The error of a class whose images cannot be read."""
    return ValueError(f"{what} has no readable image; repair the images, or leave it out")


def names_of(dataset: Dataset, num_classes: int) -> list[str]:
    """Names of all classes of a network: a number where the data have none."""
    names = classes_of(dataset)
    return names + [str(label) for label in range(len(names), num_classes)]


class Pairing:
    """Under which rows each image is run: all, or its own and some that are drawn by seed.

    Attributes:
        classes: ``[R]``, the class of each row; positions in it are called row positions.
        labels: ``[N]``, of all images.
        pairs: their number.
        has_row: ``[N]`` bool, whether the class of each image has a row.
    """

    def __init__(self, classes: Tensor, labels: Tensor, retained_rows: int | None, seed: int):
        check_value("seed", seed, settings.seed)
        rows = len(classes)
        self.classes, self.labels = classes, labels
        position = torch.full((int(max(classes.max(), labels.max())) + 1,), -1)
        position[classes] = torch.arange(rows)
        own = position[labels]
        self.has_row = own >= 0
        self.drawn: Tensor | None = None  # [N, 1 + r] row positions; own row first, or -1
        self.pairs = len(labels) * rows
        if retained_rows is None:
            return
        check_value("retained_rows", retained_rows, settings.int_from(1, rows - 1))
        generator = torch.Generator().manual_seed(seed)
        others = [self._draw(part, retained_rows, generator) for part in own.split(_DRAWN_TOGETHER)]
        self.drawn = torch.cat((own.unsqueeze(1), torch.cat(others)), 1)
        self.pairs = int((self.drawn >= 0).sum())
        retained = torch.bincount(self.drawn[:, 1:].flatten(), minlength=rows)
        if not retained.all():
            raise ValueError(
                f"retained_rows={retained_rows} leaves row {int(classes[retained.argmin()])} "
                "without a retained image; use more retained rows or another seed"
            )

    def _draw(self, own: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """``[n, count]`` row positions other than ``own [n]``."""
        keys = torch.rand(len(own), len(self.classes), generator=generator)
        image = (own >= 0).nonzero().squeeze(1)
        keys[image, own[image]] = -1.0  # never drawn as another row
        return keys.topk(count, dim=1).indices

    def of(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of the images ``indices [n]``: positions in it and row positions, both ``[P]``."""
        if self.drawn is None:
            return all_pairs(len(indices), len(self.classes))
        drawn = self.drawn[indices]
        image, column = (drawn >= 0).nonzero(as_tuple=True)
        return image, drawn[image, column]


class HitCounts(Measure):
    """Counts of samples and of hits, under every row and of the original network.

    Attributes:
        tables: ``seen``, ``top1``, ``top5 [R, K]`` int64: samples of class k under row position r,
            and those whose class is the first, or one of the first five; ``original_seen``,
            ``original_top1``, ``original_top5 [K]``.
    """

    def __init__(self, rows: Tensor, num_classes: int, device: torch.device):
        self.rows = rows
        self.tables = {
            f"{prefix}{name}": torch.zeros(*shape, dtype=torch.int64, device=device)
            for prefix, shape in (("", (len(rows), num_classes)), ("original_", (num_classes,)))
            for name in ("seen", "top1", "top5")
        }

    def add(self, chunk: Chunk) -> None:
        device = chunk.logits.device
        labels = chunk.labels.to(device, non_blocking=True)
        self._count("original_", chunk.original, labels, torch.zeros_like(labels))
        self._count("", chunk.logits, labels[chunk.image.to(device)], chunk.row.to(device))

    def _count(self, prefix: str, logits: Tensor, labels: Tensor, row: Tensor) -> None:
        hits = {
            "seen": torch.ones_like(labels),
            "top1": metrics.topk_hits(logits, labels, 1).long(),
            "top5": metrics.topk_hits(logits, labels, metrics.TOP_K).long(),
        }
        for name, counted in hits.items():
            table = self.tables[prefix + name]
            table.view(-1).index_add_(0, row * table.shape[-1] + labels, counted)
