"""Scores of filters on a validation split, by which settings and stopping are judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wfnet.data import CorruptImages, Dataset, batches, labels_of
from wfnet.network import WFNet
from wfnet.services.ranks import Ranks
from wfnet.services.seeds import generator_for
from wfnet.untraining.expansion import ExpandedBatch
from wfnet.untraining.objectives import Objective, full_precision

PAIRS_PER_PASS = 512  # (image, row) pairs per forward pass


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
        return (loss,) if stop_on == "loss" else (round(self.score, 9), loss)


class Validator:
    """Quick Acc_r, Acc_f and loss on a validation split, in batches that mix rows.

    Every image runs under its own row (Acc_f) and under ``rows`` other rows (Acc_r), chosen once by
    seed: all other rows where there are no more than that.
    """

    def __init__(
        self,
        dataset: Dataset,
        num_classes: int,
        rows: int,
        seed: int,
        objective: Objective,
        amp: torch.dtype | None = None,
        channels_last: bool = False,
        workers: int = 0,
        corrupt: CorruptImages | None = None,
        ranks: Ranks | None = None,
    ):
        self.ranks = ranks or Ranks(shared=False)
        self.dataset = dataset
        self.labels = labels_of(dataset)
        self.num_classes = num_classes
        self.rows = min(rows, num_classes - 1)
        self.objective = objective
        self.amp = amp
        self.channels_last = channels_last
        self.workers = workers
        self.corrupt = corrupt
        # Image i is retained under the rows that follow its own at these distances (modulo K):
        # distinct, and every distance equally often.
        generator = generator_for(seed, 5)
        start = torch.randint(num_classes - 1, (len(self.labels), 1), generator=generator)
        self.distances = 1 + (start + torch.arange(self.rows)) % (num_classes - 1)

    def pairs(self, labels: Tensor, indices: Tensor) -> ExpandedBatch:
        """All (image, row) pairs of some images: labels ``[n]``, positions in the split ``[n]``."""
        n = len(labels)
        others = (labels.unsqueeze(1) + self.distances[indices]) % self.num_classes
        source = torch.cat((torch.arange(n), torch.arange(n).repeat_interleave(self.rows)))
        return ExpandedBatch(torch.cat((labels, others.flatten())), source, labels[source], n)

    @torch.no_grad()
    def __call__(
        self, net: WFNet, interrupted: Callable[[], bool] = lambda: False
    ) -> Validation | None:
        """Scores of ``net``; None if ``interrupted`` said so between two batches."""
        device = net.filter_parameters()[0].device
        per_batch = max(1, PAIRS_PER_PASS // (self.rows + 1))
        order = self.ranks.share(torch.arange(len(self.labels)).split(per_batch))
        hits, forgotten, retained = {}, {}, {}  # by batch
        pin = device.type == "cuda"
        for batch in batches(self.dataset, order, self.workers, self.corrupt, pin):
            number = int(batch.indices[0]) // per_batch
            pairs = self.pairs(batch.labels, batch.indices)
            moved = pairs.to(device)
            if interrupted():
                return None
            logits, original = _logits_of(
                net, batch.images, moved, self.objective, self.amp, self.channels_last
            )
            half = moved.retain_half
            forgotten[number] = self.objective.forget(
                logits[moved.forget_half], moved.target[moved.forget_half]
            )
            if original is not None:
                original = original[moved.source[half]]
            retained[number] = self.objective.retain(logits[half], moved.target[half], original)
            # Everything stays on the device until the end: reading a number waits for it.
            correct = logits.argmax(1) == moved.target
            hits[number] = torch.stack((moved.forget, moved.target, correct.long()))
        hits = self.ranks.join(hits, device)
        if not hits:
            raise RuntimeError("no validation image can be read: repair those that the log names")
        row, target, correct = torch.cat(hits, 1).cpu()
        own = row == target
        means = [torch.cat(self.ranks.join(c, device)).mean() for c in (forgotten, retained)]
        losses = self.objective.total(*means, net)
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


def _logits_of(
    net: WFNet,
    images: Tensor,
    batch: ExpandedBatch,
    objective: Objective,
    amp: torch.dtype | None,
    channels_last: bool,
) -> tuple[Tensor, Tensor | None]:
    """Logits ``[B, K]`` of an expanded batch, and the original network's for its images ``[n, K]``.

    Both in at least fp32; ``batch`` is on the network's device.
    """
    device = batch.forget.device
    images = images.to(device, non_blocking=True)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, amp, enabled=amp is not None):
        original = None
        if objective.needs_original:
            with torch.no_grad():
                original = net(images, forget=None)
        logits = net(images, forget=batch.forget, source=batch.source)
    return full_precision(logits), None if original is None else full_precision(original)
