"""The parts of a run: training data that were checked, and what its settings choose."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wfnet.data import CorruptImages, Dataset, batches, classes_of, labels_of, multi_hot_of
from wfnet.data.dataset import name_of
from wfnet.network import WFNet
from wfnet.untraining.durable import DurableObjective, GroupSampler, groups_of
from wfnet.untraining.expansion import HalvesSampler, RoundRobinSampler, Sampler, ShuffledSampler
from wfnet.untraining.objectives import (
    BalancedObjective,
    MultiLabelObjective,
    Objective,
    PaperObjective,
)
from wfnet.untraining.optimizers import RowAdam
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
    def of(cls, dataset: Dataset, num_classes: int, config: UntrainConfig) -> TrainingData:
        """The data of a run on a network of ``num_classes``.

        Raises:
            ValueError: if they do not fit it, or a class that is untrained has no image.
        """
        labels, multi_hot = checked_labels(dataset, num_classes, "training"), multi_hot_of(dataset)
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
        return cls(dataset, labels, multi_hot, num_classes, rows)

    def fitting(self, config: UntrainConfig) -> UntrainConfig:
        """Returns settings that can be kept with these data."""
        if self.multi_hot is not None:  # an image has other labels in any pair of rows
            config = replace(config, compound=0.0)
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


def configured_objective(config: UntrainConfig, multi_label: bool) -> Objective:
    """Returns the objective of the settings, for images with one label or several."""
    if config.objective == "durable":
        if multi_label:
            raise ValueError(
                "recipe durable is for images with one label; take recipe balanced for these"
            )
        return DurableObjective(config.lambda1, config.match)
    if config.objective == "paper":
        objective = PaperObjective(config.lambda0, config.lambda1, config.lambda2)
    else:
        objective = BalancedObjective(config.lambda1, config.distil)
    return MultiLabelObjective(objective) if multi_label else objective


def configured_optimizer(config: UntrainConfig, net: WFNet) -> torch.optim.Optimizer:
    """Returns the optimiser of the settings over the network's filter matrices."""
    params = net.filter_parameters()
    if config.optimizer == "sgd":
        return torch.optim.SGD(params, lr=config.lr)
    starts = [start for m in net.masked_layers.values() for start in m.filter_starts().values()]
    return RowAdam(params, lr=config.lr, shrink=config.shrink, starts=starts)


def configured_sampler(config: UntrainConfig, data: TrainingData) -> Sampler:
    """Returns the sampler of the settings.

    Where some images have no row of their own, the forget half has the others; the retain half has
    all that can be retained under another row.
    """
    half, seed, labels, own = config.batch_size // 2, config.seed, data.labels, data.has_row
    if not bool(own.all()):
        parts = []
        others = ~own if len(data.rows) == 1 else torch.ones_like(own)
        for stream, chosen in enumerate((own, others)):
            positions = chosen.nonzero().flatten()
            sampler = RoundRobinSampler(labels[positions], half, seed, stream)
            if config.sampler == "shuffled":
                sampler = ShuffledSampler(len(positions), half, seed + stream)
            parts.append((sampler, positions))
        return HalvesSampler(*parts)
    if config.objective == "durable":
        return GroupSampler(labels, groups_of(config), seed)
    if config.sampler == "shuffled":
        return ShuffledSampler(len(labels), config.images, seed)
    forgetting = RoundRobinSampler(labels, half, seed)
    if config.share_images:
        return forgetting
    return HalvesSampler((forgetting, None), (RoundRobinSampler(labels, half, seed, 1), None))


def first_broken_image(dataset: Dataset, positions: Tensor) -> str | None:
    """Returns the name of the first of some images that has NaN or infinite values, if one has."""
    for batch in batches(dataset, positions.unique().split(64), 0, CorruptImages(len(positions))):
        broken = (~batch.images.flatten(1).isfinite().all(1)).nonzero().flatten()
        if len(broken):
            return name_of(dataset, int(batch.indices[broken[0]]))
    return None
