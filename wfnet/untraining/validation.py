"""Scores of filters on a validation split, by which settings and stopping are judged."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wfnet.data import Batch, CorruptImages, Dataset, labels_of, limit_per_class
from wfnet.data.multi_hot import multi_hot_of
from wfnet.evaluation.metrics import average_precision
from wfnet.evaluation.pair_engine import (
    Chunk,
    Measure,
    PairEngine,
    Pairs,
    RunOptions,
    all_pairs,
)
from wfnet.network import WFNet
from wfnet.services.device_copies import to_device_async
from wfnet.services.ranks import Ranks
from wfnet.services.seeds import generator_for
from wfnet.untraining.expansion import ExpandedBatch
from wfnet.untraining.multilabel import MultiLabelObjective
from wfnet.untraining.objectives import Objective, full_precision

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


@dataclass(frozen=True)
class HowToRun:
    """How a validation runs the network.

    Attributes:
        amp: autocast dtype; None for none.
        channels_last: images in channels-last layout.
        workers: processes that read images.
        corrupt: counts unreadable images, which are left out; None: a new count.
        ranks: processes that share the images; this one alone by default.
        images: how many are looked at; None: 1,000, or ten a class.
    """

    amp: torch.dtype | None = None
    channels_last: bool = False
    workers: int = 0
    corrupt: CorruptImages | None = None
    ranks: Ranks | None = None
    images: int | None = None


class Validator(ABC):
    """Scores filters on a validation split, in batches that mix rows.

    Of a large split always the same images are looked at, evenly over classes: a run looks at it
    many times, and compares its filters only with each other.

    Args:
        dataset: the split.
        images_per_pass: images that run together, each under all of its rows.
        seed: of the choice of images.
        how: how the network is run.
    """

    def __init__(self, dataset: Dataset, images_per_pass: int, seed: int, how: HowToRun):
        self.dataset = dataset
        self.images = _chosen_images(labels_of(dataset), how.images, seed)
        self.images_per_pass = max(1, images_per_pass)
        self.how = how
        self.ranks = how.ranks or Ranks(shared=False)

    def __call__(
        self, net: WFNet, interrupted: Callable[[], bool] = lambda: False
    ) -> Validation | None:
        """Returns the scores of ``net``; None if ``interrupted`` said so between two batches.

        Raises:
            RuntimeError: if no image can be read, or too many cannot.
            FloatingPointError: if logits are NaN or infinite.
        """
        how = self.how
        options = RunOptions(
            None, how.workers, how.corrupt, how.amp, how.channels_last, ranks=self.ranks
        )
        # To refuse broken logits would wait for the device at every chunk.
        engine = PairEngine(net, self.dataset, options, refuse_broken=False)
        measure = self.measure()
        chunks = self.ranks.share(self.images.split(self.images_per_pass))
        if not engine.run(measure, chunks, stopped=interrupted):
            return None
        with torch.no_grad():
            return self.scores(measure, net)

    @abstractmethod
    def measure(self) -> Measure:
        """Returns what takes the logits of one validation."""

    @abstractmethod
    def scores(self, measure: Measure, net: WFNet) -> Validation:
        """Returns the scores from what ``measure`` has taken."""


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
    """Quick Acc_r, Acc_f and loss.

    Every image runs under its own row (Acc_f) and under ``rows`` other rows (Acc_r), chosen once by
    seed: all other rows where there are no more than that.

    Args:
        dataset: images with one label each.
        num_classes: K.
        rows: other rows for each image.
        seed: of their choice.
        objective: gives the loss.
        how: how the network is run.
        untrained: ``[R]`` ascending, the rows that are looked at; None: all.
    """

    def __init__(
        self,
        dataset: Dataset,
        num_classes: int,
        rows: int,
        seed: int,
        objective: Objective,
        how: HowToRun | None = None,
        untrained: Tensor | None = None,
    ):
        self.num_classes = num_classes
        self.objective = objective
        self.untrained = torch.arange(num_classes) if untrained is None else untrained
        others = max(1, len(self.untrained) - 1)
        rows = min(rows, others)
        super().__init__(dataset, PAIRS_PER_PASS // (rows + 1), seed, how or HowToRun())
        # Image i is retained under the rows that follow its own at these distances (modulo R):
        # distinct, and every distance equally often.
        generator = generator_for(seed, 5)
        start = torch.randint(others, (len(labels_of(dataset)), 1), generator=generator)
        self.distances = 1 + (start + torch.arange(rows)) % others

    def measure(self) -> _Hits:
        return _Hits(self.objective, self.untrained, self.distances)

    def scores(self, measure: _Hits, net: WFNet) -> Validation:
        device = net.filter_parameters()[0].device
        hits, forget, retain = (
            self.ranks.join({first: found[part] for first, found in measure.found.items()}, device)
            for part in range(3)
        )
        if not hits:
            raise RuntimeError("no validation image can be read: repair those that the log names")
        row, target, correct = torch.cat(hits, 1).cpu()
        own = row == target
        losses = self.objective.total(_mean(forget), _mean(retain), net)
        acc_f = self._per_row(row[own], correct[own])
        acc_r = self._per_row(row[~own], correct[~own])
        return Validation(
            acc_r=float(acc_r.nanmean()),
            acc_f=float(acc_f.nanmean()),
            acc_r_per_class=acc_r.tolist(),
            acc_f_per_class=acc_f.tolist(),
            loss=float(losses.total),
        )

    def _per_row(self, row: Tensor, correct: Tensor) -> Tensor:
        seen = row.bincount(minlength=self.num_classes)
        return row.bincount(correct.double(), self.num_classes) / seen


class _Hits(Measure):
    """Rows, labels, hits and costs of every pair, by the first image of their chunk.

    They stay on the device until the end: reading a number waits for it.
    """

    def __init__(self, objective: Objective, rows: Tensor, distances: Tensor):
        self.objective = objective
        self.needs_original = objective.needs_original
        self.rows = rows
        self.distances = distances
        self.found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

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

    def add(self, chunk: Chunk, pairs: Pairs) -> None:
        logits = full_precision(pairs.logits)
        row, target = self.rows[pairs.row], chunk.labels[pairs.image]
        own = int((row == target).sum())  # they come first
        image, row, target = (
            to_device_async(part, logits.device) for part in (pairs.image, row, target)
        )
        original = None
        if chunk.original is not None:
            original = full_precision(chunk.original)[image[own:]]
        forget = self.objective.forget(logits[:own], target[:own])
        retain = self.objective.retain(logits[own:], target[own:], original)
        hits = torch.stack((row, target, (logits.argmax(1) == target).long()))
        self.found[int(chunk.indices[0])] = hits, forget, retain


class MultiLabelValidator(Validator):
    """Average precision of the forgotten and the retained labels, and loss.

    Every image runs under up to 16 rows, drawn once by seed. The scores stand where those for one
    label have accuracies.

    Args:
        dataset: images with several labels each (``multi_hot``).
        num_classes: K.
        seed: of the rows.
        objective: gives the loss.
        how: how the network is run.
    """

    def __init__(
        self,
        dataset: Dataset,
        num_classes: int,
        seed: int,
        objective: MultiLabelObjective,
        how: HowToRun | None = None,
    ):
        self.num_classes = num_classes
        self.objective = objective
        self.multi_hot = multi_hot_of(dataset)
        # An average precision is defined where a label occurs.
        present = self.multi_hot.any(0).nonzero().flatten()
        order = torch.randperm(len(present), generator=generator_for(seed, 5))
        self.rows = present[order[:_MULTI_LABEL_ROWS]].sort().values
        super().__init__(dataset, PAIRS_PER_PASS // len(self.rows), seed, how or HowToRun())

    def measure(self) -> _Rankings:
        return _Rankings(self.objective, self.rows, self.multi_hot)

    def scores(self, measure: _Rankings, net: WFNet) -> Validation:
        if not measure.scores:
            raise RuntimeError("no validation image can be read: repair those that the log names")
        truth = torch.cat(measure.truth)
        precision = torch.stack(
            [average_precision(part, truth) for part in torch.cat(measure.scores).unbind(1)]
        )  # [rows, K]
        inside = self.rows.unsqueeze(1)
        ap_f = precision.gather(1, inside).squeeze(1)
        ap_r = precision.scatter(1, inside, torch.nan).nanmean(1)
        losses = self.objective.total(_mean(measure.forget), _mean(measure.retain), net)
        return Validation(
            acc_r=float(ap_r.nanmean()),
            acc_f=float(ap_f.nanmean()),
            acc_r_per_class=self._per_class(ap_r),
            acc_f_per_class=self._per_class(ap_f),
            loss=float(losses.total),
        )

    def _per_class(self, values: Tensor) -> list[float]:
        whole = torch.full((self.num_classes,), torch.nan, dtype=values.dtype)
        return whole.scatter(0, self.rows, values).tolist()


class _Rankings(Measure):
    """Logits ``[n, rows, K]`` and true labels of every chunk, and costs of its pairs."""

    def __init__(self, objective: MultiLabelObjective, rows: Tensor, multi_hot: Tensor):
        self.objective = objective
        self.needs_original = objective.needs_original
        self.rows = rows
        self.multi_hot = multi_hot
        self.scores: list[Tensor] = []
        self.truth: list[Tensor] = []
        self.forget: list[Tensor] = []
        self.retain: list[Tensor] = []

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every image under every row; pairs that forget a label of the image come first."""
        image, row = all_pairs(len(batch.labels), len(self.rows))
        own = self.multi_hot[batch.indices][image, self.rows[row]]
        order = torch.cat((own.nonzero().flatten(), (~own).nonzero().flatten()))
        return image[order], row[order]

    def add(self, chunk: Chunk, pairs: Pairs) -> None:
        logits = full_precision(pairs.logits)
        truth, row = self.multi_hot[chunk.indices], self.rows[pairs.row]
        samples = ExpandedBatch(
            row,
            pairs.image,
            truth[pairs.image].float(),
            int(truth[pairs.image, row].sum()),
        ).to(logits.device)
        original = None
        if chunk.original is not None:
            original = full_precision(chunk.original)[samples.source]
        forget, retain = self.objective.terms(logits, samples, original)
        self.forget.append(forget)
        self.retain.append(retain)
        scores = torch.empty(len(truth), len(self.rows), logits.shape[1], dtype=logits.dtype)
        scores[pairs.image, pairs.row] = logits.cpu()
        self.scores.append(scores)
        self.truth.append(truth)
