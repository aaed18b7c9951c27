"""What a measure of shadow ensembles is, a function of two arrays for each class; intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wfnet.services.extras import require

LEVEL = 0.95
RESAMPLES = 200


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


def clopper_pearson(hits: int, trials: int, level: float = LEVEL) -> tuple[float, float]:
    """Returns the exact interval of a share, ``hits`` of ``trials``.

    Clopper and Pearson, Biometrika 26 (1934): the shares at which so many hits or more, and so many
    or fewer, have probability ``(1 - level) / 2``.
    """
    test = require("scipy.stats", "eval").binomtest(hits, trials)
    interval = test.proportion_ci(level, "exact")
    return float(interval.low), float(interval.high)


def bootstrap(
    statistic: Callable[[Tensor], float], count: int, level: float = LEVEL, seed: int = 0
) -> tuple[float, float]:
    """Returns the percentile interval of ``statistic(chosen)`` over resampled images.

    Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13. ``chosen [count]``
    int64 are positions of images, drawn with replacement. Models are not resampled: what other
    seeds would give is not in the interval.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(count, (count,), generator=generator) for _ in range(RESAMPLES)]
    found = torch.tensor([statistic(chosen) for chosen in draws], dtype=torch.float64)
    low, high = found.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).double()).tolist()
    return low, high
