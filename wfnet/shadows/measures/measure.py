"""What a measure of shadow ensembles is: a function of two arrays for each class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from wfnet.shadows.intervals import bootstrap


@dataclass(frozen=True)
class Pair:
    """Logit-scaled confidences of the training images of one class under two kinds of models.

    Attributes:
        unlearned: ``[S, n]`` fp64, under ``S`` models that were trained with the image and then
            unlearned (or not, for the original).
        reference: ``[S, n]``, under as many others that never saw it.
    """

    unlearned: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval; None, and what it ``needs``, where it cannot be had."""

    value: float | None
    low: float | None = None
    high: float | None = None
    needs: str | None = None


Values = dict[str, Estimate]


@dataclass(frozen=True)
class Measure:
    """A measure: a file with a ``MEASURE``, found by its being there.

    Attributes:
        name, title: in files, and for people.
        definition: source and formula: the documentation of the module.
        values: what each value is, by name.
        function: the values of some classes together, a pure function of their pairs.
    """

    name: str
    title: str
    definition: str
    values: Mapping[str, str]
    function: Callable[[Sequence[Pair]], Values]


def mean_of_images(values: Tensor) -> Estimate:
    """Returns the mean of ``values [n]``, one for each image, with its bootstrap interval."""
    interval = bootstrap(lambda chosen: values[chosen].mean().item(), len(values))
    return Estimate(values.mean().item(), *interval)
