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
class Origin:
    """What every baseline is made of.

    Attributes:
        original: the plain classifier; never changed.
        train: the images that it was trained on.
        training: arguments of :func:`wfnet.training.fit_classifier`, for methods that train anew;
            normally those that made ``original``.
        fresh: makes the network with new weights; by default
            :func:`wfnet.evaluation.reinitialise` does.
        workers, max_corrupt: as in :func:`wfnet.data.batches`.
    """

    original: nn.Module
    train: Dataset
    training: Mapping[str, Any] = field(default_factory=dict)
    fresh: Callable[[], nn.Module] | None = None
    workers: int = 0
    max_corrupt: int | CorruptImages | None = None

    @property
    def device(self) -> torch.device:
        """Of the original network."""
        return next(self.original.parameters()).device

    def images(self, label: int) -> tuple[Tensor, Tensor]:
        """Positions in ``train`` of the images of a class, and of all others.

        Raises:
            ValueError: for a class without training images or without others.
        """
        is_own = labels_of(self.train) == label
        own, others = is_own.nonzero().flatten(), (~is_own).nonzero().flatten()
        if not len(own) or len(others) < 2:
            raise ValueError(
                f"class {label} has {len(own)} training images and all others {len(others)}; a "
                "baseline needs images of the class and of others"
            )
        return own, others


class Method(ABC):
    """A way to unlearn: a subclass, and an instance in ``wfnet.baselines.unlearning.METHODS``.

    Attributes:
        name: of its files, and on the command line.
        defaults: settings if none are given.
        unused: names of settings that change nothing.
    """

    name: str
    defaults = BaselineConfig()
    unused: tuple[str, ...] = ()

    @abstractmethod
    def unlearn(self, origin: Origin, label: int, config: BaselineConfig) -> nn.Module:
        """Returns a model in which the class is forgotten, on the original's device."""

    def settings(self, config: BaselineConfig, training: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what of the settings the method uses, for its records."""
        return dict(vars(config))
