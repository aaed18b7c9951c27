"""The parts of a run: labels that were checked, and what its settings choose."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from wfnet.data import CorruptImages, Dataset, batches, classes_of, labels_of
from wfnet.data.dataset import name_of
from wfnet.network import WFNet
from wfnet.untraining.durable import DurableObjective, GroupSampler, groups_of
from wfnet.untraining.expansion import (
    HalvesSampler,
    PartSampler,
    RoundRobinSampler,
    Sampler,
    ShuffledSampler,
)
from wfnet.untraining.multilabel import MultiLabelObjective
from wfnet.untraining.objectives import BalancedObjective, Objective, PaperObjective
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.untrain_config import UntrainConfig


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


def check_gates(net: WFNet, config: UntrainConfig) -> None:
    """Raises ValueError if the network has not the gates that the objective trains."""
    wanted = "durable" if config.objective == "durable" else "sigmoid"
    if net.gate != wanted:
        raise ValueError(
            f"objective {config.objective!r} trains {wanted} gates, but the network has {net.gate} "
            f"ones; wrap it with WFNet(..., gate={wanted!r})"
        )


def configured_optimizer(config: UntrainConfig, net: WFNet) -> torch.optim.Optimizer:
    """Returns the optimiser of the settings over the network's filter matrices."""
    params = net.filter_parameters()
    if config.optimizer == "sgd":
        return torch.optim.SGD(params, lr=config.lr)
    starts = [start for m in net.masked_layers.values() for start in m.filter_starts().values()]
    return RowAdam(params, lr=config.lr, shrink=config.shrink, starts=starts)


def untrained_rows(config: UntrainConfig, num_classes: int) -> Tensor | None:
    """Returns the rows that are untrained, ``[R]`` ascending; None for all.

    Raises:
        ValueError: if the network does not have them.
    """
    if config.classes is None or len(config.classes) == num_classes:
        return None
    if config.classes[-1] >= num_classes:
        raise ValueError(
            f"classes has {config.classes[-1]}, but the network has {num_classes} classes (0 to "
            f"{num_classes - 1})"
        )
    return torch.tensor(config.classes)


def fitting_config(config: UntrainConfig, labels: Tensor, rows: Tensor | None) -> UntrainConfig:
    """Returns settings that can be kept: images without a row of their own serve one half only."""
    if rows is None or bool(torch.isin(labels, rows).all()):
        return config
    return replace(config, share_images=False)


def configured_sampler(config: UntrainConfig, labels: Tensor, rows: Tensor | None) -> Sampler:
    """Returns the sampler of the settings over images with these ``labels``.

    Of ``rows`` that are untrained, if not all are, the forget half has their images; the retain
    half has all that can be retained under another one.
    """
    half, seed = config.batch_size // 2, config.seed
    own = None if rows is None else torch.isin(labels, rows)
    if own is not None and not bool(own.all()):
        parts = []
        for stream, chosen in enumerate((own, ~own if len(rows) == 1 else torch.ones_like(own))):
            positions = chosen.nonzero().flatten()
            sampler = RoundRobinSampler(labels[positions], half, seed, stream)
            if config.sampler == "shuffled":
                sampler = ShuffledSampler(len(positions), half, seed + stream)
            parts.append(PartSampler(sampler, positions))
        return HalvesSampler(*parts)
    if config.objective == "durable":
        return GroupSampler(labels, groups_of(config), seed)
    if config.sampler == "shuffled":
        images = half if config.share_images else config.batch_size
        return ShuffledSampler(len(labels), images, seed)
    forgetting = RoundRobinSampler(labels, half, seed)
    if config.share_images:
        return forgetting
    return HalvesSampler(forgetting, RoundRobinSampler(labels, half, seed, stream=1))


def checked_labels(dataset: Dataset, num_classes: int, what: str) -> Tensor:
    """Returns the labels of the ``what`` data.

    Raises:
        ValueError: if there are none, or if they are not those of a network of ``num_classes``.
    """
    labels = labels_of(dataset)
    if len(labels) == 0:
        raise ValueError(f"the {what} data have no images")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"the {what} data have label {low if low < 0 else high}, but the network has "
            f"{num_classes} classes (0 to {num_classes - 1}); use the data set that it classifies"
        )
    known = len(classes_of(dataset))
    if getattr(dataset, "classes", None) is not None and known != num_classes:
        raise ValueError(
            f"the {what} data have {known} classes, the network has {num_classes}; use the data "
            "set that it classifies"
        )
    return labels


def check_every_class(
    labels: Tensor, dataset: Dataset, num_classes: int, rows: Tensor | None = None
) -> None:
    """Raises ValueError if a class that is untrained has no image, by its name."""
    missing = (labels.bincount(minlength=num_classes) == 0).nonzero().flatten()
    if rows is not None:
        missing = missing[torch.isin(missing, rows)]
    missing = missing.tolist()
    if missing:
        names = classes_of(dataset)
        name = names[missing[0]] if missing[0] < len(names) else str(missing[0])
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"class {name!r}{more} has no training image, so its row could not learn to forget it; "
            "add images of every class that the network knows, or name those that are to be "
            "untrained (classes=[...], --classes)"
        )


# Sizes of recipes, which stay possible with few classes and images.
_EXPANSION_OF_RECIPES = 5
_IMAGES_OF_RECIPES = 512


def check_sizes(config: UntrainConfig, images: int, rows: int) -> None:
    """Raises ValueError for a step that the data cannot fill.

    Args:
        config: settings of the run.
        images: of the training data.
        rows: that are untrained.
    """
    if config.label_expansion > max(rows - 1, _EXPANSION_OF_RECIPES):
        raise ValueError(
            f"label_expansion is {config.label_expansion}, but there are {rows - 1} other classes: "
            "an image would go through the same rows again and again"
        )
    if config.images > max(images, _IMAGES_OF_RECIPES):
        raise ValueError(
            f"batch_size {config.batch_size:,} reads {config.images:,} images for a minibatch, but "
            f"the training data have {images:,}"
        )


def check_finite_filters(net: WFNet) -> None:
    """Raises ValueError if a filter that training would start from is NaN or infinite."""
    for name, parameter in net.named_filters().items():
        if not bool(parameter.isfinite().all()):
            raise ValueError(
                f"the filters of {name} are NaN or infinite before the first step; start from "
                "those of a run that did not diverge, or wrap the network anew"
            )


def check_finite_images(dataset: Dataset, what: str) -> None:
    """Raises ValueError if one of the ``what`` images, held in memory as numbers, is not finite."""
    held = getattr(dataset, "images", None)
    if isinstance(dataset, torch.utils.data.TensorDataset):
        held = dataset.tensors[0]
    if not isinstance(held, Tensor) or not held.is_floating_point() or not len(held):
        return
    broken = [~part.flatten(1).isfinite().all(1) for part in held.split(4096)]
    broken = torch.cat(broken).nonzero().flatten()
    if len(broken):
        more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise ValueError(
            f"the {what} image {name_of(dataset, int(broken[0]))} has values that are NaN or "
            f"infinite{more}: repair it, or leave it out"
        )


def first_broken_image(dataset: Dataset, positions: Tensor) -> str | None:
    """Returns the name of the first of some images that has NaN or infinite values, if one has."""
    for batch in batches(dataset, positions.unique().split(64), 0, CorruptImages(len(positions))):
        broken = (~batch.images.flatten(1).isfinite().all(1)).nonzero().flatten()
        if len(broken):
            return name_of(dataset, int(batch.indices[broken[0]]))
    return None
