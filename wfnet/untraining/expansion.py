"""Label expansion: which rows of the filter matrices each image of a minibatch goes through.

Paper, "Multi-class unlearning": half of a minibatch unlearns under the row of its own label, the
other half is retained under random rows of other classes, each image ``M`` times. With compound
rows, each image is retained under two random rows at once besides, and every other one unlearns
under its own row and another: products of rows then forget each of their classes, and no row rests
on gates that another one closes. Samplers say which images make up minibatch number ``step``.
Everything here is a function of a seed and a step alone, so an interrupted run continues with
exactly the batches that it would have seen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from wfnet.services.device_copies import to_device_async
from wfnet.services.seeds import generator_for


@dataclass(frozen=True)
class ExpandedBatch:
    """A minibatch of ``n`` images as the ``B`` samples that go through the network.

    The first ``forget_size`` samples are the forget half, the others the retain half.

    Attributes:
        forget: ``[B]`` int64, the row of each sample (its forget label); with compound rows
            ``[B, 2]``, padded with -1.
        source: ``[B]`` int64, position in the minibatch of the image of each sample.
        target: ``[B]`` int64, ground-truth label of each sample.
        forget_size: number of samples in the forget half.
        original: ``[n, K]``, the original network's logits for the images, where they are known.
        weight: ``[B]`` fp32, weights of the samples in the means over a half; None: all equal.
    """

    forget: Tensor
    source: Tensor
    target: Tensor
    forget_size: int
    original: Tensor | None = None
    weight: Tensor | None = None

    @property
    def forget_half(self) -> slice:
        """Samples that unlearn their own label."""
        return slice(0, self.forget_size)

    @property
    def retain_half(self) -> slice:
        """Samples that keep their label under rows of other classes."""
        return slice(self.forget_size, None)

    @property
    def rows(self) -> Tensor:
        """``[R]``, the distinct rows that occur, in order."""
        return self.forget[self.forget >= 0].unique()

    def weights_of(self, samples: slice | Tensor) -> Tensor | None:
        """The weights of some samples; None if all are equal."""
        return None if self.weight is None else self.weight[samples]

    def __len__(self) -> int:
        return self.forget.shape[0]

    def to(self, device: torch.device | str) -> ExpandedBatch:
        """The same batch on ``device``; copies do not wait for the device."""
        return ExpandedBatch(
            to_device_async(self.forget, device),
            to_device_async(self.source, device),
            to_device_async(self.target, device),
            self.forget_size,
            None if self.original is None else to_device_async(self.original, device),
            None if self.weight is None else to_device_async(self.weight, device),
        )


def random_other_rows(
    labels: Tensor, num_classes: int, generator: torch.Generator, rows: Tensor | None = None
) -> Tensor:
    """Returns a row per entry of ``labels``, uniform over the other classes, independent.

    Args:
        labels: int64 of any shape, in ``0 .. K-1``.
        num_classes: K.
        generator: source of the rows.
        rows: ``[R]``, distinct, ascending: classes that are drawn from; all by default.

    Raises:
        ValueError: if there is no other class.
    """
    if rows is not None:
        place = torch.searchsorted(rows, labels).clamp_max(len(rows) - 1)
        own = rows[place] == labels
        others = len(rows) - own.long()
        if not bool((others > 0).all()):
            raise ValueError(
                "images of the only class that is untrained can be retained under no other row; "
                "untrain two classes or more, or add images of others"
            )
        draw = (torch.rand(labels.shape, generator=generator, dtype=torch.float64) * others).long()
        return rows[draw + (own & (draw >= place))]
    if num_classes < 2:
        raise ValueError(
            f"label expansion needs at least 2 classes, got {num_classes}: a retained image goes "
            "through rows of classes other than its own"
        )
    rows = torch.randint(num_classes - 1, labels.shape, generator=generator)
    return rows + (rows >= labels)


def _rows_beside(rows: Tensor, generator: torch.Generator, own: Tensor, taken: Tensor) -> Tensor:
    """Returns one of ``rows`` per entry of ``own`` that is neither it nor ``taken``; -1: none."""
    other = taken.masked_fill(taken == own, -1)
    excluded = torch.stack((own, other), 1)
    place = torch.searchsorted(rows, excluded)
    among = rows[place.clamp_max(len(rows) - 1)] == excluded
    left = len(rows) - among.sum(1)
    draw = (torch.rand(own.shape, generator=generator, dtype=torch.float64) * left).long()
    for gap in torch.where(among, place, len(rows)).sort(1).values.unbind(1):
        draw = draw + (draw >= gap)
    return torch.where(left > 0, rows[draw.clamp_max(len(rows) - 1)], -1)


def expand(
    labels: Tensor,
    num_classes: int,
    label_expansion: int,
    generator: torch.Generator,
    share_images: bool = False,
    forget_size: int | None = None,
    rows: Tensor | None = None,
    compound: float = 0.0,
) -> ExpandedBatch:
    """Expands a minibatch (paper, "label expansion").

    Args:
        labels: ``[n]`` int64 on the host, ground truth of the images.
        num_classes: K, at least 2.
        label_expansion: M, how many rows each retained image goes through; rows are drawn
            uniformly over the other K-1 classes, independently, with replacement.
        generator: source of the rows; it alone decides them.
        share_images: the same images serve both halves, instead of half of them each.
        forget_size: number of leading images in the forget half if images are not shared; half of
            them, rounded down, by default.
        rows: ``[R]``, distinct, ascending: classes whose rows are untrained; all by default.
        compound: weight of compound rows, beside 1 for single ones; 0: there are none. Each
            retained image goes through two other rows at once, and the first half of the forget
            images through their own and another, as far as there are so many. In the means over a
            half all compound samples together weigh ``compound`` times what all others do.

    Returns:
        ``n + n * M`` samples with shared images, else ``forget_size + (n - forget_size) * M``;
        with compound rows as many more as there are retained images and pairs of forget images.

    Raises:
        ValueError: for fewer than 2 classes, M below 1, or labels of the wrong shape.
    """
    if label_expansion < 1:
        raise ValueError(f"label_expansion must be 1 or more, got {label_expansion}")
    if labels.dim() != 1:
        raise ValueError(f"labels must be [n], got {list(labels.shape)}")
    n = len(labels)
    if share_images:
        forgetting, retaining = torch.arange(n), torch.arange(n)
    else:
        cut = n // 2 if forget_size is None else forget_size
        forgetting, retaining = torch.arange(cut), torch.arange(cut, n)
    retained = retaining.repeat_interleave(label_expansion)
    others = random_other_rows(labels[retained], num_classes, generator, rows)
    if not compound:
        source = torch.cat((forgetting, retained))
        forget = torch.cat((labels[forgetting], others))
        return ExpandedBatch(forget, source, labels[source], len(forgetting))
    twice = forgetting[: len(forgetting) // 2]
    own, kept = labels[twice], labels[retaining]
    first = random_other_rows(kept, num_classes, generator, rows)
    beside = partial(_rows_beside, torch.arange(num_classes) if rows is None else rows, generator)
    forget = torch.cat(
        (
            _padded(labels[forgetting]),
            torch.stack((own, beside(own, own)), 1),
            _padded(others),
            torch.stack((first, beside(kept, first)), 1),
        )
    )
    weights = [
        part
        for single, double in ((forgetting, twice), (retained, retaining))
        for part in (
            torch.ones(len(single)),
            torch.full((len(double),), compound * len(single) / max(len(double), 1)),
        )
    ]
    source = torch.cat((forgetting, twice, retained, retaining))
    forget_size = len(forgetting) + len(twice)
    return ExpandedBatch(forget, source, labels[source], forget_size, weight=torch.cat(weights))


def _padded(rows: Tensor) -> Tensor:
    """``[n, 2]`` of single rows ``[n]``."""
    return torch.stack((rows, torch.full_like(rows, -1)), 1)


class Sampler(ABC):
    """Minibatches by number: ``batch(step)`` is always the same for the same step.

    There is no state to save: to resume, go on with the next step.
    """

    @abstractmethod
    def batch(self, step: int) -> Tensor:
        """``[n]`` int64 positions in the data set, in the order of the minibatch."""

    def batches(self, start: int, stop: int) -> Iterator[Tensor]:
        """Minibatches ``start .. stop - 1``."""
        return (self.batch(step) for step in range(start, stop))


class ShuffledSampler(Sampler):
    """Passes over the data set in random order, cut into batches of ``n`` images.

    A batch may span two passes, so all batches have ``n`` images.

    Args:
        size: images in the data set.
        batch_size: n.
        seed: seed of the order.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        if size < 1 or batch_size < 1:
            raise ValueError(f"size and batch_size must be 1 or more, got {size}, {batch_size}")
        self.size = size
        self.batch_size = batch_size
        self._order = lru_cache(2)(
            lambda epoch: torch.randperm(size, generator=generator_for(seed, 1, epoch))
        )

    def batch(self, step: int) -> Tensor:
        position = step * self.batch_size + torch.arange(self.batch_size)
        epochs = position // self.size
        return torch.cat(
            [
                self._order(epoch)[position[epochs == epoch] % self.size]
                for epoch in epochs.unique().tolist()
            ]
        )


