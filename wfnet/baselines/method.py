"""What a baseline is: a way to make, of a trained classifier, one that has forgotten a class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wfnet.data import CorruptImages, Dataset, labels_of
from wfnet.services import settings
from wfnet.services.settings import check_settings, setting


@dataclass(frozen=True)
class BaselineConfig:
    """How the original network is fine-tuned into a baseline.

    Attributes:
        epochs: passes over the images: all training images, or those of the class alone for
            ``negative_gradient``.
        lr, momentum, weight_decay, batch_size: of SGD.
        max_norm: bound on the norm of the gradient; ascent would otherwise run away in a few steps.
        retain_weight: beta of ``neggrad_plus``.
        stop_below: ascent alone has no end: ``negative_gradient`` stops after the epoch in which
            the accuracy on training images of the class falls to this or below.
        batch_norm: "train" updates running statistics, "frozen" leaves them, and dropout, in
            evaluation mode: batches of one class alone would give statistics of that class.
        seed: decides order, labels and dropout.

    Raises:
        ValueError: for values out of range.
    """

    epochs: int = setting(3, settings.positive_int)
    lr: float = setting(0.01, settings.positive_float)
    momentum: float = setting(0.9, settings.below_one)
    weight_decay: float = setting(0.0, settings.non_negative_float)
    batch_size: int = setting(64, settings.int_from(2))
    max_norm: float = setting(1.0, settings.positive_float)
    retain_weight: float = setting(0.9, settings.Number(0.0, 1.0))
    stop_below: float = setting(0.0, settings.Number(0.0, 1.0))
    batch_norm: str = setting("train", ("train", "frozen"))
    seed: int = setting(0, settings.seed)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class Task:
    """One class that one model is to forget.

    Attributes:
        original: the plain classifier; never changed.
        train: the images that it was trained on.
        label: the class to forget.
        config: settings.
        training: arguments of :func:`wfnet.training.fit_classifier`, for methods that train anew;
            normally those that made ``original``.
        fresh: makes the network with new weights; by default
            :func:`wfnet.evaluation.reinitialise` does.
        workers, max_corrupt: as in :func:`wfnet.data.batches`.
        labels, own, others: labels of ``train``, and positions of the images of the class and of
            all others.

    Raises:
        ValueError: for a class without training images or without others.
    """

    original: nn.Module
    train: Dataset
    label: int
    config: BaselineConfig
    training: Mapping[str, Any] = field(default_factory=dict)
    fresh: Callable[[], nn.Module] | None = None
    workers: int = 0
    max_corrupt: int | CorruptImages | None = None
    labels: Tensor = field(init=False)
    own: Tensor = field(init=False)
    others: Tensor = field(init=False)

    def __post_init__(self) -> None:
        labels = labels_of(self.train)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "own", (labels == self.label).nonzero().flatten())
        object.__setattr__(self, "others", (labels != self.label).nonzero().flatten())
        if not len(self.own) or len(self.others) < 2:
            raise ValueError(
                f"class {self.label} has {len(self.own)} training images and all others "
                f"{len(self.others)}; a baseline needs images of the class and of others"
            )

    @property
    def device(self) -> torch.device:
        """Of the original network."""
        return next(self.original.parameters()).device


class Method(ABC):
    """A way to unlearn: a file of this room has one subclass, and the registry one instance.

    Attributes:
        name: of its files, and on the command line.
        defaults: settings if none are given.
        unused: names of settings that change nothing.
    """

    name: str
    defaults = BaselineConfig()
    unused: tuple[str, ...] = ()

    @abstractmethod
    def unlearn(self, task: Task) -> nn.Module:
        """Returns a model in which the class is forgotten, on the original's device."""

    def settings(self, config: BaselineConfig, training: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what of the settings the method uses, for its records."""
        return dict(vars(config))
