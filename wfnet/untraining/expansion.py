"""Label expansion: which rows of the filter matrices each image of a minibatch goes through.

Paper, "Multi-class unlearning": half of a minibatch unlearns under the row of its own label, the
other half is retained under random rows of other classes, each image ``M`` times. With compound
rows, each image is retained under two random rows at once besides, and every other one unlearns
under its own row and another: products of rows then forget each of their classes, and no row rests
on gates that another one closes. Samplers say which images make up minibatch number ``step``.
Everything here is a function of a seed and a step alone, so an interrupted run continues with
exactly the batches that it would have seen.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
        positions: ``[n]`` int64, of the images in their data set, where these logits are known.
        weight: ``[B]`` fp32, weights of the samples in the means over a half; None: all equal.
    """

    forget: Tensor
    source: Tensor
    target: Tensor
    forget_size: int
    original: Tensor | None = None
    weight: Tensor | None = None
    positions: Tensor | None = None

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

    def __len__(self) -> int:
        return self.forget.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The attributes that are tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str) -> "ExpandedBatch":
        """The same batch on ``device``; copies do not wait for the device."""
        moved = {name: to_device_async(t, device) for name, t in self.tensors().items()}
        return replace(self, **moved)


def random_other_rows(
    labels: Tensor, num_classes: int, generator: torch.Generator, rows: Tensor | None = None
) -> Tensor:
    """Returns a row per entry of ``labels``, uniform over the other classes, independent.

    Args:
        labels: ``[n]`` int64, in ``0 .. K-1``.
        num_classes: K.
        generator: source of the rows.
        rows: ``[R]``, distinct, ascending: classes that are drawn from; all by default.

    Raises:
        ValueError: if there is no other class.
    """
    if rows is not None:
        drawn = _rows_beside(rows, generator, labels, labels)
        if bool((drawn < 0).any()):
            raise ValueError(
                "images of the only class that is untrained can be retained under no other row; "
                "untrain two classes or more, or add images of others"
            )
        return drawn
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
    rows: Tensor | None = None,
    compound: float = 0.0,
) -> ExpandedBatch:
    """Expands a minibatch (paper, "label expansion").

    Args:
        labels: on the host, ground truth of the images: ``[n]`` int64, or ``[n, K]`` bool for
            several labels each, of which one is drawn in the forget half. ``target`` is then
            ``[B, K]`` fp32.
        num_classes: K, at least 2.
        label_expansion: M, how many rows each retained image goes through; rows are drawn
            uniformly over the classes that it lacks, independently, with replacement.
        generator: source of the rows; it alone decides them.
        share_images: the same images serve both halves; otherwise the leading half of them,
            rounded down, is the forget half.
        rows: ``[R]``, distinct, ascending: classes whose rows are untrained; all by default. Not
            with several labels each.
        compound: weight of compound rows, beside 1 for single ones; 0: there are none. Each
            retained image goes through two other rows at once, and the first half of the forget
            images through their own and another, as far as there are so many. In the means over a
            half all compound samples together weigh ``compound`` times what all others do. Not
            with several labels each.

    Returns:
        ``n + n * M`` samples with shared images, else about ``n / 2 + n / 2 * M``;
        with compound rows as many more as there are retained images and pairs of forget images.
    """
    forgetting = retaining = torch.arange(len(labels))
    if not share_images:
        cut = len(labels) // 2
        forgetting, retaining = forgetting[:cut], retaining[cut:]
    retained = retaining.repeat_interleave(label_expansion)
    target = labels
    if labels.dim() == 2:
        own = labels[forgetting].float().multinomial(1, generator=generator).squeeze(1)
        lacking = (~labels[retaining]).float()
        others = lacking.multinomial(label_expansion, True, generator=generator).flatten()
        target = labels.float()
    else:
        own = labels[forgetting]
        others = random_other_rows(labels[retained], num_classes, generator, rows)
    if not compound:
        source = torch.cat((forgetting, retained))
        return ExpandedBatch(torch.cat((own, others)), source, target[source], len(own))
    twice = forgetting[: len(forgetting) // 2]
    both, kept = labels[twice], labels[retaining]
    first = random_other_rows(kept, num_classes, generator, rows)
    beside = partial(_rows_beside, torch.arange(num_classes) if rows is None else rows, generator)
    forget = torch.cat(
        (
            _padded(own),
            torch.stack((both, beside(both, both)), 1),
            _padded(others),
            torch.stack((first, beside(kept, first)), 1),
        )
    )
    weights = []
    for single, double in ((forgetting, twice), (retained, retaining)):
        weight = compound * len(single) / max(len(double), 1)
        weights += [torch.ones(len(single)), torch.full((len(double),), weight)]
    source = torch.cat((forgetting, twice, retained, retaining))
    forget_size = len(forgetting) + len(twice)
    return ExpandedBatch(forget, source, target[source], forget_size, weight=torch.cat(weights))


def _padded(rows: Tensor) -> Tensor:
    """``[n, 2]`` of single rows ``[n]``."""
    return torch.stack((rows, torch.full_like(rows, -1)), 1)


# Gives the positions ``[n]`` int64 of the images of minibatch number ``step``. There is no state to
# save: to resume, go on with the next step.
Sampler = Callable[[int], Tensor]


def shuffled_passes(items: Tensor, cached: int, *key: int) -> Callable[[int], np.generic]:
    """Returns what gives item number i of endless passes over ``items``, each shuffled anew.

    Args:
        items: ``[N]``.
        cached: passes whose orders are kept.
        key: seed of the orders.
    """

    @lru_cache(cached)
    def order(number: int) -> np.ndarray:
        shuffled = torch.randperm(len(items), generator=generator_for(*key, number))
        return items[shuffled].numpy()  # an element of a tensor takes a microsecond

    def item(number: int) -> np.generic:
        done, place = divmod(number, len(items))
        return order(done)[place]

    return item


def round_robin(
    labels: Tensor, positions: Tensor, cached: int, seed: int, stream: int = 0
) -> Callable[[int], np.generic]:
    """Returns what gives image number i of classes in turn: all rows are trained equally often.

    The order of the classes is shuffled anew every round. Among any first images two classes differ
    by at most one occurrence, whatever their sizes; within a class, images come in shuffled passes.

    Args:
        labels: ``[N]`` int64.
        positions: ``[n]`` int64, of the images that are drawn from.
        cached: images that are asked for at a time.
        seed: seed of both orders.
        stream: different ones are independent of each other.
    """
    sizes = labels[positions].bincount()
    present = sizes.nonzero().flatten()
    count = len(present)
    by_class = positions[labels[positions].argsort(stable=True)].split(sizes[present].tolist())
    classes = shuffled_passes(present, cached // count + 2, seed, 2, stream)
    images = {
        label: shuffled_passes(members, 2, seed, 3, stream, label)
        for label, members in zip(present.tolist(), by_class, strict=True)
    }
    return lambda number: images[int(classes(number))](number // count)


def in_batches(size: int, *halves: Callable[[int], np.generic]) -> Sampler:
    """Returns the sampler whose batches take the next ``size`` images of each of ``halves``."""

    def batch(step: int) -> Tensor:
        numbers = range(step * size, (step + 1) * size)
        return torch.from_numpy(np.array([half(i) for half in halves for i in numbers]))

    return batch
