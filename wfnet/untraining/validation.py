"""Scores of filters on a validation split, by which settings and stopping are judged."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wfnet.data import (
    Batch,
    CorruptImages,
    Dataset,
    corrupt_counter,
    labels_of,
    limit_per_class,
    multi_hot_of,
)
from wfnet.evaluation.metrics import average_precision
from wfnet.evaluation.pair_engine import Chunk, Measure, PairEngine, RunOptions, all_pairs
from wfnet.network import WFNet
from wfnet.services.ranks import Ranks
from wfnet.services.seeds import generator_for
from wfnet.untraining.expansion import ExpandedBatch
from wfnet.untraining.objectives import Objective, full_precision
from wfnet.untraining.untrain_config import UntrainConfig

PAIRS_PER_PASS = 512  # (image, row) pairs per forward pass
# Images that a validation looks at unless a run says otherwise: the larger number of the two.
_FEW_IMAGES, _FEW_PER_CLASS = 1000, 10
# Rows that a multi-label validation looks at: an average precision needs every image under its row.
_MULTI_LABEL_ROWS = 16


@dataclass(frozen=True)
class Validation:
    """Quick scores on a validation split.

    Attributes:
        acc_r, acc_f: means over rows that occur in the split (fractions).
        acc_r_per_class, acc_f_per_class: ``[K]`` lists, NaN for rows that do not occur.
        loss: the objective, from means over all pairs.

    On multi-label data, mean average precisions stand in the place of accuracies.
    """

    acc_r: float
    acc_f: float
    acc_r_per_class: list[float]
    acc_f_per_class: list[float]
    loss: float

    @property
    def score(self) -> float:
        """``0.5 * ((1 - Acc_f) + Acc_r)``."""
        return 0.5 * ((1 - self.acc_f) + self.acc_r)

    def rank(self, stop_on: str) -> tuple[float, ...]:
        """Returns what validations are compared by, larger is better.

        Accuracies of a small split are often equal; then the loss decides.

        Args:
            stop_on: "accuracy" or "loss", as in :class:`wfnet.UntrainConfig`.
        """
        loss = -self.loss if math.isfinite(self.loss) else -math.inf
        score = round(self.score, 9) if math.isfinite(self.score) else -math.inf
        return (loss,) if stop_on == "loss" else (score, loss)


class Validator(Measure, ABC):
    """Scores filters on a validation split, in batches that mix rows.

    Of a large split always the same images are looked at, evenly over classes: a run looks at it
    many times, and compares its filters only with each other. A subclass sets ``truth``, the labels
    of all images as the objective takes them, and ``rows_of_image``, under how many an image runs.

    Args:
        dataset: the split.
        num_classes: K.
        objective: gives the loss.
        config: which images and rows are looked at, and how the network is run.
        untrained: ``[R]`` ascending, the rows that are untrained; None: all.
        corrupt: counts unreadable images, which are left out; None: a new count.
        ranks: processes that share the images; this one alone by default.
    """

    def __init__(
        self,
        dataset: Dataset,
        num_classes: int,
        objective: Objective,
        config: UntrainConfig,
        untrained: Tensor | None = None,
        corrupt: CorruptImages | None = None,
        ranks: Ranks | None = None,
    ):
        self.dataset, self.num_classes, self.config = dataset, num_classes, config
        self.objective = objective
        self.needs_original = objective.needs_original
        self.corrupt = corrupt_counter(dataset, corrupt)
        self.ranks = ranks or Ranks(shared=False)
        self.rows = torch.arange(num_classes) if untrained is None else untrained
        self.images = _chosen_images(labels_of(dataset), config.validation_images, config.seed)
        # By the first image of a chunk. They stay on the device: reading a number waits for it.
        self.found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @abstractmethod
    def noted(self, logits: Tensor, batch: ExpandedBatch, chunk: Chunk) -> Tensor:
        """Returns what :meth:`per_row` needs of the pairs of a chunk."""

    @abstractmethod
    def per_row(self, noted: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns what is retained and what is forgotten under each row, ``[K]`` each or NaN."""

    def __call__(self, net: WFNet) -> Validation:
        """Returns the scores of ``net``.

        Raises:
            RuntimeError: if no image can be read, or too many cannot.
            FloatingPointError: if logits are NaN or infinite.
        """
        self.found.clear()
        config = self.config
        about = config.workers, self.corrupt, config.amp_dtype, config.channels_last
        options = RunOptions(None, *about, ranks=self.ranks)
        # To refuse broken logits would wait for the device at every chunk.
        engine = PairEngine(net, self.dataset, options, refuse_broken=False)
        together = max(1, PAIRS_PER_PASS // self.rows_of_image)
        engine.run(self, self.ranks.share(self.images.split(together)))
        forget, retain, noted = (
            self.ranks.join({k: found[part] for k, found in self.found.items()}, engine.device)
            for part in range(3)
        )
        if not noted:
            raise RuntimeError("no validation image can be read: repair those that the log names")
        with torch.no_grad():
            losses = self.objective.total(_mean(forget), _mean(retain), net)
        retained, forgotten = self.per_row(noted)
        return Validation(
            acc_r=float(retained.nanmean()),
            acc_f=float(forgotten.nanmean()),
            acc_r_per_class=retained.tolist(),
            acc_f_per_class=forgotten.tolist(),
            loss=float(losses.total),
        )

    def add(self, chunk: Chunk) -> None:
        """Takes the logits of all pairs of a chunk; those that forget come first."""
        row, target = self.rows[chunk.row], self.truth[chunk.indices][chunk.image]
        own = target.gather(1, row.unsqueeze(1)) if target.dim() == 2 else row == target
        batch = ExpandedBatch(row, chunk.image, target, int(own.sum())).to(chunk.logits.device)
        forget, retain = self.objective.costs(chunk.logits, batch, chunk.original)
        noted = self.noted(full_precision(chunk.logits), batch, chunk)
        self.found[int(chunk.indices[0])] = forget, retain, noted


def _mean(costs: list[Tensor]) -> Tensor:
    """Returns the mean of finite costs.

    Raises:
        FloatingPointError: if one is NaN or infinite: no comparison of such scores means anything.
    """
    costs = torch.cat(costs)
    broken = int((~costs.isfinite()).sum())
    if broken:
        raise FloatingPointError(
            f"the losses of {broken:,} of {len(costs):,} validation samples are NaN or infinite"
        )
    return costs.mean()


def _chosen_images(labels: Tensor, most: int | None, seed: int) -> Tensor:
    """Returns positions ``[n]`` of at most ``most`` images, as many of each class as there are."""
    classes = len(labels.unique())
    most = max(_FEW_IMAGES, _FEW_PER_CLASS * classes) if most is None else most
    if len(labels) <= most:
        return torch.arange(len(labels))
    return limit_per_class(labels, max(1, most // classes), seed)


class AccuracyValidator(Validator):
    """Quick Acc_r, Acc_f and loss of images with one label each.

    Every image runs under its own row (Acc_f) and under ``config.validation_rows`` other rows
    (Acc_r), chosen once by seed: all other rows where there are no more than that.
    """

    def __init__(self, dataset: Dataset, num_classes: int, objective: Objective, *more: Any):
        super().__init__(dataset, num_classes, objective, *more)
        others = max(1, len(self.rows) - 1)
        rows = min(self.config.validation_rows, others)
        # Image i is retained under the rows that follow its own at these distances (modulo R):
        # distinct, and every distance equally often.
        generator = generator_for(self.config.seed, 5)
        start = torch.randint(others, (len(labels_of(dataset)), 1), generator=generator)
        self.distances = 1 + (start + torch.arange(rows)) % others
        self.truth, self.rows_of_image = labels_of(dataset), 1 + rows

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every image under its own row first, then all under their other rows."""
        images, count = torch.arange(len(batch.labels)), len(self.rows)
        distances = self.distances[batch.indices]
        place = torch.searchsorted(self.rows, batch.labels)
        has_row = self.rows[place.clamp_max(count - 1)] == batch.labels
        # An image without a row of its own starts from any.
        place = place.where(has_row, batch.indices % count)
        others = (place.unsqueeze(1) + distances) % count
        if count == 1:  # only images of other classes are retained
            images, others = images[~has_row], others[~has_row]
        own = has_row.nonzero().flatten()
        image = torch.cat((own, images.repeat_interleave(distances.shape[1])))
        return image, torch.cat((place[own], others.flatten()))

    def noted(self, logits: Tensor, batch: ExpandedBatch, chunk: Chunk) -> Tensor:
        hits = logits.argmax(1) == batch.target
        return torch.stack((batch.forget, batch.target, hits.long()))

    def per_row(self, noted: list[Tensor]) -> tuple[Tensor, Tensor]:
        row, target, hits = torch.cat(noted, 1).cpu()
        found = []
        for part in (row != target, row == target):
            seen = row[part].bincount(minlength=self.num_classes)
            found.append(row[part].bincount(hits[part].double(), self.num_classes) / seen)
        return found[0], found[1]


class MultiLabelValidator(Validator):
    """Average precision of the retained and the forgotten labels, and loss.

    Every image (with ``multi_hot``) runs under up to 16 rows, drawn once by seed. The scores stand
    where those for one label have accuracies.
    """

    def __init__(self, dataset: Dataset, num_classes: int, objective: Objective, *more: Any):
        super().__init__(dataset, num_classes, objective, *more)
        self.multi_hot = multi_hot_of(dataset)
        # An average precision is defined where a label occurs.
        present = self.multi_hot.any(0).nonzero().flatten()
        order = torch.randperm(len(present), generator=generator_for(self.config.seed, 5))
        self.rows = present[order[:_MULTI_LABEL_ROWS]].sort().values
        self.truth, self.rows_of_image = self.multi_hot.float(), len(self.rows)

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every image under every row; pairs that forget a label of the image come first."""
        image, row = all_pairs(len(batch.labels), len(self.rows))
        own = self.multi_hot[batch.indices][image, self.rows[row]]
        order = torch.cat((own.nonzero().flatten(), (~own).nonzero().flatten()))
        return image[order], row[order]

    def noted(self, logits: Tensor, batch: ExpandedBatch, chunk: Chunk) -> Tensor:
        """``[n, rows + 1, K]``: logits of every image, and its true labels."""
        images = int(chunk.image.max()) + 1
        found = torch.empty(images, len(self.rows) + 1, self.num_classes, dtype=logits.dtype)
        found[chunk.image, chunk.row] = logits.cpu()
        found[chunk.image, -1] = batch.target.cpu().to(logits.dtype)
        return found

    def per_row(self, noted: list[Tensor]) -> tuple[Tensor, Tensor]:
        noted = torch.cat(noted).cpu()
        truth = noted[:, -1] > 0
        precision = torch.stack(
            [average_precision(part, truth) for part in noted[:, :-1].unbind(1)]
        )  # [rows, K]
        inside = self.rows.unsqueeze(1)
        retained = precision.scatter(1, inside, torch.nan).nanmean(1)
        whole = torch.full((self.num_classes,), torch.nan, dtype=precision.dtype)
        forgotten = precision.gather(1, inside).squeeze(1)
        return whole.scatter(0, self.rows, retained), whole.scatter(0, self.rows, forgotten)
