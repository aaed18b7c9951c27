"""What a measure of shadow ensembles is, a function of two arrays for each class; intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    or fewer, have probability ``(1 - level) / 2``. Found by bisection.
    """
    tail = (1 - level) / 2
    k = torch.arange(trials + 1, dtype=torch.float64)
    n = torch.tensor(float(trials), dtype=torch.float64)
    ways = (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()

    def more(share: float, least: int) -> float:
        """The probability of ``least`` hits or more."""
        p = torch.tensor(share, dtype=torch.float64)
        return (ways + k * p.log() + (n - k) * (1 - p).log())[least:].exp().sum().item()

    low = 0.0 if hits == 0 else _root(lambda share: more(share, hits) - tail)
    high = 1.0 if hits == trials else _root(lambda share: more(share, hits + 1) - (1 - tail))
    return low, high


def _root(rising: Callable[[float], float]) -> float:
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


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
