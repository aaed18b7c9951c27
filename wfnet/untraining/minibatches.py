"""The minibatches of a run: data that were checked, sampled, read and expanded."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wfnet.data import (
    CorruptImages,
    Dataset,
    batches,
    classes_of,
    labels_of,
    limit_per_class,
    multi_hot_of,
    select,
)
from wfnet.services.ranks import Ranks
from wfnet.services.seeds import generator_for
from wfnet.untraining.durable import GroupSampler, expand_groups
from wfnet.untraining.expansion import (
    ExpandedBatch,
    Sampler,
    expand,
    in_batches,
    round_robin,
    shuffled_passes,
)
from wfnet.untraining.step import Minibatch
from wfnet.untraining.untrain_config import UntrainConfig


@dataclass(frozen=True)
class TrainingData:
    """The images of a run.

    Attributes:
        dataset: the images.
        labels: ``[N]`` int64.
        multi_hot: ``[N, K]`` bool for images with several labels each, else None.
        num_classes: K.
        rows: ``[R]`` ascending, those that are untrained; None: all.
    """

    dataset: Dataset
    labels: Tensor
    multi_hot: Tensor | None
    num_classes: int
    rows: Tensor | None

    @classmethod
    def of(cls, dataset: Dataset, num_classes: int, config: UntrainConfig) -> "TrainingData":
        """The data of a run on a network of ``num_classes``.

        Raises:
            ValueError: if they do not fit it, or a class that is untrained has no image.
        """
        labels = checked_labels(dataset, num_classes, "training")
        if config.images_per_class is not None:
            few = limit_per_class(labels, config.images_per_class, config.seed)
            dataset, labels = select(dataset, few), labels[few]
        multi_hot = multi_hot_of(dataset)
        rows = None
        if config.classes is not None and len(config.classes) < num_classes:
            if config.classes[-1] >= num_classes:
                raise ValueError(
                    f"classes has {config.classes[-1]}, but the network has {num_classes} classes "
                    f"(0 to {num_classes - 1})"
                )
            rows = torch.tensor(config.classes)
        if multi_hot is not None and rows is not None:
            raise ValueError("of images with several labels all are untrained: leave out classes")
        occurring = labels if multi_hot is None else multi_hot.nonzero()[:, 1]
        wanted = torch.arange(num_classes) if rows is None else rows
        missing = wanted[~torch.isin(wanted, occurring)].tolist()
        if missing:
            names = classes_of(dataset)
            name = names[missing[0]] if missing[0] < len(names) else str(missing[0])
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"class {name!r}{more} has no training image, so its row could not learn to forget "
                "it; add images of every class that the network knows, or name those that are to "
                "be untrained (classes=[...], --classes)"
            )
        found, least = len(occurring.unique()), 3 if config.compound else 2
        if config.objective == "durable" and (found < least or len(wanted) < least - 1):
            less = " (or set compound=0: none is under two rows at once then)"
            raise ValueError(
                f"recipe durable retains images of other classes under each row: it needs images "
                f"of {least} classes or more, {least - 1} of them untrained"
                f"{less if config.compound else ''}; the training data have {found}, and "
                f"{len(wanted)} untrained: add images of others"
            )
        return cls(dataset, labels, multi_hot, num_classes, rows)

    def fitting(self, config: UntrainConfig) -> UntrainConfig:
        """Returns settings that can be kept with these data."""
        if self.multi_hot is not None:  # an image has other labels in any pair of rows
            config = replace(config, compound=0.0, saliency=0.0)
        if not bool(self.has_row.all()):  # images without a row of their own serve one half only
            config = replace(config, share_images=False)
        return config

    @property
    def has_row(self) -> Tensor:
        """``[N]`` bool: whether an image's label is untrained."""
        if self.rows is None:
            return torch.ones_like(self.labels, dtype=torch.bool)
        return torch.isin(self.labels, self.rows)


def checked_labels(dataset: Dataset, num_classes: int, what: str) -> Tensor:
    """Returns the labels of the ``what`` data.

    Raises:
        ValueError: if there are none, or if they are not those of a network of ``num_classes``.
    """
    labels = labels_of(dataset)
    if len(labels) == 0:
        raise ValueError(f"the {what} data have no images")
    low, high = int(labels.min()), int(labels.max())
    known = len(classes_of(dataset)) if getattr(dataset, "classes", None) else num_classes
    wrong = None
    if low < 0 or high >= num_classes:
        wrong = f"label {low if low < 0 else high}"
    elif known != num_classes:
        wrong = f"{known} classes"
    if wrong:
        raise ValueError(
            f"the {what} data have {wrong}, but the network has {num_classes} classes (0 to "
            f"{num_classes - 1}); use the data set that it classifies"
        )
    return labels