class RoundRobinSampler(Sampler):
    """Classes in turn, in an order shuffled anew every round: all rows are trained equally often.

    Over any number of batches two classes differ by at most one occurrence, whatever their sizes;
    within a class, images come in shuffled passes.

    Args:
        labels: ``[N]`` int64.
        batch_size: n, below or above the number of classes.
        seed: seed of both orders.
        stream: samplers with different streams are independent of each other.

    Raises:
        ValueError: if there are no images or ``batch_size`` is below 1.
    """

    def __init__(self, labels: Tensor, batch_size: int, seed: int, stream: int = 0):
        if batch_size < 1 or len(labels) == 0:
            raise ValueError(
                f"batch_size and images must be 1 or more, got {batch_size}, {len(labels)}"
            )
        self.batch_size = batch_size
        order = labels.argsort(stable=True)
        sizes = labels.bincount()
        present = sizes.nonzero().flatten()
        members = dict(zip(present.tolist(), order.split(sizes[present].tolist()), strict=True))
        self.classes = len(present)
        self._round = lru_cache(batch_size // self.classes + 2)(
            lambda number: present[
                torch.randperm(len(present), generator=generator_for(seed, 2, stream, number))
            ].tolist()
        )

        def shuffled(label: int, visit: int) -> np.ndarray:
            key = (seed, 3, stream, label, visit)
            order = torch.randperm(self._sizes[label], generator=generator_for(*key))
            return members[label][order].numpy()  # an element of a tensor takes a microsecond

        self._sizes = sizes.tolist()
        self._shuffled = lru_cache(2 * self.classes)(shuffled)

    def batch(self, step: int) -> Tensor:
        first = step * self.batch_size
        chosen = []
        for position in range(first, first + self.batch_size):
            number, place = divmod(position, self.classes)
            label = self._round(number)[place]
            visit, within = divmod(number, self._sizes[label])
            chosen.append(self._shuffled(label, visit)[within])
        return torch.from_numpy(np.array(chosen))


class HalvesSampler(Sampler):
    """Joins two samplers: the first gives the forget half, the second the retain half."""

    def __init__(self, forgetting: Sampler, retaining: Sampler):
        self.forgetting = forgetting
        self.retaining = retaining

    def batch(self, step: int) -> Tensor:
        return torch.cat((self.forgetting.batch(step), self.retaining.batch(step)))


class PartSampler(Sampler):
    """Draws from a part of the data set.

    Args:
        sampler: over as many images as there are ``positions``.
        positions: ``[n]`` int64, the part's positions in the data set.
    """

    def __init__(self, sampler: Sampler, positions: Tensor):
        self.sampler = sampler
        self.positions = positions

    def batch(self, step: int) -> Tensor:
        return self.positions[self.sampler.batch(step)]
