"""What a baseline is: a way to make, of a trained classifier, one that has forgotten a class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wfnet.data import (
    CorruptImages,
    Dataset,
    batches,
    corrupt_counter,
    is_of,
    multi_hot_of,
    truth_of,
)
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.services import settings
from wfnet.services.files import code_digest
from wfnet.services.settings import check_settings, setting

Forget = int | tuple[int, ...]  # a class, or several that are forgotten together


def classes_in(forget: Forget) -> tuple[int, ...]:
    """Returns the classes to forget."""
    return forget if isinstance(forget, tuple) else (forget,)


def written(forget: Forget) -> str:
    """Returns the classes as text, ``3`` or ``3+8``: of files, and on the command line."""
    return "+".join(map(str, classes_in(forget)))


@dataclass(frozen=True)
class BaselineConfig:
    """Settings of a method. A method that has more of them declares a subclass.

    Attributes:
        seed: decides all that is random.

    Raises:
        ValueError: for values out of range.
    """

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
        fresh: seed -> the network with new weights; by default
            :func:`wfnet.evaluation.reinitialise` makes it.
        workers, max_corrupt: as in :func:`wfnet.data.batches`.
    """

    original: nn.Module
    train: Dataset
    training: Mapping[str, Any] = field(default_factory=dict)
    fresh: Callable[[int], nn.Module] | None = None
    workers: int = 0
    max_corrupt: int | CorruptImages | None = None

    @property
    def device(self) -> torch.device:
        """Of the original network."""
        return next(self.original.parameters()).device

    def options(self) -> RunOptions:
        """How images are read, with a counter of the corrupt ones."""
        corrupt = corrupt_counter(self.train, self.max_corrupt)
        return RunOptions(workers=self.workers, max_corrupt=corrupt)

    def image_shape(self) -> torch.Size:
        """``[C, H, W]`` of the training images."""
        return next(iter(batches(self.train, [torch.arange(1)]))).images.shape[1:]

    def images(self, forget: Forget) -> tuple[Tensor, Tensor]:
        """Positions in ``train`` of the images of the class or classes, and of all others.

        Raises:
            ValueError: for a class without training images or without others.
        """
        is_own = is_of(truth_of(self.train), *classes_in(forget))
        own, others = is_own.nonzero().flatten(), (~is_own).nonzero().flatten()
        if not len(own) or len(others) < 2:
            raise ValueError(
                f"class {written(forget)} has {len(own)} training images and all others "
                f"{len(others)}; a baseline needs images of the class and of others"
            )
        return own, others


class Method(ABC):
    """A way to unlearn: a subclass in a file of its own, and an instance in the registry.

    Attributes:
        name: of its files, and on the command line.
        defaults: settings if none are given; their class says which settings there are.
        grid: changes of the defaults that tuning tries (:func:`wfnet.baselines.tuning.tune`); the
            first are the defaults. Its length is the budget.
        unused: names of settings that change nothing.
        several: whether it forgets several classes together, and takes images with several labels.
    """

    name: str
    defaults: BaselineConfig = BaselineConfig()
    grid: tuple[Mapping[str, Any], ...] = ()
    unused: tuple[str, ...] = ()
    several: bool = False

    @abstractmethod
    def unlearn(self, origin: Origin, label: Forget, config: BaselineConfig) -> nn.Module:
        """Returns a model in which the class is forgotten, on the original's device.

        The original network must not change; the architecture must stay. Several classes are given
        to a method that is for ``several``.
        """

    def check(self, origin: Origin, forget: Forget) -> None:
        """Raises ValueError unless the method is for these data, and so many classes."""
        if self.several or (isinstance(forget, int) and multi_hot_of(origin.train) is None):
            return
        raise ValueError(
            f"{self.name} forgets one class, of images with one label each; retrained, "
            "logit_masked and bias_shifted take several"
        )

    def code(self) -> str:
        """Returns a digest of the code by which the method unlearns."""
        return code_digest(
            kind.__module__ for kind in type(self).__mro__ if issubclass(kind, Method)
        )

    def settings(self, config: BaselineConfig, training: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what of the settings the method uses, for its records."""
        return {name: value for name, value in vars(config).items() if name not in self.unused}