def configured_sampler(config: UntrainConfig, data: TrainingData) -> Sampler:
    """Returns the sampler of the settings.

    Where some images have no row of their own, the forget half has the others; the retain half has
    all that can be retained under another row.
    """
    if config.objective == "durable":
        return GroupSampler(data.labels, config, data.rows)
    own = data.has_row
    every, size, parts = torch.ones_like(own), config.batch_size // 2, (own, own)
    if not bool(own.all()):
        parts = own, ~own if len(data.rows) == 1 else every
    elif config.share_images or config.sampler == "shuffled":
        parts, size = (every,), config.images
    halves = []
    for stream, part in enumerate(parts):
        positions = part.nonzero().flatten()
        if config.sampler == "shuffled":
            halves.append(shuffled_passes(positions, 2, config.seed + stream, 1))
        else:
            halves.append(round_robin(data.labels, positions, size, config.seed, stream))
    return in_batches(size, *halves)


def drawn_images(data: TrainingData, config: UntrainConfig, steps: range) -> Tensor:
    """Returns the positions ``[n]``, ascending, of all images of the minibatches ``steps``."""
    few = config.views is not None or len(steps) * config.images >= 3 * len(data.labels)
    if few:  # all of them, or about all
        return torch.arange(len(data.labels))
    sampler = configured_sampler(config, data)
    return torch.cat([sampler(step) for step in steps]).unique()


def read_minibatches(
    data: TrainingData,
    config: UntrainConfig,
    ranks: Ranks,
    corrupt: CorruptImages,
    steps: range,
    pin_memory: bool = False,
    original: Tensor | None = None,
) -> Iterator[tuple[Minibatch, Tensor]]:
    """Yields this rank's share of each minibatch, and the ``[R]`` distinct rows of the whole of it.

    Every rank knows all labels of a minibatch, and draws the rows of the whole of it: what a run
    learns does not depend on the number of ranks. An unreadable image is replaced by another one of
    its class, so sizes and labels are known before anything is read.

    Args:
        data: the training images.
        config: settings of the run.
        ranks: who shares the minibatches.
        corrupt: where unreadable images are counted.
        steps: numbers of the minibatches.
        pin_memory: read into page-locked memory.
        original: ``[N, K]``, the original network's logits of all images, where they are known to
            a process that shares with no other.

    Raises:
        LostWorker: if a data worker dies.
        RuntimeError: for too many corrupt images, or none of a class that can be read.
    """
    sampler = configured_sampler(config, data)
    stream = batches(
        data.dataset,
        (ranks.share(sampler(step)) for step in steps),
        config.workers,
        corrupt,
        pin_memory=pin_memory,
        seed=config.seed,
        start=steps.start,
        replace_corrupt=True,
    )
    for step, batch in zip(steps, stream, strict=True):
        indices = batch.indices if ranks.alone else sampler(step)
        whole = _expanded(data, config, step, indices)
        if original is not None:
            whole = replace(whole, original=original[indices], positions=indices)
        yield (batch.images, whole if ranks.alone else _own(whole, ranks)), whole.rows


def _expanded(
    data: TrainingData, config: UntrainConfig, step: int, indices: Tensor
) -> ExpandedBatch:
    """Returns the expanded batch of minibatch ``step``, which has these images."""
    if config.objective == "durable":
        return expand_groups(data.labels[indices], config)
    return expand(
        (data.labels if data.multi_hot is None else data.multi_hot)[indices],
        data.num_classes,
        config.label_expansion,
        generator_for(config.seed, 4, step),
        config.share_images,
        rows=data.rows,
        compound=config.compound,
    )


def _own(whole: ExpandedBatch, ranks: Ranks) -> ExpandedBatch:
    """Returns the samples of the images that this rank has."""
    mine = whole.source % ranks.size == ranks.rank
    return ExpandedBatch(
        whole.forget[mine],
        whole.source[mine] // ranks.size,
        whole.target[mine],
        int(mine[whole.forget_half].sum()),
        weight=None if whole.weight is None else whole.weight[mine],
    )
